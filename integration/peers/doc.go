// Package peers measures a whole deployment beside its competitors: the load of
// tools/peerbench over both carriers, over `ssh -L` to Debian's sshd and over no
// tunnel at all, in turn, in the same minutes on the same machine. What the
// figures have to be is in its table beside them. It asserts nothing: on a busy
// machine only ratios within a run mean something, and a person reads those.
//
//	go test -run '^$' -bench Peers -benchtime 1x ./peers -args -rounds=3 -json=FILE
package peers
