package sqlite_test

import (
	"bufio"
	"encoding/hex"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// A trace is what a helper did to its files, in order, as strace saw it. Replaying
// it onto a disk that keeps only what was flushed gives every state in which the
// machine could have lost its power.

// change is one step of a trace.
type change struct {
	kind  changeKind
	name  string // of the file, or of what was acknowledged
	to    string // the new name
	off   int64  // of a write; the new size of a cut
	bytes []byte

	node *node // the file meant, once replayed
}

type changeKind string

const (
	create   changeKind = "create"
	write    changeKind = "write"
	truncate changeKind = "cut"
	link     changeKind = "link"
	rename   changeKind = "rename"
	remove   changeKind = "remove"
	flush    changeKind = "flush"
	ack      changeKind = "ack"
)

func (c change) String() string {
	return fmt.Sprintf("%s %s %s at %d, %d bytes", c.kind, filepath.Base(c.name), filepath.Base(c.to), c.off, len(c.bytes))
}

// traced are the calls that change files or tell what was acknowledged.
const traced = "openat,pwrite64,write,ftruncate,fsync,fdatasync,rename,renameat,renameat2,link,linkat,unlink,unlinkat"

// record runs a helper under strace and returns what it did in path's directory.
func record(t *testing.T, name, path string) []change {
	t.Helper()
	log := filepath.Join(t.TempDir(), "trace")
	cmd := helper(t, name, path, "strace", "-f", "-qq", "-y", "-xx", "-s", "100000", "-e", "signal=none", "-e", "trace="+traced, "-o", log)
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	f, err := os.Open(log)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var trace []change
	halves := map[string]string{} // calls that another thread's came between, by thread
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 16<<20)
	for lines.Scan() {
		thread, line, _ := strings.Cut(lines.Text(), " ")
		line = strings.TrimLeft(line, " ")
		if half, ok := strings.CutSuffix(line, " <unfinished ...>"); ok {
			halves[thread] = half
			continue
		}
		if _, rest, ok := strings.Cut(line, " resumed>"); ok && strings.HasPrefix(line, "<... ") {
			line = halves[thread] + rest
		}
		c, ok := parseCall(t, line)
		if ok && (c.kind == ack || strings.HasPrefix(c.name, filepath.Dir(path)) && !strings.HasSuffix(c.name, "-shm")) {
			trace = append(trace, c)
		}
	}
	if err := lines.Err(); err != nil || len(trace) == 0 {
		t.Fatalf("the trace has %d steps, %v", len(trace), err)
	}
	return trace
}

var (
	callForm   = regexp.MustCompile(`^(\w+)\((.*)\) += (\d+)`)
	quotedForm = regexp.MustCompile(`"((?:\\x[0-9a-f]{2})*)"`)
	openForm   = regexp.MustCompile(`^\d+<((?:\\x[0-9a-f]{2})*)>`) // a file descriptor, with its path
	numberForm = regexp.MustCompile(`, (\d+)$`)
)

// parseCall returns what a call that succeeded has changed.
func parseCall(t *testing.T, line string) (c change, ok bool) {
	t.Helper()
	m := callForm.FindStringSubmatch(line)
	if m == nil {
		return c, false
	}
	call, args := m[1], m[2]
	var quoted []string
	for _, q := range quotedForm.FindAllStringSubmatch(args, -1) {
		quoted = append(quoted, unhex(t, q[1]))
	}
	if open := openForm.FindStringSubmatch(args); open != nil {
		c.name = unhex(t, open[1])
	} else if len(quoted) > 0 {
		c.name = quoted[0]
	}
	if n := numberForm.FindStringSubmatch(args); n != nil {
		c.off, _ = strconv.ParseInt(n[1], 10, 64)
	}
	switch call {
	case "openat":
		if c.kind = create; strings.Contains(args, "O_TRUNC") {
			c.kind, c.off = truncate, 0
		}
		return c, strings.Contains(args, "O_CREAT")
	case "write":
		if c.kind, c.off, c.bytes = write, -1, []byte(quoted[0]); strings.HasPrefix(args, "1<") {
			c.kind, c.name = ack, quoted[0]
		}
	case "pwrite64":
		c.kind, c.bytes = write, []byte(quoted[0])
	case "ftruncate":
		c.kind = truncate
	case "fsync", "fdatasync":
		c.kind = flush
	case "rename", "renameat", "renameat2":
		c.kind, c.to = rename, quoted[1]
	case "link", "linkat":
		c.kind, c.to = link, quoted[1]
	case "unlink", "unlinkat":
		c.kind = remove
	}
	return c, true
}

