package idp

import (
	"bytes"
	"io"
	"net/http"
)

// Transport carries authd's requests to this provider without a network: authd
// need not be able to reach its own public address, nor trust its own
// certificate, and discovery works before anything listens. The messages are the
// same ones.
func (p *Provider) Transport() http.RoundTripper { return inProcess{p} }

type inProcess struct{ handler http.Handler }

func (t inProcess) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.Body != nil {
		defer req.Body.Close()
	}
	if err := req.Context().Err(); err != nil {
		return nil, err
	}
	in := req.Clone(req.Context())
	in.RemoteAddr = "in-process"
	in.RequestURI = req.URL.RequestURI()
	in.Host = req.URL.Host
	if in.Body == nil {
		in.Body = http.NoBody
	}
	out := &recorder{header: make(http.Header)}
	t.handler.ServeHTTP(out, in)
	out.WriteHeader(http.StatusOK)
	return &http.Response{
		Status:        http.StatusText(out.status),
		StatusCode:    out.status,
		Proto:         "HTTP/1.1",
		ProtoMajor:    1,
		ProtoMinor:    1,
		Header:        out.sent,
		Body:          io.NopCloser(&out.body),
		ContentLength: int64(out.body.Len()),
		Request:       req,
	}, nil
}

// recorder is a ResponseWriter into memory.
type recorder struct {
	header, sent http.Header
	status       int
	body         bytes.Buffer
}

func (r *recorder) Header() http.Header { return r.header }

func (r *recorder) WriteHeader(status int) {
	if r.status == 0 {
		r.status, r.sent = status, r.header.Clone()
	}
}

func (r *recorder) Write(b []byte) (int, error) {
	r.WriteHeader(http.StatusOK)
	return r.body.Write(b)
}
