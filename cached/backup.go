package cached

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"time"

	"sallyport"
	"sallyport/internal/keyring"
)

// A backup is a scan of the whole store, written down: a line that says what it
// is, and frames of a type, a length and a body. The first frame tells the head,
// the last one how many rows stand between and the SHA-256 of everything before.
// Rows stand there with their codes, as they are stored, so a backup needs no key
// to be made, holds nothing in plain that the store does not, and fits every
// engine.
const (
	backupMagic   = "sallyport backup\n"
	backupVersion = 1

	frameHead byte = 'H' // backupHead
	frameRow  byte = 'R' // appendBackupRow
	frameEnd  byte = 'E' // backupEnd

	// maxFrame bounds a body: the largest payload, and what is said about it.
	maxFrame = MaxPayload + 64<<10
)

// BackupInfo is what a backup says about itself.
type BackupInfo struct {
	Made time.Time
	// Head is that of the store at the instant of the backup.
	Head Head
	Rows int // tombstones included
	// Damaged counts the rows whose code does not fit: they counted as missing in
	// the store, too.
	Damaged int
}

type backupHead struct {
	Version   int                `json:"version"`
	Made      time.Time          `json:"made"`
	Epoch     sallyport.Epoch    `json:"epoch"`
	Revision  sallyport.Revision `json:"revision"`
	Compacted sallyport.Revision `json:"compacted"`
	Seal      []byte             `json:"seal"`
}

type backupEnd struct {
	Rows   int    `json:"rows"`
	SHA256 []byte `json:"sha256"`
}

// Backup implements sallyport.Backuper. Writers go on meanwhile.
func (s *Server) Backup(ctx context.Context, w io.Writer) error {
	if err := s.Ready(); err != nil {
		return err
	}
	b := &backupWriter{hash: sha256.New()}
	b.out = bufio.NewWriterSize(w, 256<<10)
	err := s.store.Scan(ctx, Query{Tombstones: true},
		func(h Head) error { return b.begin(h, s.clock.now()) },
		func(row Row) error { return b.row(&row) })
	if err == nil {
		err = b.end()
	}
	if err != nil {
		return fmt.Errorf("backup: %w", s.check(err))
	}
	return nil
}

// backupWriter writes the frames of one backup.
type backupWriter struct {
	out  *bufio.Writer
	hash hash.Hash
	rows int
	body []byte // reused
}

func (b *backupWriter) begin(h Head, now time.Time) error {
	if err := b.write([]byte(backupMagic)); err != nil {
		return err
	}
	return b.json(frameHead, backupHead{backupVersion, now.UTC(), h.Epoch, h.Revision, h.Compacted, h.Seal})
}

func (b *backupWriter) row(row *Row) error {
	b.rows++
	b.body = appendBackupRow(b.body[:0], row)
	return b.frame(frameRow, b.body)
}

func (b *backupWriter) end() error {
	if err := b.json(frameEnd, backupEnd{b.rows, b.hash.Sum(nil)}); err != nil {
		return err
	}
	return b.out.Flush()
}

func (b *backupWriter) json(kind byte, v any) error {
	text, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return b.frame(kind, text)
}

func (b *backupWriter) frame(kind byte, body []byte) error {
	if err := b.write(binary.BigEndian.AppendUint32([]byte{kind}, uint32(len(body)))); err != nil {
		return err
	}
	return b.write(body)
}

func (b *backupWriter) write(text []byte) error {
	b.hash.Write(text)
	_, err := b.out.Write(text)
	return err
}

// ReadBackup calls begin with the head and each for every row, and returns once
// it has seen that the backup is whole. It knows no key: whether the rows are
// genuine is for VerifyBackup. Errors: backup.damaged, backup.too_new, and those
// of begin and each.
func ReadBackup(r io.Reader, begin func(BackupInfo) error, each func(Row) error) error {
	b := &backupReader{in: bufio.NewReaderSize(r, 256<<10), hash: sha256.New()}
	magic := make([]byte, len(backupMagic))
	if _, err := io.ReadFull(b, magic); err != nil || string(magic) != backupMagic {
		return damagedBackup("it is not a backup of Sallyport", err)
	}
	info, err := b.head()
	if err != nil {
		return err
	}
	if err := begin(info); err != nil {
		return err
	}
	for rows := 0; ; rows++ {
		sum := b.hash.Sum(nil)
		kind, body, err := b.frame()
		switch {
		case err != nil:
			return err
		case kind == frameEnd:
			return b.end(body, rows, sum)
		case kind != frameRow:
			return damagedBackup(fmt.Sprintf("frame %d is of an unknown kind", rows+1), nil)
		}
		row, err := parseBackupRow(body)
		if err != nil {
			return damagedBackup(fmt.Sprintf("row %d cannot be read", rows+1), err)
		}
		if err := each(row); err != nil {
			return err
		}
	}
}

// WrappedBy returns the id of the key-encryption key that the rows of a backup are
// useless without, if row is the one that says so.
func WrappedBy(row Row) (id keyring.ID, ok bool) {
	if row.Key() != ringKey {
		return id, false
	}
	about, err := keyring.Describe(row.Payload, ringPurpose)
	return about.KEK, err == nil
}

