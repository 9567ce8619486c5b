package posture

import (
	"fmt"

	"golang.org/x/sys/windows"
)

// systemVersion returns "10.0.22631"; the kernel has no version of its own.
func systemVersion() (version, kernel string) {
	v := windows.RtlGetVersion()
	return fmt.Sprintf("%d.%d.%d", v.MajorVersion, v.MinorVersion, v.BuildNumber), ""
}
