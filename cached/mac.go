package cached

import (
	"crypto/cipher"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/binary"
	"encoding/json"
	"hash"
	"sync"

	"golang.org/x/crypto/chacha20poly1305"

	"sallyport"
	"sallyport/internal/keyring"
)

const (
	macLabel  = "sallyport cached row v1"
	keyIDSize = len(keyring.ID{})
	codeSize  = keyIDSize + sha256.Size
)

// sealer makes and checks the codes of rows and the seal of the head with the keys
// of one ring. It is never changed, and safe for concurrent use.
type sealer struct {
	ring   keyring.Ring
	active *rowKey
	keys   map[keyring.ID]*rowKey
	bufs   sync.Pool // of *[]byte
}

// rowKey is one key with what is derived from it: one key, one purpose.
type rowKey struct {
	id    keyring.ID
	codes hashes      // of rows
	terms hashes      // of the sum of rows
	head  cipher.AEAD // XChaCha20-Poly1305
}

// hashes is a pool of HMACs under one key.
type hashes struct{ pool sync.Pool }

func newSealer(ring keyring.Ring) (*sealer, error) {
	s := &sealer{
		ring: ring,
		keys: map[keyring.ID]*rowKey{},
		bufs: sync.Pool{New: func() any { return new([]byte) }},
	}
	for _, key := range ring.Keys() {
		k, err := newRowKey(key)
		if err != nil {
			return nil, err
		}
		s.keys[key.ID] = k
	}
	s.active = s.keys[ring.Active().ID]
	return s, nil
}

func newRowKey(key keyring.Key) (*rowKey, error) {
	derive := func(use string) []byte { return key.Secret.Derive("sallyport cached " + use + " v1") }
	head, err := chacha20poly1305.NewX(derive("head"))
	if err != nil {
		return nil, err
	}
	codes, terms := derive("row"), derive("sum")
	k := &rowKey{id: key.ID, head: head}
	k.codes.pool.New = func() any { return hmac.New(sha256.New, codes) }
	k.terms.pool.New = func() any { return hmac.New(sha256.New, terms) }
	return k, nil
}

// sum appends the HMAC of text to dst.
func (h *hashes) sum(dst, text []byte) []byte {
	m := h.pool.Get().(hash.Hash)
	defer h.pool.Put(m)
	m.Reset()
	m.Write(text)
	return m.Sum(dst)
}

// keyOf returns the key that the code of a row or a seal names; nil if it is none
// of ours.
func (s *sealer) keyOf(code []byte) *rowKey {
	if len(code) < keyIDSize {
		return nil
	}
	return s.keys[keyring.ID(code)]
}

// seal returns r as a row with owner and code.
func (s *sealer) seal(r sallyport.Record) Row {
	row := Row{Record: r, Owner: ownerOf(r)}
	row.MAC = s.code(s.active, &row, make([]byte, 0, codeSize))
	return row
}

// genuine reports whether the row is as it was sealed.
func (s *sealer) genuine(row *Row) bool {
	k := s.keyOf(row.MAC)
	if k == nil {
		return false
	}
	var code [codeSize]byte
	return subtle.ConstantTimeCompare(s.code(k, row, code[:0]), row.MAC) == 1
}

func (s *sealer) code(k *rowKey, row *Row, dst []byte) []byte {
	buf := s.bufs.Get().(*[]byte)
	defer s.bufs.Put(buf)
	*buf = appendRow((*buf)[:0], row)
	return k.codes.sum(append(dst, k.id[:]...), *buf)
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