// backupReader reads the frames of one backup.
type backupReader struct {
	in   *bufio.Reader
	hash hash.Hash
}

// Read implements io.Reader; what is read is summed.
func (b *backupReader) Read(p []byte) (int, error) {
	n, err := b.in.Read(p)
	b.hash.Write(p[:n])
	return n, err
}

func (b *backupReader) frame() (kind byte, body []byte, err error) {
	var start [5]byte
	if _, err := io.ReadFull(b, start[:]); err != nil {
		return 0, nil, damagedBackup("it is cut off", err)
	}
	size := binary.BigEndian.Uint32(start[1:])
	if size > maxFrame {
		return 0, nil, damagedBackup(fmt.Sprintf("a frame says that it has %d bytes", size), nil)
	}
	var buf bytes.Buffer // grows with what is really there
	if _, err := io.CopyN(&buf, b, int64(size)); err != nil {
		return 0, nil, damagedBackup("it is cut off", err)
	}
	return start[0], buf.Bytes(), nil
}

func (b *backupReader) head() (BackupInfo, error) {
	kind, body, err := b.frame()
	if err != nil {
		return BackupInfo{}, err
	}
	var h backupHead
	if kind != frameHead || json.Unmarshal(body, &h) != nil || h.Version < 1 || h.Epoch == "" {
		return BackupInfo{}, damagedBackup("its head cannot be read", nil)
	}
	if h.Version > backupVersion {
		return BackupInfo{}, &sallyport.Error{
			Outcome: sallyport.OutcomeUsage,
			Code:    "backup.too_new",
			Message: fmt.Sprintf("the backup has format %d, this version knows %d", h.Version, backupVersion),
			Hint:    "use the version that made it, or a newer one",
		}
	}
	return BackupInfo{Made: h.Made, Head: Head{Epoch: h.Epoch, Revision: h.Revision, Compacted: h.Compacted, Seal: h.Seal}}, nil
}

// end compares the last frame, to the letter, with what was read before it.
func (b *backupReader) end(body []byte, rows int, sum []byte) error {
	want, err := json.Marshal(backupEnd{rows, sum})
	if err != nil {
		return err
	}
	if !bytes.Equal(body, want) {
		return damagedBackup("its checksum does not fit", nil)
	}
	if _, err := b.in.ReadByte(); !errors.Is(err, io.EOF) {
		return damagedBackup("something follows its end", err)
	}
	return nil
}

func damagedBackup(what string, cause error) error {
	if errors.Is(cause, io.EOF) || errors.Is(cause, io.ErrUnexpectedEOF) {
		cause = nil // what says it already
	}
	return &sallyport.Error{
		Outcome: sallyport.OutcomeInternal,
		Code:    "backup.damaged",
		Message: "the backup is damaged: " + what,
		Hint:    "take another one; `sallyport backup verify FILE --config FILE` says whether a backup is good",
		Err:     cause,
	}
}

// appendBackupRow appends a row; each variable part stands behind its length.
func appendBackupRow(b []byte, row *Row) []byte {
	part := func(s []byte) {
		b = binary.AppendUvarint(b, uint64(len(s)))
		b = append(b, s...)
	}
	part([]byte(row.Kind))
	part([]byte(row.ID))
	b = binary.AppendUvarint(b, uint64(row.Version))
	b = binary.AppendUvarint(b, uint64(row.Revision))
	deleted := byte(0)
	if row.Deleted {
		deleted = 1
	}
	b = append(b, deleted)
	b = binary.AppendVarint(b, UnixNano(row.Expires))
	part([]byte(row.Owner.Login))
	part([]byte(row.Owner.User))
	part([]byte(row.Owner.Device))
	part(row.Payload)
	part(row.MAC)
	return b
}

var errBackupRow = errors.New("cut off, or too long")

// parseBackupRow is the way back from appendBackupRow. The row keeps no part of b.
func parseBackupRow(b []byte) (row Row, err error) {
	number := func() (v uint64) {
		v, n := binary.Uvarint(b)
		if n <= 0 {
			err, b = errBackupRow, nil
			return 0
		}
		b = b[n:]
		return v
	}
	part := func() []byte {
		n := number()
		if n > uint64(len(b)) {
			err, b = errBackupRow, nil
			return nil
		}
		p := b[:n:n]
		b = b[n:]
		return p
	}
	row.Kind = sallyport.Kind(part())
	row.ID = string(part())
	version := number()
	row.Version = uint16(version)
	row.Revision = sallyport.Revision(number())
	deleted := number()
	row.Deleted = deleted == 1
	expires, n := binary.Varint(b)
	if n <= 0 {
		return Row{}, errBackupRow
	}
	b = b[n:]
	row.Expires = FromUnixNano(expires)
	row.Owner = Owner{sallyport.LoginID(part()), sallyport.UserID(part()), sallyport.DeviceID(part())}
	row.Payload = bytes.Clone(part())
	if len(row.Payload) == 0 {
		row.Payload = nil
	}
	row.MAC = bytes.Clone(part())
	if err != nil || len(b) > 0 || version > 1<<16-1 || deleted > 1 {
		return Row{}, errBackupRow
	}
	return row, nil
}
