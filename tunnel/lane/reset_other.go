//go:build !windows

package lane

import "syscall"

// resets are the errors of a connection that the peer has reset.
var resets = []error{syscall.ECONNRESET, syscall.EPIPE}
