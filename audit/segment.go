package audit

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
)

// segments returns the first sequence numbers of dir's segments, in order.
func segments(dir string) ([]uint64, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var starts []uint64
	for _, e := range entries {
		if seq, ok := segmentStart(e.Name()); ok && e.Type().IsRegular() {
			starts = append(starts, seq)
		}
	}
	slices.Sort(starts)
	return starts, nil
}

// cursor reads a segment's lines, also while it grows.
type cursor struct {
	f      *os.File
	r      *bufio.Reader
	offset int64 // where the line that is being read starts

	text   []byte // of that line so far, at most maxLine bytes
	length int64  // of that line so far
}

func openSegment(dir string, start uint64) (*cursor, error) {
	f, err := os.Open(filepath.Join(dir, segmentName(start)))
	if err != nil {
		return nil, err
	}
	return &cursor{f: f, r: bufio.NewReaderSize(f, 64<<10)}, nil
}

func (c *cursor) Close() error { return c.f.Close() }

// next returns the next line without its newline, and where it starts. At the
// end of the file it returns io.EOF and keeps what is there of the last line:
// the next call goes on. The text is valid until that call.
func (c *cursor) next() (text []byte, offset int64, err error) {
	for {
		part, err := c.r.ReadSlice('\n')
		c.length += int64(len(part))
		c.text = append(c.text, part[:min(len(part), maxLine-len(c.text))]...)
		if errors.Is(err, bufio.ErrBufferFull) {
			continue
		}
		if err != nil {
			return nil, c.offset, err
		}
		text, offset = c.text[:min(len(c.text), int(c.length)-1)], c.offset
		c.offset += c.length
		c.text, c.length = c.text[:0], 0
		return text, offset, nil
	}
}

// Fault is the first thing wrong with a chain.
type Fault struct {
	// Sequence is the first bad line, or the first missing one.
	Sequence uint64
	// Until is set where only a signed head tells that something is wrong: the
	// first bad line is one from Sequence to Until.
	Until  uint64
	Reason string
}

func (f *Fault) Error() string {
	if f.Until > f.Sequence {
		return fmt.Sprintf("between sequence %d and %d: %s", f.Sequence, f.Until, f.Reason)
	}
	return fmt.Sprintf("sequence %d: %s", f.Sequence, f.Reason)
}

// walker checks lines one after the other. It is a machine without I/O.
type walker struct {
	genuine func(*Head) bool
	known   []Head // heads from elsewhere that the chain must contain

	sequence uint64 // of the last good line
	hash     string // its hash; "": not known, the first line says it
	records  uint64 // lines with a record
	head     Head   // the last one in the chain
	torn     []uint64

	bad *region // lines that do not parse, not accounted for yet
}

// region is bytes that are no line.
type region struct {
	offset int64
	reason error
}

// line checks the next line and returns it; nil for bytes that are no line, about
// which the next line or the end decides.
func (w *walker) line(text []byte, offset int64) (*line, error) {
	l, hash, err := parseLine(text)
	if err != nil {
		if w.bad == nil {
			w.bad = &region{offset, err}
		}
		return nil, nil
	}
	if w.bad != nil && l.Torn != offset-w.bad.offset {
		return nil, w.fault(w.bad.reason.Error())
	}
	if w.bad == nil && l.Torn != 0 {
		return nil, w.fault("the torn line before it is gone")
	}
	if l.Sequence != w.sequence+1 {
		return nil, w.fault(fmt.Sprintf("sequence %d stands in its place", l.Sequence))
	}
	if w.hash == "" {
		w.hash = l.Prev
	}
	if l.Prev != w.hash {
		return nil, w.fault("it does not follow the line before it")
	}
	if l.Head != nil {
		if err := w.checkHead(l.Head); err != nil {
			return nil, err
		}
	}
	w.accept(&l, hash)
	return &l, w.checkKnown()
}

func (w *walker) accept(l *line, hash string) {
	if l.Torn != 0 {
		w.torn = append(w.torn, l.Sequence)
	}
	if l.Record != nil {
		w.records++
	}
	w.sequence, w.hash, w.bad = l.Sequence, hash, nil
}

// checkHead checks a head that stands in the chain behind the last good line.
func (w *walker) checkHead(h *Head) error {
	ok := h.Sequence == w.sequence && h.Hash == w.hash && (w.head.Name == "" || w.head.Name == h.Name)
	if !ok || !w.genuine(h) {
		return &Fault{Sequence: w.head.Sequence + 1, Until: w.sequence, Reason: "the signed head does not match, the chain was written anew"}
	}
	w.head = *h
	return nil
}

// checkKnown compares the line just accepted with the heads from elsewhere.
func (w *walker) checkKnown() error {
	for i := range w.known {
		if h := &w.known[i]; h.Sequence == w.sequence && h.Hash != w.hash {
			return &Fault{Sequence: w.head.Sequence + 1, Until: w.sequence, Reason: "the kept head does not match, the chain was written anew"}
		}
	}
	return nil
}

// endSegment checks what stands behind a segment's last newline. Only the chain's
// last segment may end within a line; it returns how many bytes are cut off so.
func (w *walker) endSegment(c *cursor, last bool) (cut int64, err error) {
	if c.length > 0 {
		if _, err := w.line(c.text, c.offset); err != nil {
			return 0, err
		}
		if !last {
			return 0, w.fault("its segment is cut off")
		}
	}
	if w.bad == nil {
		return 0, nil
	}
	if c.length == 0 {
		return 0, w.fault(w.bad.reason.Error())
	}
	return c.offset + c.length - w.bad.offset, nil
}

func (w *walker) fault(reason string) error {
	return &Fault{Sequence: w.sequence + 1, Reason: reason}
}

// segments walks through the segments up to the last one and returns how that
// ends.
func (w *walker) segments(dir string, starts []uint64) (end tail, err error) {
	for i, start := range starts {
		if start != w.sequence+1 {
			return end, w.fault("its segment is gone")
		}
		if end, err = w.segment(dir, start, i == len(starts)-1); err != nil {
			return end, err
		}
	}
	return end, nil
}

// segment walks through one segment.
func (w *walker) segment(dir string, start uint64, last bool) (end tail, err error) {
	c, err := openSegment(dir, start)
	if errors.Is(err, fs.ErrNotExist) {
		return end, w.fault("its segment is gone")
	}
	if err != nil {
		return end, err
	}
	defer c.Close()
	for {
		text, offset, err := c.next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return end, err
		}
		if _, err := w.line(text, offset); err != nil {
			return end, err
		}
	}
	end.start, end.size = start, c.offset+c.length
	end.unterminated = c.length > 0
	end.cut, err = w.endSegment(c, last)
	return end, err
}

// tail is how a segment ends.
type tail struct {
	start        uint64
	size         int64
	cut          int64 // bytes at the end that are no line
	unterminated bool  // the last byte is no newline
}
