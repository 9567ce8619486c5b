package config

import (
	"bytes"
	"maps"
	"reflect"
	"runtime"
	"sync"
	"sync/atomic"

	"go.yaml.in/yaml/v3"
)

// worthCutting is the size of files, in bytes, from which on their routes are
// read in pieces, on every processor and without keeping the whole tree.
const worthCutting = 256 << 10

// piece is some entries of routes.
type piece struct {
	text  []byte
	line  int // of the file, where text begins
	first int // number of the first entry
	count int // of entries
}

// inPieces reads text into a File, cut before lines that begin an entry of routes.
// It does not decide what YAML is: each piece is read by the YAML parser and must
// be complete by itself, which it is not if the cut went through a scalar or a flow
// collection. Anything out of the ordinary, every fault included, makes it return
// false; then the file is to be read as a whole, which finds the same and more.
func inPieces(path string, text []byte, pieces int) (*decoder, *File, bool) {
	if len(text) > maxFileBytes || bytes.ContainsFunc(text, uncommon) || hasMarks(text) {
		return nil, nil, false
	}
	head, entries, tail, ok := sections(text)
	if !ok {
		return nil, nil, false
	}
	d, f := newDecoder(path), newFile(path)
	if !d.decodeAround(f, head, entries, tail) {
		return nil, nil, false
	}
	line := 1 + bytes.Count(head, []byte("\n"))
	d.lines["routes"], d.lines[""] = line+1, min(line, d.lines[""])
	read := readPieces(path, cut(entries, line, pieces))
	for _, r := range read {
		if r.routes == nil {
			return nil, nil, false
		}
		f.Routes = append(f.Routes, r.routes...)
		maps.Copy(d.lines, r.lines)
	}
	return d, f, true
}

// uncommon are line breaks that would be counted otherwise here than by YAML.
func uncommon(r rune) bool {
	return isControl(r) || r == '\r' || r == '\u0085' || r == '\u2028' || r == '\u2029' || r == '\uFEFF'
}

// hasMarks reports whether a line could begin or end a document.
func hasMarks(text []byte) bool {
	for _, mark := range []string{"---", "...", "%"} {
		if bytes.HasPrefix(text, []byte(mark)) || bytes.Contains(text, []byte("\n"+mark)) {
			return true
		}
	}
	return false
}

// sections splits text into what is before the line "routes:", the list below it
// with that line, and what is after it.
func sections(text []byte) (head, entries, tail []byte, ok bool) {
	const key = "routes:\n"
	if !bytes.HasPrefix(text, []byte(key)) {
		i := bytes.Index(text, []byte("\n"+key))
		if i < 0 {
			return nil, nil, nil, false
		}
		head, text = text[:i+1], text[i+1:]
	}
	below := text[len(key):]
	dash := bytes.IndexByte(below, '-')
	if dash < 0 || len(bytes.TrimLeft(below[:dash], " ")) > 0 {
		return nil, nil, nil, false
	}
	for at := len(key); at < len(text); {
		line, _, _ := bytes.Cut(text[at:], []byte("\n"))
		if len(line) > 0 && line[0] != ' ' && line[0] != '#' && (dash > 0 || line[0] != '-') {
			return head, text[:at], text[at:], true
		}
		at += len(line) + 1
	}
	return head, text, nil, true
}

// decodeAround decodes everything but the routes, in their lines.
func (d *decoder) decodeAround(f *File, head, entries, tail []byte) bool {
	blank := bytes.Repeat([]byte("\n"), bytes.Count(entries, []byte("\n")))
	if len(bytes.TrimSpace(head)) > 0 {
		alone := newDecoder(f.path)
		root := alone.parse(head)
		if root == nil || root.Column != 1 {
			return false
		}
	}
	rest := bytes.Join([][]byte{head, blank, tail}, nil)
	d.decode(rest, f)
	_, twice := d.lines["routes"]
	return len(d.problems) == 0 && len(d.lines) > 1 && !twice
}

// cut makes up to n pieces of entries, whose first line is the key and stands in
// the given line of the file.
func cut(entries []byte, line, n int) []piece {
	key := bytes.IndexByte(entries, '\n') + 1
	below := entries[key:]
	begins := append([]byte("\n"), below[:bytes.IndexByte(below, '-')+1]...) // an entry
	var out []piece
	first := 0
	line++
	for len(below) > 0 {
		p := piece{line: line, first: first, count: 1}
		end, size := 0, len(entries)/n
		for end < len(below) {
			next := bytes.Index(below[end:], begins)
			if next < 0 {
				end = len(below)
				break
			}
			end += next + 1
			if end > size {
				break
			}
			p.count++
		}
		p.text, below = below[:end], below[end:]
		out = append(out, p)
		first += p.count
		line += bytes.Count(p.text, []byte("\n"))
	}
	return out
}

type readPiece struct {
	routes []Route // nil: not to be read by itself
	lines  map[string]int
}

func readPieces(path string, pieces []piece) []readPiece {
	out := make([]readPiece, len(pieces))
	var next atomic.Int64
	var wg sync.WaitGroup
	for range min(runtime.GOMAXPROCS(0), len(pieces)) {
		wg.Go(func() {
			for i := int(next.Add(1)) - 1; i < len(pieces); i = int(next.Add(1)) - 1 {
				out[i] = pieces[i].read(path)
			}
		})
	}
	wg.Wait()
	return out
}

// read decodes the piece as a document with nothing but routes, in its lines.
func (p piece) read(path string) readPiece {
	d := newDecoder(path)
	text := append(bytes.Repeat([]byte("\n"), p.line-2), "routes:\n"...)
	root := d.parse(append(text, p.text...))
	if root == nil || len(root.Content) != 2 || root.Content[1].Kind != yaml.SequenceNode || len(root.Content[1].Content) != p.count {
		return readPiece{}
	}
	routes := make([]Route, p.count)
	for i, n := range root.Content[1].Content {
		d.value(n, reflect.ValueOf(&routes[i]).Elem(), index("routes", p.first+i), 2)
	}
	if len(d.problems) > 0 {
		return readPiece{}
	}
	delete(d.lines, "")
	return readPiece{routes, d.lines}
}
