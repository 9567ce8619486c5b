//go:build !darwin && !windows

package posture

// systemVersion is not asked on Linux, and knows nothing elsewhere.
func systemVersion() (version, kernel string) { return "", "" }
