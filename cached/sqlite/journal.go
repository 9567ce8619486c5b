package sqlite

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"sallyport"
	"sallyport/cached"
	"sallyport/cached/internal/marker"
	"sallyport/internal/keyring"
)

// The journal has every ending, flushed before the commit that carries it out, so
// that a backup of an earlier day can be restored without letting anybody back in
// when the database is lost. It owns all of its blocks from the start and never
// grows.
//
// It is two halves that are filled in turn. A half begins with its header, twice,
// so that no single damage hides it; groups of endings follow, each behind a mark
// and its length and closed by a code over the header, its place and its content.
// A group whose code does not fit was not finished when the power failed if it is
// the last one; if another good one follows, the half is damaged.
const (
	journalSuffix = ".journal"
	journalSize   = 16 << 20

	headerMagic = "SLPTJRN1"
	headerSize  = 512
	secondCopy  = 4096 // of the header, in its half
	groupsAt    = 2 * secondCopy

	groupMagic = "SLPG"
	groupStart = len(groupMagic) + 4 // with the length of what is between it and the code

	journalPurpose = "sallyport cached journal v1"
)

// journal is the open journal. Whoever holds the store's writeMu has it.
type journal struct {
	f    *os.File
	size int64 // of a half
	side int64 // the half that is written: 0, 1
	half
}

// half is what is known of one of the halves.
type half struct {
	header
	key   []byte            // of its codes
	code  [sha256.Size]byte // of its header
	end   int64             // of its groups
	ended []cached.Ending
	// reached is the revision of the last change that ended something.
	reached sallyport.Revision
}

type header struct {
	sequence uint64
	epoch    sallyport.Epoch
	// after is the revision above which the half has every ending, if it is the last.
	after sallyport.Revision
}

func journalKeys(key keyring.KEK) (keys [][]byte) {
	for _, secret := range key.Legacy() {
		keys = append(keys, secret.Derive(journalPurpose))
	}
	if len(keys) == 0 {
		keys = append(keys, nil) // the codes are then checksums
	}
	return keys
}

// ReadJournal returns what the journal of the store at path says. The store need not
// be there, nor be closed. key is the one in Config. Errors: journal.damaged, also if
// another key wrote it; one that wraps fs.ErrNotExist if there is none.
func ReadJournal(path string, key keyring.KEK) (cached.Journal, error) {
	f, err := os.Open(path + journalSuffix)
	if err != nil {
		return cached.Journal{}, fmt.Errorf("read journal: %w", err)
	}
	defer f.Close()
	_, says, err := readJournal(f, journalKeys(key))
	if err != nil {
		return cached.Journal{}, fmt.Errorf("read journal: %w", err)
	}
	return says, nil
}

// readJournal returns the journal as it is to be continued, and what it says.
func readJournal(f *os.File, keys [][]byte) (j *journal, says cached.Journal, err error) {
	info, err := f.Stat()
	if err != nil {
		return nil, says, err
	}
	if info.Size() < 4*groupsAt || info.Size() > journalSize || info.Size()%2 != 0 {
		return nil, says, damagedJournal(errors.New("it has another size"))
	}
	text, err := io.ReadAll(io.NewSectionReader(f, 0, info.Size()))
	if err != nil {
		return nil, says, err
	}
	size := len(text) / 2
	newest, errNewest := parseHalf(text[:size], keys)
	oldest, errOldest := parseHalf(text[size:], keys)
	j = &journal{f: f, size: int64(size)}
	if oldest.sequence > newest.sequence {
		j.side = 1
		newest, oldest = oldest, newest
		errNewest, errOldest = errOldest, errNewest
	}
	if errNewest != nil {
		return nil, says, damagedJournal(errNewest)
	}
	if newest.sequence == 0 {
		return nil, says, damagedJournal(errors.New("it has no header under this key"))
	}
	says = cached.Journal{Epoch: newest.epoch, After: newest.after, Reached: newest.reached, Ended: newest.ended}
	if errOldest == nil && newest.follows(&oldest) {
		says.After, says.Ended = oldest.after, append(oldest.ended, newest.ended...)
	}
	newest.ended = nil
	j.half = newest
	return j, says, nil
}

