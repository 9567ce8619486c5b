package control_test

import (
	"testing"

	"sallyport/cached/storetest"
	"sallyport/proto/control"
)

// The suite of the record store, which cached passes directly, over the wire.
func TestCachedOverTheWire(t *testing.T) {
	storetest.Records(t, func(t *testing.T) storetest.API {
		p := newPKI(t)
		ln := listen(t, "127.0.0.1:0")
		server := storetest.Serve(t, nil)
		serve(t, ln, p.server(control.KindCached), control.Services{Records: server, Lister: server, Revoker: server, Backuper: server})
		return dial(t, p.client(control.KindOperator, control.KindCached), ln.Addr().String()).Records()
	})
}
