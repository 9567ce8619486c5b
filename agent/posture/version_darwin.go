package posture

import "golang.org/x/sys/unix"

// systemVersion returns the product's version ("15.6") and the kernel's.
func systemVersion() (version, kernel string) {
	version, _ = unix.Sysctl("kern.osproductversion")
	kernel, _ = unix.Sysctl("kern.osrelease")
	return version, kernel
}
