package cached

import (
	"crypto/hmac"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/binary"
	"encoding/json"
	"hash"
	"sync"

	"sallyport"
)

// KeySize is the length of the key of the rows' codes, in bytes.
const KeySize = 32

const macLabel = "sallyport cached row v1"

// sealer makes and checks the codes of rows. It is safe for concurrent use.
type sealer struct {
	hashes sync.Pool // of hash.Hash keyed with the key
	bufs   sync.Pool // of *[]byte
}

func newSealer(key []byte) *sealer {
	key = append([]byte(nil), key...)
	return &sealer{
		hashes: sync.Pool{New: func() any { return hmac.New(sha256.New, key) }},
		bufs:   sync.Pool{New: func() any { return new([]byte) }},
	}
}

// seal returns r as a row with owner and code.
func (s *sealer) seal(r sallyport.Record) Row {
	row := Row{Record: r, Owner: ownerOf(r)}
	row.MAC = s.sum(&row, nil)
	return row
}

// genuine reports whether the row is as it was sealed.
func (s *sealer) genuine(row *Row) bool {
	var sum [sha256.Size]byte
	return subtle.ConstantTimeCompare(s.sum(row, sum[:0]), row.MAC) == 1
}

func (s *sealer) sum(row *Row, dst []byte) []byte {
	buf := s.bufs.Get().(*[]byte)
	defer s.bufs.Put(buf)
	*buf = appendRow((*buf)[:0], row)
	h := s.hashes.Get().(hash.Hash)
	defer s.hashes.Put(h)
	h.Reset()
	h.Write(*buf)
	return h.Sum(dst)
}

// appendRow appends what the code covers. Each variable part stands behind its
// length, so that no two different rows have the same encoding.
func appendRow(b []byte, row *Row) []byte {
	b = appendPart(b, macLabel)
	b = appendPart(b, string(row.Kind))
	b = appendPart(b, row.ID)
	b = binary.BigEndian.AppendUint16(b, row.Version)
	b = binary.BigEndian.AppendUint64(b, uint64(row.Revision))
	var deleted byte
	if row.Deleted {
		deleted = 1
	}
	b = append(b, deleted)
	b = binary.BigEndian.AppendUint64(b, uint64(UnixNano(row.Expires)))
	b = appendPart(b, string(row.Owner.Login))
	b = appendPart(b, string(row.Owner.User))
	b = appendPart(b, string(row.Owner.Device))
	b = binary.BigEndian.AppendUint64(b, uint64(len(row.Payload)))
	return append(b, row.Payload...)
}

func appendPart(b []byte, s string) []byte {
	b = binary.BigEndian.AppendUint64(b, uint64(len(s)))
	return append(b, s...)
}

// ownerOf reads from the payload what a login or session hangs on. A payload
// that does not parse has no owner; Apply refuses such a one.
func ownerOf(r sallyport.Record) Owner {
	var o Owner
	if r.Deleted {
		return o
	}
	switch r.Kind {
	case sallyport.KindSession:
		var p struct {
			Login  sallyport.LoginID  `json:"login"`
			User   sallyport.UserID   `json:"user"`
			Device sallyport.DeviceID `json:"device"`
		}
		if json.Unmarshal(r.Payload, &p) == nil {
			o = Owner{p.Login, p.User, p.Device}
		}
	case sallyport.KindLogin:
		var p struct {
			User sallyport.UserID `json:"user"`
		}
		if json.Unmarshal(r.Payload, &p) == nil {
			o.User = p.User
		}
	}
	return o
}
