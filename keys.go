package sallyport

import (
	"context"
	"time"
)

// KeyRing is what an operator may know of the data keys of a daemon.
type KeyRing struct {
	// KEK is the id of the key-encryption key that wraps them.
	KEK string `json:"kek"`
	// Keys are the data keys, the active one first. Others are on their way out.
	Keys []DataKey `json:"keys"`
}

// DataKey is one of them.
type DataKey struct {
	ID      string    `json:"id"`
	Created time.Time `json:"created"`
	// Rows is how many rows it still protects; where that is not counted, 0.
	Rows uint64 `json:"rows"`
}

// KeyKeeper replaces the key that codes the rows of the record store.
// Implementations: cached.Server in the same process, proto/control's client.
type KeyKeeper interface {
	// RowKeys looks at every row.
	RowKeys(ctx context.Context) (KeyRing, error)
	// RotateRowKey returns once a new key is active. The rows follow in the
	// background, and then the old key goes by itself.
	RotateRowKey(ctx context.Context) error
	// RetireRowKeys drops older keys at once, if no row needs them.
	RetireRowKeys(ctx context.Context) error
}
