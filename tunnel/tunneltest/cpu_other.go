//go:build !unix

package tunneltest

import "time"

// cpu is not measured here.
func cpu() time.Duration { return 0 }
