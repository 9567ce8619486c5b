package lane

import (
	"errors"
	"net/http"
	"strconv"
	"time"
)

// writeTimeout is how long a client may leave one write of an answer unread.
const writeTimeout = 30 * time.Second

// response is the http.ResponseWriter of the one request on a connection. An
// answer without a content length is ended by the end of the TLS stream, which
// cannot be forged (RFC 9112, section 6.3, rule 8).
type response struct {
	w interface {
		Write([]byte) (int, error)
		SetWriteDeadline(time.Time) error
	}
	header http.Header
	status int // 0: the head is not sent yet
	left   int64
	err    error
}

func (r *response) Header() http.Header { return r.header }

func (r *response) WriteHeader(status int) {
	if r.status != 0 {
		return
	}
	r.status, r.left = status, -1
	if n, err := strconv.ParseInt(r.header.Get("Content-Length"), 10, 64); err == nil {
		r.left = n
	}
	r.header.Set("Connection", "close")
	b := append(make([]byte, 0, 1024), "HTTP/1.1 "...)
	b = strconv.AppendInt(b, int64(status), 10)
	b = append(b, ' ')
	b = append(b, http.StatusText(status)...)
	b = append(b, "\r\n"...)
	b = appendFields(b, r.header)
	b = append(b, "\r\n"...)
	r.write(b)
}

func (r *response) Write(b []byte) (int, error) {
	r.WriteHeader(http.StatusOK)
	if r.left >= 0 {
		if int64(len(b)) > r.left {
			return 0, http.ErrContentLength
		}
		r.left -= int64(len(b))
	}
	if len(b) == 0 {
		return 0, r.err
	}
	return r.write(b)
}

func (r *response) write(b []byte) (int, error) {
	if r.err != nil {
		return 0, r.err
	}
	r.w.SetWriteDeadline(time.Now().Add(writeTimeout)) // a write to a closed socket fails by itself
	n, err := r.w.Write(b)
	if err != nil {
		r.err = err
	}
	return n, err
}

// FlushError implements what http.ResponseController looks for: everything has
// been sent already.
func (r *response) FlushError() error {
	r.WriteHeader(http.StatusOK)
	return r.err
}

// Flush implements http.Flusher.
func (r *response) Flush() { r.FlushError() }

// finish completes the answer after the handler; an error means that it could
// not, and that the client must see a cut, not an end.
func (r *response) finish() error {
	r.WriteHeader(http.StatusOK)
	if r.err == nil && r.left > 0 {
		r.err = errors.New("handler wrote less than it announced")
	}
	return r.err
}
