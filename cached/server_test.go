package cached_test

import (
	"testing"

	"sallyport/cached/storetest"
)

func TestServer(t *testing.T) {
	storetest.Records(t, func(t *testing.T) storetest.API { return storetest.Serve(t, nil) })
}