func unhex(t *testing.T, text string) string {
	t.Helper()
	b, err := hex.DecodeString(strings.ReplaceAll(text, `\x`, ""))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// node is a file, whatever it is called; its identity is its address.
type node struct{ _ byte }

// disk is the names in a directory and what the files hold. Contents are never
// changed in place.
type disk struct {
	names map[string]*node
	files map[*node][]byte
}

func newDisk() disk { return disk{map[string]*node{}, map[*node][]byte{}} }

func (d disk) clone() disk { return disk{maps.Clone(d.names), maps.Clone(d.files)} }

// image returns the contents by name.
func (d disk) image() map[string][]byte {
	image := map[string][]byte{}
	for name, n := range d.names {
		image[filepath.Base(name)] = d.files[n]
	}
	return image
}

// apply carries out a change whose node is known.
func (d disk) apply(c change) {
	switch c.kind {
	case create, link:
		d.names[c.to] = c.node
	case remove:
		delete(d.names, c.name)
	case rename:
		delete(d.names, c.name)
		d.names[c.to] = c.node
	case truncate:
		d.files[c.node] = append(slices.Clone(d.files[c.node][:min(c.off, int64(len(d.files[c.node])))]),
			make([]byte, max(0, c.off-int64(len(d.files[c.node]))))...)
	case write:
		text := d.files[c.node]
		whole := make([]byte, max(int64(len(text)), c.off+int64(len(c.bytes))))
		copy(whole, text)
		copy(whole[c.off:], c.bytes)
		d.files[c.node] = whole
	}
}

// machine is a computer that may lose its power: what the processes see, what has
// reached the disk, and what has not yet.
type machine struct {
	seen, durable disk
	pending       []change
}

// do carries out a step, and resolves which file it means. A flush is for the
// caller to do with settle.
func (m *machine) do(c change) {
	switch c.kind {
	case create, truncate:
		if m.seen.names[c.name] == nil {
			made := change{kind: create, to: c.name, node: &node{}}
			m.seen.apply(made)
			m.pending = append(m.pending, made)
		}
		if c.kind == create {
			return
		}
	}
	c.node = m.seen.names[c.name]
	if c.node == nil {
		return // a name that is gone: nobody will read it again
	}
	if c.kind == write && c.off < 0 {
		c.off = int64(len(m.seen.files[c.node]))
	}
	m.seen.apply(c)
	m.pending = append(m.pending, c)
}

// settle makes durable what a flush of the name asks for: a file's contents, or,
// if it is the directory, the names.
func (m *machine) settle(name string) {
	n := m.seen.names[name]
	m.pending = slices.DeleteFunc(m.pending, func(c change) bool {
		isContent := c.kind == write || c.kind == truncate
		flushed := n != nil && isContent && c.node == n || n == nil && !isContent
		if flushed {
			m.durable.apply(c)
		}
		return flushed
	})
}

// crashes calls each for every disk that a loss of power could leave now: each
// prefix of what is pending, the last write of it torn in the middle of its
// sectors, or come without the one before it.
func (m *machine) crashes(each func(what string, d disk)) {
	at := m.durable.clone()
	each("nothing pending", at)
	for i, c := range m.pending {
		if half := len(c.bytes) / 2 / sector * sector; half > 0 {
			head, tail := c, c
			head.bytes = c.bytes[:half]
			tail.bytes, tail.off = c.bytes[half:], c.off+int64(half)
			for _, torn := range []change{head, tail} {
				d := at.clone()
				d.apply(torn)
				each(fmt.Sprintf("%d pending, the last one torn: %v", i+1, torn), d)
			}
		}
		if i > 0 {
			d := m.prefix(i - 1)
			d.apply(c)
			each(fmt.Sprintf("%d pending, the one before the last missing: %v", i+1, c), d)
		}
		at.apply(c)
		each(fmt.Sprintf("%d pending: %v", i+1, c), at)
	}
}

func (m *machine) prefix(n int) disk {
	d := m.durable.clone()
	for _, c := range m.pending[:n] {
		d.apply(c)
	}
	return d
}

const sector = 512

// lay writes an image into a fresh directory and returns the database's path.
func lay(t testing.TB, dir string, image map[string][]byte) string {
	t.Helper()
	for name, text := range image {
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return filepath.Join(dir, "cached.db")
}
