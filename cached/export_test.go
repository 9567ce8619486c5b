package cached

import (
	"testing"
	"time"

	"sallyport"
	"sallyport/internal/keyring"
)

// BoundFeed makes the ring of changes small.
func BoundFeed(s *Server, batches int) {
	s.feed.mu.Lock()
	defer s.feed.mu.Unlock()
	s.feed.maxBatches = batches
}

// CatchUpMax is how far behind a watch may fall.
const CatchUpMax = catchUpMax

// TestRowsCodeCoversEachField belongs here because rows are sealed inside.
func TestRowsCodeCoversEachField(t *testing.T) {
	s := sealerOf(t)
	session := sallyport.Put(sallyport.KindSession, "id", sallyport.Session{Login: "l", User: "u", Device: "d"})
	sealed := func() Row { return s.seal(recordOf(&session, 7)) }
	if row := sealed(); !s.genuine(&row) || row.Owner != (Owner{"l", "u", "d"}) {
		t.Fatalf("got %+v; want a genuine row with its owners", row)
	}
	for name, edit := range map[string]func(*Row){
		"kind":         func(r *Row) { r.Kind = "sessions" },
		"id":           func(r *Row) { r.ID = "ie" },
		"kind into id": func(r *Row) { r.Kind, r.ID = "sessio", "nid" },
		"version":      func(r *Row) { r.Version++ },
		"revision":     func(r *Row) { r.Revision-- },
		"deleted":      func(r *Row) { r.Deleted = true },
		"expires":      func(r *Row) { r.Expires = latest },
		"login":        func(r *Row) { r.Owner.Login = "" },
		"user":         func(r *Row) { r.Owner.User = "v" },
		"device":       func(r *Row) { r.Owner.Device = "" },
		"login into user": func(r *Row) {
			r.Owner.Login, r.Owner.User = "", "lu"
		},
		"payload":   func(r *Row) { r.Payload[3] ^= 1 },
		"shorter":   func(r *Row) { r.Payload = r.Payload[:5] },
		"no code":   func(r *Row) { r.MAC = nil },
		"half code": func(r *Row) { r.MAC = r.MAC[:16] },
		"other key": func(r *Row) { *r = sealerOf(t).seal(r.Record) },
	} {
		row := sealed()
		if edit(&row); s.genuine(&row) {
			t.Errorf("%s changed, and the row is still genuine", name)
		}
	}
}

func sealerOf(t *testing.T) *sealer {
	t.Helper()
	s, err := newSealer(keyring.New(ringPurpose, time.Now()))
	if err != nil {
		t.Fatal(err)
	}
	return s
}
