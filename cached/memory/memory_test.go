package memory_test

import (
	"testing"

	"sallyport/cached"
	"sallyport/cached/memory"
	"sallyport/cached/storetest"
)

func TestStore(t *testing.T) {
	storetest.Store(t, func(*testing.T) cached.Store { return memory.New() })
}
