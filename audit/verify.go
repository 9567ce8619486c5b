package audit

import (
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// Report says what a chain that verifies holds.
type Report struct {
	Name    string // of the daemon
	Records uint64 // lines with a record; the others are heads
	Last    uint64 // the last sequence number; 0 in a chain without lines
	Signed  uint64 // the last sequence number below a signed head
	// Torn are the lines in front of which a daemon that died left part of a
	// line, which was never acknowledged.
	Torn []uint64
	// Truncated is how many bytes of such a part stand at the end, where no
	// daemon has been started since.
	Truncated int64
}

// ErrNoChain says that a directory holds no chain.
var ErrNoChain = errors.New("no audit chain here")

// Verify checks the chain in dir against the daemon's public key and against
// heads that were kept elsewhere, if there are any. The chain may be growing
// meanwhile. A *Fault names the first bad sequence number; ErrNoChain means that
// nothing was ever written; other errors mean that it could not be read.
func Verify(dir string, pub ed25519.PublicKey, kept ...Head) (Report, error) {
	head, err := readHead(dir) // before the lines: they may be more meanwhile
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return Report{}, err
	}
	starts, serr := segments(dir)
	if serr != nil {
		return Report{}, serr
	}
	if err != nil && len(starts) == 0 && len(kept) == 0 {
		return Report{}, fmt.Errorf("%s: %w", dir, ErrNoChain)
	}
	w := &walker{genuine: func(h *Head) bool { return h.Genuine(pub) }, hash: genesis, known: kept}
	if err == nil {
		w.known = append([]Head{head}, kept...)
	}
	report, verr := w.verify(dir, starts)
	if verr == nil && err != nil {
		verr = w.fault("head.json is gone, nothing says that the chain ends here")
	}
	return report, verr
}

func (w *walker) verify(dir string, starts []uint64) (r Report, err error) {
	for i := range w.known {
		if h := &w.known[i]; !w.genuine(h) {
			return r, &Fault{Sequence: 1, Until: h.Sequence, Reason: "the last head is not signed by this key"}
		}
	}
	end, err := w.segments(dir, starts)
	if err != nil {
		return r, err
	}
	r.Truncated = end.cut
	r.Name, r.Records, r.Last, r.Torn, r.Signed = w.head.Name, w.records, w.sequence, w.torn, w.head.Sequence
	for i := range w.known {
		h := &w.known[i]
		if h.Sequence > w.sequence {
			return r, w.fault(fmt.Sprintf("the end is cut off, the signed head says %d", h.Sequence))
		}
		r.Name, r.Signed = h.Name, max(r.Signed, h.Sequence)
	}
	return r, nil
}

const headFile = "head.json"

func readHead(dir string) (h Head, err error) {
	text, err := os.ReadFile(filepath.Join(dir, headFile))
	if err != nil {
		return h, err
	}
	if err := json.Unmarshal(text, &h); err != nil {
		return h, &Fault{Sequence: 1, Reason: fmt.Sprintf("head.json is damaged: %v", err)}
	}
	return h, nil
}
