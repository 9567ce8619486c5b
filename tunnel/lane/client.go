package lane

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"sallyport"
	"sallyport/proto/connect"
	"sallyport/tunnel"
)

// answerTimeout is how long a gateway may take to answer a CONNECT: its decision
// and its dial have limits of their own below this.
const answerTimeout = 60 * time.Second

// Dial reaches a gateway and returns a carrier of lanes. ctx bounds the dial only.
// The first connection made is kept warm for the first flow.
func Dial(ctx context.Context, cfg tunnel.DialConfig) (tunnel.Carrier, error) {
	d, err := newDialer(cfg)
	if err != nil {
		return nil, err
	}
	c, err := d.dial(ctx)
	if err != nil {
		return nil, err
	}
	lanes := &carrier{d: d, done: make(chan struct{}), open: make(map[*conn]struct{})}
	lanes.pool = newPool(d, lanes.fail)
	lanes.pool.put(c)
	return lanes, nil
}

// carrier is a tunnel.Carrier over a pool of connections.
type carrier struct {
	d    *dialer
	pool *pool
	done chan struct{} // closed by fail

	mu   sync.Mutex
	err  error
	open map[*conn]struct{} // flows and streaming answers; nil after Close
}

func (c *carrier) Name() string          { return Name }
func (c *carrier) Done() <-chan struct{} { return c.done }

func (c *carrier) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// fail marks the carrier dead, once. Its flows are connections of their own and
// live on until the gateway cuts them or Close is called.
func (c *carrier) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil {
		c.err = err
		close(c.done)
	}
}

// Close resets what is open, and returns when all goroutines have ended.
func (c *carrier) Close() error {
	c.fail(&sallyport.Error{Outcome: sallyport.OutcomeUnavailable, Code: connect.ProblemGatewayDown, Message: "the tunnel was closed"})
	c.mu.Lock()
	open := c.open
	c.open = nil
	c.mu.Unlock()
	for f := range open {
		f.Reset(0)
	}
	c.pool.close()
	return nil
}

// Open implements tunnel.Carrier.
func (c *carrier) Open(ctx context.Context, target sallyport.Target, early []byte) (*tunnel.Flow, error) {
	if len(early) > connect.MaxEarlyBytes {
		return nil, fmt.Errorf("open %s: %d early bytes; at most %d", target, len(early), connect.MaxEarlyBytes)
	}
	authority := target.Authority()
	request := make([]byte, 0, 64+2*len(authority)+len(early))
	request = append(request, "CONNECT "+authority+" HTTP/1.1\r\nHost: "+authority+"\r\n\r\n"...)
	request = append(request, early...)
	// A request without early bytes has no effect that a second one would double.
	x, err := c.exchange(ctx, request, len(early) == 0)
	if err != nil {
		return nil, err
	}
	if x.status < 200 || x.status > 299 {
		return nil, c.refusal(x)
	}
	if err := x.detach(); err != nil {
		x.close(false)
		return nil, c.d.failure(err)
	}
	flow := &trackedConn{conn: x.conn, carrier: c}
	return &tunnel.Flow{
		Conn:     flow,
		ID:       sallyport.FlowID(x.fields.Get(connect.HeaderFlow)),
		Decision: sallyport.DecisionID(x.fields.Get(connect.HeaderDecision)),
		Rule:     x.fields.Get(connect.HeaderRule),
		Header:   x.fields,
	}, nil
}

// refusal reads a refusal. One that says the session is over ends the carrier.
func (c *carrier) refusal(x *exchange) error {
	resp := x.response(nil)
	defer resp.Body.Close()
	x.conn.SetReadDeadline(time.Now().Add(headTimeout))
	e := connect.ReadRefusal(resp)
	if e.Outcome == sallyport.OutcomeLogin {
		c.fail(e)
	}
	return e
}