// follows reports whether nothing is missing between the halves.
func (h *half) follows(before *half) bool {
	return before.sequence != 0 && before.sequence == h.sequence-1 && before.epoch == h.epoch && before.reached == h.after
}

func damagedJournal(cause error) error {
	return &sallyport.Error{
		Outcome: sallyport.OutcomeInternal,
		Code:    "journal.damaged",
		Message: "the journal of revocations is damaged, or was written under another records key",
		Hint:    "restore without it: every session ends then",
		Err:     cause,
	}
}

// parseHalf reads a half. One without a header has sequence 0.
func parseHalf(b []byte, keys [][]byte) (h half, err error) {
	for _, at := range []int{0, secondCopy} {
		for _, key := range keys {
			if c, ok := parseHeader(b[at:at+headerSize], key); ok && c.sequence > h.sequence {
				h = c
			}
		}
	}
	if h.sequence == 0 {
		return h, nil
	}
	h.end, h.reached = groupsAt, h.after
	for {
		body, ok := h.group(b, int(h.end))
		if !ok {
			break
		}
		if err := h.take(body); err != nil {
			return h, err
		}
		h.end += groupLength(len(body))
	}
	if at, found := h.next(b, int(h.end)+1); found {
		return h, fmt.Errorf("a group before offset %d cannot be read", at)
	}
	return h, nil
}

// next finds a good group from an offset on.
func (h *half) next(b []byte, from int) (at int, found bool) {
	for at = from; at < len(b); at++ {
		i := bytes.Index(b[at:], []byte(groupMagic))
		if i < 0 {
			return 0, false
		}
		at += i
		if _, ok := h.group(b, at); ok {
			return at, true
		}
	}
	return 0, false
}

// group returns what is in the group at an offset of the half.
func (h *half) group(b []byte, at int) (body []byte, ok bool) {
	if len(b)-at < groupStart+sha256.Size || string(b[at:at+len(groupMagic)]) != groupMagic {
		return nil, false
	}
	n := int64(binary.BigEndian.Uint32(b[at+len(groupMagic):]))
	if n > int64(len(b)-at-groupStart-sha256.Size) {
		return nil, false
	}
	body, b = b[at+groupStart:at+groupStart+int(n)], b[at+groupStart+int(n):]
	return body, hmac.Equal(b[:sha256.Size], h.codeOf(int64(at), body))
}

func groupLength(body int) int64 { return int64(groupStart + body + sha256.Size) }

// codeOf is the code of a group.
func (h *half) codeOf(at int64, body []byte) []byte {
	mac := hmac.New(sha256.New, h.key)
	mac.Write(h.code[:])
	mac.Write(binary.BigEndian.AppendUint64(nil, uint64(at)))
	mac.Write(body)
	return mac.Sum(nil)
}

// take takes in the endings of a group.
func (h *half) take(body []byte) error {
	p := parser{b: body}
	h.reached = sallyport.Revision(p.number())
	for n := p.number(); n > 0 && !p.failed; n-- {
		var e cached.Ending
		e.Kind, e.ID = sallyport.Kind(p.part()), string(p.part())
		e.Revision, e.Marked = sallyport.Revision(p.number()), p.number() == 1
		h.ended = append(h.ended, e)
	}
	if p.failed || len(p.b) > 0 {
		return errors.New("a group cannot be read")
	}
	return nil
}

// appendGroup is the way back from take.
func appendGroup(b []byte, reached sallyport.Revision, ended []cached.Ending) []byte {
	b = binary.AppendUvarint(b, uint64(reached))
	b = binary.AppendUvarint(b, uint64(len(ended)))
	for _, e := range ended {
		for _, s := range []string{string(e.Kind), e.ID} {
			b = append(binary.AppendUvarint(b, uint64(len(s))), s...)
		}
		marked := byte(0)
		if e.Marked {
			marked = 1
		}
		b = append(binary.AppendUvarint(b, uint64(e.Revision)), marked)
	}
	return b
}

