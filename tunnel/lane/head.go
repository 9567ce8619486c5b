package lane

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/textproto"
	"strconv"
	"strings"
	"sync"

	"sallyport/tunnel"
)

// maxFields bounds the fields of a head.
const maxFields = 64

var (
	errHeadTooLarge = errors.New("head too large")
	errBadHead      = errors.New("malformed head")
)

var headBuffers = sync.Pool{New: func() any { return new([tunnel.MaxHead]byte) }}

// head is the first line and the fields of a request or an answer.
type head struct {
	line   string
	fields http.Header
	// rest is what was read behind the head; it belongs to the body or the flow.
	rest []byte
}

// readHead reads a head from r. An io.EOF before its first byte is returned as
// it is; a head that breaks the grammar wraps errBadHead. first, if not nil, is
// called when the first byte has come.
func readHead(r io.Reader, first func()) (head, error) {
	buf := headBuffers.Get().(*[tunnel.MaxHead]byte)
	defer headBuffers.Put(buf)
	n := 0
	for {
		m, err := r.Read(buf[n:])
		if m > 0 && n == 0 && first != nil {
			first()
		}
		from := max(0, n-3)
		n += m
		if i := bytes.Index(buf[from:n], []byte("\r\n\r\n")); i >= 0 {
			end := from + i
			h, err := parseHead(string(buf[:end]))
			h.rest = bytes.Clone(buf[end+4 : n])
			return h, err
		}
		switch {
		case err != nil && n == 0:
			return head{}, err
		case err == io.EOF:
			return head{}, io.ErrUnexpectedEOF
		case err != nil:
			return head{}, err
		case n == len(buf):
			return head{}, errHeadTooLarge
		}
	}
}

// parseHead parses a head without its empty line: no bare CR or LF, no NUL, no
// folded lines, no blank before a colon (RFC 9112, sections 2.2, 5.1 and 5.2).
func parseHead(text string) (head, error) {
	lines := strings.Split(text, "\r\n")
	h := head{line: lines[0], fields: make(http.Header, len(lines)-1)}
	if !printableASCII(h.line) {
		return head{}, fmt.Errorf("%w: first line", errBadHead)
	}
	if len(lines)-1 > maxFields {
		return head{}, errHeadTooLarge
	}
	for _, line := range lines[1:] {
		name, value, ok := strings.Cut(line, ":")
		value = strings.Trim(value, " \t")
		if !ok || !isToken(name) || !isFieldValue(value) {
			return head{}, fmt.Errorf("%w: field %.40q", errBadHead, line)
		}
		name = textproto.CanonicalMIMEHeaderKey(name)
		h.fields[name] = append(h.fields[name], value)
	}
	return h, nil
}

// one returns the field's only value; ok is false if it occurs twice.
func (h head) one(name string) (value string, ok bool) {
	v := h.fields[name]
	if len(v) == 0 {
		return "", true
	}
	return v[0], len(v) == 1
}

// contentLength returns the body's length, -1 if none is given. Transfer codings
// are refused, so the length can be read in one way only.
func (h head) contentLength() (int64, error) {
	if len(h.fields["Transfer-Encoding"]) > 0 {
		return 0, fmt.Errorf("%w: transfer codings are not taken", errBadHead)
	}
	v, ok := h.one("Content-Length")
	if !ok {
		return 0, fmt.Errorf("%w: two content lengths", errBadHead)
	}
	if v == "" && len(h.fields["Content-Length"]) == 0 {
		return -1, nil
	}
	n, err := strconv.ParseUint(v, 10, 62)
	if err != nil || v[0] == '+' {
		return 0, fmt.Errorf("%w: content length", errBadHead)
	}
	return int64(n), nil
}

func printableASCII(s string) bool {
	for i := range len(s) {
		if s[i] < 0x20 || s[i] > 0x7e {
			return false
		}
	}
	return s != ""
}

func isToken(s string) bool {
	for i := range len(s) {
		c := s[i]
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte("!#$%&'*+-.^_`|~", c) >= 0) {
			return false
		}
	}
	return s != ""
}

func isFieldValue(s string) bool {
	for i := range len(s) {
		if c := s[i]; c < 0x20 && c != '\t' || c == 0x7f {
			return false
		}
	}
	return true
}

// appendFields writes fields in wire form. Values were checked by whoever made
// them; what could break the line is replaced all the same.
func appendFields(b []byte, fields http.Header) []byte {
	for name, values := range fields {
		if !isToken(name) {
			continue
		}
		for _, v := range values {
			b = append(b, name...)
			b = append(b, ": "...)
			for i := range len(v) {
				c := v[i]
				if c < 0x20 && c != '\t' || c == 0x7f {
					c = ' '
				}
				b = append(b, c)
			}
			b = append(b, "\r\n"...)
		}
	}
	return b
}