// RoundTrip implements http.RoundTripper for /v1 requests. Each has a connection
// of its own. A 401 is returned as an error: the gateway has no session for us.
func (c *carrier) RoundTrip(req *http.Request) (*http.Response, error) {
	request, err := c.encode(req)
	if err != nil {
		return nil, err
	}
	x, err := c.exchange(req.Context(), request, req.Method == http.MethodGet)
	if err != nil {
		return nil, err
	}
	if x.status == http.StatusUnauthorized {
		return nil, c.refusal(x)
	}
	return x.response(req), nil
}

// encode returns req in wire form, its body included.
func (c *carrier) encode(req *http.Request) ([]byte, error) {
	var body []byte
	if req.Body != nil {
		defer req.Body.Close()
		var err error
		if body, err = io.ReadAll(io.LimitReader(req.Body, tunnel.MaxBody+1)); err != nil {
			return nil, fmt.Errorf("request body: %w", err)
		}
		if len(body) > tunnel.MaxBody {
			return nil, fmt.Errorf("request body: longer than %d bytes", tunnel.MaxBody)
		}
	}
	method := req.Method
	if method == "" {
		method = http.MethodGet
	}
	h := req.Header.Clone()
	if h == nil {
		h = make(http.Header)
	}
	h.Set("Host", c.d.endpoint.Authority)
	h.Set("Connection", "close")
	h.Del("Transfer-Encoding")
	h.Del("Content-Length")
	if len(body) > 0 || method == http.MethodPost {
		h.Set("Content-Length", strconv.Itoa(len(body)))
	}
	b := append(make([]byte, 0, 512+len(body)), method+" "+req.URL.RequestURI()+" HTTP/1.1\r\n"...)
	b = append(appendFields(b, h), "\r\n"...)
	return append(b, body...), nil
}

// exchange is one request and the head of its answer on one connection.
type exchange struct {
	carrier *carrier
	ctx     context.Context
	conn    *conn
	stop    func() bool // ends the connection's dependence on ctx
	status  int
	fields  http.Header
	length  int64 // of the body; -1: until the end of the stream
}

// exchange sends request on a warm connection, or on a new one, and reads the
// answer's head. A warm connection can die under the request; repeatable says
// that it may be sent a second time then.
func (c *carrier) exchange(ctx context.Context, request []byte, repeatable bool) (*exchange, error) {
	if err := c.Err(); err != nil {
		return nil, err
	}
	if warm := c.pool.take(); warm != nil {
		c.pool.refill()
		x, err := c.exchangeOn(ctx, warm, request)
		if err == nil || !repeatable || !errors.Is(err, errNoAnswer) || ctx.Err() != nil {
			return x, c.lost(err)
		}
	}
	fresh, err := c.d.dial(ctx)
	if err != nil {
		return nil, err
	}
	c.pool.refill()
	x, err := c.exchangeOn(ctx, fresh, request)
	return x, c.lost(err)
}

// lost returns what people see of a broken exchange; a refused certificate, which
// TLS 1.3 tells only now, ends the carrier.
func (c *carrier) lost(err error) error {
	if err == nil {
		return nil
	}
	err = c.d.failure(err)
	if sallyport.OutcomeOf(err) == sallyport.OutcomeLogin {
		c.fail(err)
	}
	return err
}

func (d *dialer) failure(err error) error { return tunnel.DialFailure(d.endpoint.Authority, err) }

// errNoAnswer: the connection ended before the first byte of an answer.
var errNoAnswer = errors.New("the gateway closed the connection without an answer")

func (c *carrier) exchangeOn(ctx context.Context, t *tls.Conn, request []byte) (*exchange, error) {
	x := &exchange{carrier: c, ctx: ctx, conn: newConn(t, nil)}
	if !c.track(x.conn) {
		x.conn.Reset(0)
		return nil, c.Err()
	}
	t.SetDeadline(time.Now().Add(answerTimeout))
	x.stop = context.AfterFunc(ctx, func() { t.SetDeadline(time.Unix(1, 0)) })
	if err := x.run(request); err != nil {
		x.close(false)
		if ctx.Err() != nil {
			err = errors.Join(context.Cause(ctx), err)
		}
		return nil, err
	}
	return x, nil
}