// parser takes numbers and parts off the front of b.
type parser struct {
	b      []byte
	failed bool
}

func (p *parser) number() uint64 {
	v, n := binary.Uvarint(p.b)
	if n <= 0 {
		p.b, p.failed = nil, true
		return 0
	}
	p.b = p.b[n:]
	return v
}

func (p *parser) part() (s []byte) {
	n := p.number()
	if n > uint64(len(p.b)) {
		p.b, p.failed = nil, true
		return nil
	}
	s, p.b = p.b[:n], p.b[n:]
	return s
}

// appendHeader returns a header in its size. The random part makes its code, and
// with it those of the groups, unlike any before.
func appendHeader(h header, key []byte) []byte {
	b := append(make([]byte, 0, headerSize), headerMagic...)
	b = binary.BigEndian.AppendUint64(b, h.sequence)
	b = binary.BigEndian.AppendUint64(b, uint64(h.after))
	b = binary.AppendUvarint(b, uint64(len(h.epoch)))
	b = append(b, h.epoch...)
	b = append(b, rand.Text()...)
	b = append(b, make([]byte, headerSize-sha256.Size-len(b))...)
	mac := hmac.New(sha256.New, key)
	mac.Write(b)
	return mac.Sum(b)
}

func parseHeader(b, key []byte) (h half, ok bool) {
	said, code := b[:headerSize-sha256.Size], b[headerSize-sha256.Size:]
	mac := hmac.New(sha256.New, key)
	mac.Write(said)
	if string(said[:len(headerMagic)]) != headerMagic || !hmac.Equal(code, mac.Sum(nil)) {
		return h, false
	}
	h.key, h.code = key, [sha256.Size]byte(code)
	said = said[len(headerMagic):]
	h.sequence = binary.BigEndian.Uint64(said)
	h.after = sallyport.Revision(binary.BigEndian.Uint64(said[8:]))
	p := parser{b: said[16:]}
	h.epoch = sallyport.Epoch(p.part())
	return h, !p.failed
}

// openJournal continues the journal at path. One that is missing, damaged or of
// another history begins anew with what comes after head; the error says why, and
// there is a journal unless j is nil.
func openJournal(path string, size int64, keys [][]byte, head cached.Head) (*journal, error) {
	j, err := continueJournal(path, keys, head.Epoch)
	if j != nil {
		return j, nil
	}
	j, failed := createJournal(path, size, keys[0], head)
	return j, errors.Join(err, failed)
}

// continueJournal returns the journal at path, or nil if there is none to go on with.
func continueJournal(path string, keys [][]byte, epoch sallyport.Epoch) (j *journal, err error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	j, _, err = readJournal(f, keys)
	if err == nil && j.epoch == epoch && !bytes.Equal(j.key, keys[0]) {
		err = j.turn(keys[0], j.reached)
	}
	if err != nil || j.epoch != epoch {
		return nil, errors.Join(err, f.Close())
	}
	return j, nil
}

// createJournal puts an empty journal down, whole, in the place of any other.
func createJournal(path string, size int64, key []byte, head cached.Head) (j *journal, err error) {
	tmp := path + ".new"
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_TRUNC|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			j, err = nil, errors.Join(err, f.Close(), remove(tmp))
		}
	}()
	// Blocks that were written once are flushed in half the time of reserved ones.
	if _, err := f.WriteAt(make([]byte, size), 0); err != nil {
		return nil, err
	}
	j = &journal{f: f, size: size / 2, side: 1}
	j.epoch = head.Epoch
	if err := errors.Join(j.turn(key, head.Revision), f.Sync()); err != nil {
		return nil, err
	}
	if err := os.Rename(tmp, path); err != nil {
		return nil, err
	}
	return j, marker.SyncDir(filepath.Dir(path))
}

