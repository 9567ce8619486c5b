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

func TestShared(t *testing.T) {
	storetest.Shared(t, func(*testing.T) (a, b cached.Shared) {
		s := memory.New()
		return memory.NewShared(s), memory.NewShared(s)
	})
}
