package audit

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"time"

	"sallyport"
)

const (
	// maxLine bounds a line, in bytes with its newline.
	maxLine = 1 << 20

	hashLength = 2 * sha256.Size
	suffixHead = `,"hash":"`
	suffixSize = len(suffixHead) + hashLength + len(`"}`)
)

// genesis is the prev of sequence 1.
var genesis = hashOf([]byte("sallyport audit chain v1"))

func hashOf(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// Head says how far a chain goes. Signed by the daemon's audit key it proves
// that the lines up to Sequence were there.
type Head struct {
	Name     string    `json:"name"`
	Sequence uint64    `json:"seq"`
	Hash     string    `json:"hash"` // of the line with that sequence
	Time     time.Time `json:"time"`
	// Signature is Ed25519 over the other fields; see statement.
	Signature []byte `json:"sig"`
}

// statement is what a head's signature covers.
func (h *Head) statement() []byte {
	return fmt.Appendf(nil, "sallyport audit head v1\n%q\n%d\n%s\n%d\n", h.Name, h.Sequence, h.Hash, h.Time.UnixNano())
}

func (h *Head) sign(key ed25519.PrivateKey) { h.Signature = ed25519.Sign(key, h.statement()) }

// Genuine reports whether pub's holder signed the head.
func (h *Head) Genuine(pub ed25519.PublicKey) bool {
	return len(pub) == ed25519.PublicKeySize && ed25519.Verify(pub, h.statement(), h.Signature)
}

// line is one line of a segment, without its hash, as it is read.
type line struct {
	Sequence uint64 `json:"seq"`
	Prev     string `json:"prev"`
	// UpMS is how long the daemon had been up, in milliseconds, by a clock that
	// is not set back.
	UpMS int64 `json:"up_ms"`
	// Torn is how many bytes before this line were left by a daemon that died
	// while writing; 0 for every line that is not the first after such an end.
	Torn   int64                  `json:"torn,omitempty"`
	Record *sallyport.AuditRecord `json:"record,omitempty"`
	Head   *Head                  `json:"head,omitempty"`
}

// place is where a line stands: everything but its content.
type place struct {
	sequence uint64
	prev     string
	up       time.Duration
	torn     int64
}

// appendLine appends the text of a line with hash and newline, and returns the
// hash. content is the JSON of what field ("record" or "head") holds.
func appendLine(dst []byte, p place, field string, content []byte) (text []byte, hash string, err error) {
	start := len(dst)
	dst = append(dst, `{"seq":`...)
	dst = strconv.AppendUint(dst, p.sequence, 10)
	dst = append(dst, `,"prev":"`...)
	dst = append(dst, p.prev...)
	dst = append(dst, `","up_ms":`...)
	dst = strconv.AppendInt(dst, p.up.Milliseconds(), 10)
	if p.torn != 0 {
		dst = append(dst, `,"torn":`...)
		dst = strconv.AppendInt(dst, p.torn, 10)
	}
	dst = append(append(append(dst, `,"`...), field...), `":`...)
	dst = append(dst, content...)
	if n := len(dst) - start + suffixSize + 1; n > maxLine {
		return nil, "", fmt.Errorf("the record makes a line of %d bytes, %d are allowed", n, maxLine)
	}
	hash = hashOf(dst[start:])
	dst = append(append(append(dst, suffixHead...), hash...), "\"}\n"...)
	return dst, hash, nil
}

// parseLine is the way back from appendLine; text has no newline. It accepts
// exactly what hashes to its own hash, and says nothing about the chain.
func parseLine(text []byte) (l line, hash string, err error) {
	if len(text) <= suffixSize || len(text) >= maxLine {
		return l, "", errors.New("not a line of an audit chain")
	}
	body, suffix := text[:len(text)-suffixSize], text[len(text)-suffixSize:]
	if !bytes.HasPrefix(suffix, []byte(suffixHead)) || !bytes.HasSuffix(suffix, []byte(`"}`)) {
		return l, "", errors.New("the line has no hash")
	}
	hash = string(suffix[len(suffixHead) : len(suffixHead)+hashLength])
	if hash != hashOf(body) {
		return l, "", errors.New("the line does not match its hash")
	}
	if err := json.Unmarshal(append(bytes.Clone(body), '}'), &l); err != nil {
		return l, "", fmt.Errorf("the line is not JSON: %w", err)
	}
	if (l.Record == nil) == (l.Head == nil) || l.Sequence == 0 || l.Torn < 0 {
		return l, "", errors.New("the line holds neither record nor head")
	}
	return l, hash, nil
}

// segmentName returns the file name of the segment that starts at seq.
func segmentName(seq uint64) string { return fmt.Sprintf("%020d.jsonl", seq) }

// segmentStart is the way back from segmentName.
func segmentStart(name string) (uint64, bool) {
	if len(name) != len("00000000000000000001.jsonl") || name[20:] != ".jsonl" {
		return 0, false
	}
	seq, err := strconv.ParseUint(name[:20], 10, 64)
	return seq, err == nil && seq > 0 && segmentName(seq) == name
}