// turn begins the other half.
func (j *journal) turn(key []byte, after sallyport.Revision) error {
	next := header{sequence: j.sequence + 1, epoch: j.epoch, after: after}
	text := appendHeader(next, key)
	j.side = 1 - j.side
	for _, at := range []int64{0, secondCopy} {
		if err := j.write(text, at); err != nil {
			return err
		}
	}
	j.half = half{header: next, key: key, end: groupsAt, reached: after}
	j.code = [sha256.Size]byte(text[headerSize-sha256.Size:])
	return nil
}

// add makes endings durable.
func (j *journal) add(reached sallyport.Revision, ended []cached.Ending) error {
	b := append([]byte(groupMagic), 0, 0, 0, 0)
	b = appendGroup(b, reached, ended)
	body := b[groupStart:]
	binary.BigEndian.PutUint32(b[len(groupMagic):], uint32(len(body)))
	n := groupLength(len(body))
	if n > j.size-groupsAt { // it holds no half of them: it begins anew behind them
		return j.turn(j.key, reached)
	}
	if j.end+n > j.size {
		if err := j.turn(j.key, j.reached); err != nil {
			return err
		}
	}
	if err := j.write(append(b, j.codeOf(j.end, body)...), j.end); err != nil {
		return err
	}
	j.end += n
	j.reached = reached
	return nil
}

// write makes text durable at an offset of the half.
func (j *journal) write(text []byte, at int64) error {
	if _, err := j.f.WriteAt(text, j.side*j.size+at); err != nil {
		return err
	}
	return flush(j.f)
}

// checkKey refuses a key that is not this store's, before the journal that it cannot
// read is taken for damaged and begun anew.
func (s *Store) checkKey(key keyring.KEK) error {
	if key.IsZero() {
		return nil
	}
	return cached.CheckKEK(context.Background(), s, key)
}

// openJournal opens the store's journal. A store without one works, but nobody can
// tell which sessions of a backup still count.
func (s *Store) openJournal() {
	if s.journalSize == 0 {
		return
	}
	s.closeJournal()
	var err error
	s.journal, err = openJournal(s.path+journalSuffix, s.journalSize, s.journalKeys, *s.head.Load())
	switch {
	case s.journal == nil:
		s.log.Error("there is no journal of revocations: to restore a backup will end every session", "error", errors.Join(err, s.dropJournal()))
	case err != nil:
		s.log.Error("the journal of revocations begins anew", "error", err)
	}
}

// SetJournalKey has the journal of revocations go on under another key; see
// Config.JournalKey. What it says so far an older key of it must open.
func (s *Store) SetJournalKey(key keyring.KEK) error {
	s.writeMu.Lock()
	defer s.writeMu.Unlock()
	s.journalKeys = journalKeys(key)
	if s.journal == nil || bytes.Equal(s.journal.key, s.journalKeys[0]) {
		return nil
	}
	return s.withoutJournal(s.journal.turn(s.journalKeys[0], s.journal.reached))
}

// writeDown makes what a change ends durable in the journal. A revocation happens
// even where that fails; but then no journal may say that it is complete.
func (s *Store) writeDown(c *cached.Change) error {
	if s.journal == nil || len(c.Ended) == 0 {
		return nil
	}
	return s.withoutJournal(s.journal.add(c.Head.Revision, c.Ended))
}

// withoutJournal goes on without the journal after a failed write of it.
func (s *Store) withoutJournal(err error) error {
	if err == nil {
		return nil
	}
	s.closeJournal()
	if gone := s.dropJournal(); gone != nil {
		return fmt.Errorf("%w: journal of revocations: %w", cached.ErrBroken, errors.Join(err, gone))
	}
	s.log.Error("the journal of revocations could not be written and is gone: until cached starts again, to restore a backup will end every session", "error", err)
	return nil
}

// dropJournal takes the journal away for good.
func (s *Store) dropJournal() error {
	if err := remove(s.path + journalSuffix); err != nil {
		return err
	}
	return marker.SyncDir(filepath.Dir(s.path))
}

func (s *Store) closeJournal() {
	if s.journal != nil {
		s.journal.f.Close() // everything in it is flushed
		s.journal = nil
	}
}