func (x *exchange) run(request []byte) error {
	if _, err := x.conn.Conn.Write(request); err != nil {
		// The gateway may have answered, or told why it closes, before it stopped
		// reading: that says more than the failed write.
		var reset *tunnel.ResetError
		if !errors.As(resetError(err), &reset) {
			return err
		}
	}
	started := false
	h, err := readHead(x.conn.Conn, func() { started = true })
	if err != nil {
		if !started && (err == io.EOF || errors.As(resetError(err), new(*tunnel.ResetError))) {
			return fmt.Errorf("%w: %w", errNoAnswer, err)
		}
		return err
	}
	version, rest, _ := strings.Cut(h.line, " ")
	code, _, _ := strings.Cut(rest, " ")
	x.status, err = strconv.Atoi(code)
	if version != "HTTP/1.1" || err != nil || len(code) != 3 || x.status < 200 {
		return fmt.Errorf("%w: status line %.40q", errBadHead, h.line)
	}
	if x.length, err = h.contentLength(); err != nil {
		return err
	}
	x.fields = h.fields
	if len(h.rest) > 0 {
		x.conn.early = h.rest
	}
	return nil
}

// close ends the exchange; finished says that the answer has been read to its end.
// If not, nobody reads on, and the gateway need not send on either.
func (x *exchange) close(finished bool) {
	x.stop()
	if finished {
		x.conn.Conn.Close()
	} else {
		x.conn.Reset(0)
	}
	x.carrier.untrack(x.conn)
}

// detach takes the connection out of ctx's reach, and fails if ctx was quicker.
func (x *exchange) detach() error {
	if !x.stop() {
		return context.Cause(x.ctx)
	}
	return x.conn.SetDeadline(time.Time{})
}

// response returns the answer with its body still to be read; closing the body
// closes the connection.
func (x *exchange) response(req *http.Request) *http.Response {
	x.conn.SetDeadline(time.Time{}) // an event stream may be silent for long
	if x.ctx.Err() != nil {         // that has just overridden the end of ctx
		x.conn.SetDeadline(time.Unix(1, 0))
	}
	body := &answerBody{x: x, left: x.length}
	if x.status == http.StatusNoContent || x.status == http.StatusNotModified {
		body.left = 0
	}
	return &http.Response{
		Status: strconv.Itoa(x.status) + " " + http.StatusText(x.status), StatusCode: x.status,
		Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header: x.fields, Body: body, ContentLength: body.left, Close: true, Request: req,
	}
}

type answerBody struct {
	x    *exchange
	left int64 // -1: until the end of the stream
	once sync.Once
	end  bool
}

func (b *answerBody) Read(p []byte) (int, error) {
	if b.left == 0 {
		b.end = true
		return 0, io.EOF
	}
	if b.left > 0 {
		p = p[:min(int64(len(p)), b.left)]
	}
	n, err := b.x.conn.Read(p)
	if b.left > 0 {
		b.left -= int64(n)
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		if b.left == 0 {
			err = nil
		}
	}
	b.end = err == io.EOF
	if err != nil && err != io.EOF && b.x.ctx.Err() != nil {
		err = context.Cause(b.x.ctx)
	}
	return n, err
}

func (b *answerBody) Close() error {
	b.once.Do(func() { b.x.close(b.end) })
	return nil
}

// track remembers an open connection for Close; false after Close.
func (c *carrier) track(f *conn) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.open == nil {
		return false
	}
	c.open[f] = struct{}{}
	return true
}

func (c *carrier) untrack(f *conn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.open, f)
}

// trackedConn is a flow that its carrier knows of.
type trackedConn struct {
	*conn
	carrier *carrier
}

func (t *trackedConn) Close() error {
	defer t.carrier.untrack(t.conn)
	return t.conn.Close()
}

func (t *trackedConn) Reset(code uint64) {
	defer t.carrier.untrack(t.conn)
	t.conn.Reset(code)
}
