// Command agent connects a person to the services of a company: it logs in
// through the browser, opens tunnels to the gateway, and says why something is
// not allowed. The work is done by package sallyport/agent; this one owns the
// words, the flags and the exit codes (docs: agent help).
package main

import (
	"os"
)

func main() { os.Exit(run(os.Args[1:], system())) }
