package cached

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"time"

	"sallyport"
)

// The codes of the rows show a row that was changed. They cannot show a row that
// was put back, code and all, as it stood some time ago: a session from before
// it was revoked. The head can: it holds the sum of all rows, and only who has
// the key can write it.

// sum adds up rows: for each of them a number that only the key can tell, modulo
// 2^256. Adding what is written and taking away what it replaces keeps the sum
// without reading everything (an incremental multiset hash: Clarke et al.,
// "Incremental Multiset Hash Functions and Their Application to Memory Integrity
// Checking", ASIACRYPT 2003, MSet-Add-Hash). The seal hides it, so that nobody
// learns which rows would add up to the same.
type sum [4]uint64

func (s *sum) add(t sum) {
	var carry uint64
	for i := range s {
		s[i], carry = bits.Add64(s[i], t[i], carry)
	}
}

func (s *sum) sub(t sum) {
	var borrow uint64
	for i := range s {
		s[i], borrow = bits.Sub64(s[i], t[i], borrow)
	}
}

// term is the row's share of the sum. A row whose code names no key of ours was
// never part of one.
func (s *sealer) term(row *Row) (t sum) {
	k := s.keyOf(row.MAC)
	if k == nil {
		return t
	}
	var digest [sha256.Size]byte
	k.terms.sum(digest[:0], row.MAC)
	for i := range t {
		t[i] = binary.LittleEndian.Uint64(digest[8*i:])
	}
	return t
}

const headLabel = "sallyport cached head v1"

// headData is what the seal covers beside the sum.
func headData(h *Head) []byte {
	b := appendPart(nil, headLabel)
	b = appendPart(b, string(h.Epoch))
	b = binary.BigEndian.AppendUint64(b, uint64(h.Revision))
	return binary.BigEndian.AppendUint64(b, uint64(h.Compacted))
}

// sealHead returns h with the seal over it and the sum.
func (s *sealer) sealHead(h Head, rows sum) Head {
	k := s.active
	nonce := make([]byte, k.head.NonceSize())
	rand.Read(nonce)
	var plain [sha256.Size]byte
	for i, w := range rows {
		binary.LittleEndian.PutUint64(plain[8*i:], w)
	}
	h.Seal = k.head.Seal(append(append([]byte(nil), k.id[:]...), nonce...), nonce, plain[:], headData(&h))
	return h
}

// openHead returns the sum that the head's seal holds. The head of an empty store
// has none.
func (s *sealer) openHead(h Head) (rows sum, err error) {
	if len(h.Seal) == 0 && h.Revision == 0 && h.Compacted == 0 {
		return rows, nil
	}
	k := s.keyOf(h.Seal)
	if k == nil {
		return rows, rolledBack(untrusted, errors.New("its head is sealed by another key"))
	}
	box := h.Seal[keyIDSize:]
	if len(box) < k.head.NonceSize() {
		return rows, rolledBack(untrusted, errors.New("the seal of its head is cut"))
	}
	n := k.head.NonceSize()
	plain, err := k.head.Open(nil, box[:n], box[n:], headData(&h))
	if err != nil || len(plain) != sha256.Size {
		return rows, rolledBack(untrusted, errors.New("the seal of its head does not fit"))
	}
	for i := range rows {
		rows[i] = binary.LittleEndian.Uint64(plain[8*i:])
	}
	return rows, nil
}

// codeRolledBack: the store is not what was written last.
const codeRolledBack = "storage.rolled_back"

// untrusted is what a head that nobody with the key has written makes of a store.
const untrusted = "the record store cannot be trusted"

// rolledBack refuses a store whose head or rows are not those that were written
// last: who was revoked since could be let in again.
func rolledBack(message string, cause error) *sallyport.Error {
	return &sallyport.Error{
		Outcome: sallyport.OutcomeUnavailable,
		Code:    codeRolledBack,
		Message: message,
		Hint:    "find out who changed it; then `sallyport restore --in-place --config FILE` takes it as it is and ends every session",
		Err:     cause,
	}
}

// Verifying a small store is part of the start; a larger one serves meanwhile.
const verifyFirst = time.Second

// verify adds up all rows and compares them with the head.
func (s *Server) verify(ctx context.Context) error {
	var want, got sum
	var seal *sealer
	err := s.store.Scan(ctx, Query{Tombstones: true}, func(h Head) (err error) {
		if err := s.keysFor(h, s.storedRing(ctx)); err != nil {
			return err
		}
		seal = s.sealer.Load()
		want, err = seal.openHead(h)
		return err
	}, func(row Row) error {
		got.add(seal.term(&row))
		return nil
	})
	if err != nil {
		return fmt.Errorf("verify: %w", err)
	}
	if got != want {
		return rolledBack("rows of the record store were put back, taken out or damaged", nil)
	}
	return nil
}
