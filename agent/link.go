package agent

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"

	"sallyport"
	"sallyport/agent/posture"
	"sallyport/proto/connect"
	"sallyport/tunnel"
)

const (
	apiTimeout = 15 * time.Second
	// silence is how long the event stream may say nothing; a gateway pings every
	// 10 s.
	silence = 35 * time.Second
	// firstReport bounds how long a flow waits for the posture report before it.
	firstReport = 5 * time.Second
	maxEvent    = 256 << 10 // bytes of one line
)

// link is a carrier with what belongs to it.
type link struct {
	carrier tunnel.Carrier
	gateway sallyport.GatewayInfo
	host    string
	session sallyport.SessionID
	since   time.Time
	hears   chan struct{} // closed once the event stream has been open
	once    sync.Once
	gone    chan struct{}      // closed by Agent.leave
	pings   singleflight.Group // questions whether the gateway is there

	mu       sync.Mutex
	rtt      time.Duration
	left     bool                               // by Agent.leave: no new flows on it
	reported int                                // newest reading of facts that was sent
	over     *connect.Event                     // the session's end, as the gateway told it
	cuts     map[sallyport.FlowID]connect.Event // told, and not asked for yet
	waiting  map[sallyport.FlowID]chan struct{} // who waits for one
	order    []sallyport.FlowID                 // of cuts, oldest first
}

func newLink(c tunnel.Carrier, g sallyport.GatewayInfo, host string, session sallyport.SessionID) *link {
	return &link{
		carrier: c, gateway: g, host: host, session: session, since: time.Now(), hears: make(chan struct{}), gone: make(chan struct{}),
		cuts: map[sallyport.FlowID]connect.Event{}, waiting: map[sallyport.FlowID]chan struct{}{},
	}
}

// Close closes the carrier.
func (l *link) Close() error { return l.carrier.Close() }

const maxCuts = 1024 // of flows that nobody asks about

// Link describes the carrier, for status.
type Link struct {
	Gateway string        `json:"gateway"`
	URL     string        `json:"url"`
	Carrier string        `json:"carrier"`
	RTT     time.Duration `json:"rtt_ns"`
	Since   time.Time     `json:"since"`
}

// Link returns the carrier that is up now; ok is false if none is.
func (a *Agent) Link() (Link, bool) {
	l := a.liveLink()
	if l == nil {
		return Link{}, false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return Link{Gateway: l.host, URL: l.gateway.URL, Carrier: l.carrier.Name(), RTT: l.rtt, Since: l.since}, true
}

func (a *Agent) liveLink() *link {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.link == nil || !a.link.usable() {
		return nil
	}
	return a.link
}

func (l *link) usable() bool {
	select {
	case <-l.carrier.Done():
		return false
	default:
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return !l.left && l.over == nil
}

// connected returns a carrier, dialling one if there is none. force asks for a new
// certificate first.
func (a *Agent) connected(ctx context.Context, force bool) (*link, error) {
	if err := a.started(ctx); err != nil {
		return nil, err
	}
	if l := a.liveLink(); l != nil {
		return l, nil
	}
	return share(a, ctx, &a.dialling, func(life context.Context) (*link, error) {
		if l := a.liveLink(); l != nil {
			return l, nil
		}
		return a.dial(life, force)
	})
}

// adopt makes l the agent's link.
func (a *Agent) adopt(ctx context.Context, l *link) {
	a.mu.Lock()
	old := a.link
	a.link = l
	a.goodGateway = l.gateway.URL
	if a.badGateway == a.goodGateway {
		a.badGateway = ""
	}
	a.mu.Unlock()
	a.owePosture() // facts may have changed after the report that it started with
	if old != nil {
		a.tasks.Go(func() { a.retire(ctx, old) })
	}
	a.cfg.Log.Info("carrier up", "gateway", l.gateway.URL, "carrier", l.carrier.Name())
}

// retire leaves a carrier that was left to its flows and closes it with the agent.
func (a *Agent) retire(ctx context.Context, l *link) {
	select {
	case <-l.carrier.Done():
	case <-ctx.Done():
		l.carrier.Close()
	}
}

// tlsConfig trusts what the login said signs the gateway's certificate, and shows
// the certificate that is current at each handshake.
func (a *Agent) tlsConfig(g sallyport.GatewayInfo) (*tls.Config, error) {
	conf := &tls.Config{MinVersion: tls.VersionTLS13}
	if g.CA != "" {
		conf.RootCAs = x509.NewCertPool()
		if !conf.RootCAs.AppendCertsFromPEM([]byte(g.CA)) {
			return nil, fmt.Errorf("gateway %s: its CA is no PEM certificate", g.Name)
		}
	}
	conf.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		s := a.Session()
		if s == nil {
			return nil, errors.New("no session")
		}
		return &s.Certificate, nil
	}
	return conf, nil
}

// do runs f on a live carrier. A carrier that is dead, that was left, or that the
// gateway closes on us for our certificate, is replaced, and f runs again: at most
// three times.
func (a *Agent) do(ctx context.Context, f func(*link) error) error {
	var err error
	force := false
	for range 3 {
		var l *link
		if l, err = a.connected(ctx, force); err == nil {
			err = f(l)
		}
		if l != nil && err != nil {
			a.drop(l, err)
		}
		switch {
		case err == nil || ctx.Err() != nil:
			return err
		case sallyport.OutcomeOf(err) == sallyport.OutcomeLogin && sallyport.CodeOf(err) != "login.needed" && !force:
			force = true // perhaps only the certificate is at its end
		case l != nil && (dead(l) || l.isLeft()):
		default:
			return err
		}
	}
	return err
}

func dead(l *link) bool {
	select {
	case <-l.carrier.Done():
		return true
	default:
		return false
	}
}

// drop forgets a link that is of no more use.
func (a *Agent) drop(l *link, err error) {
	if !dead(l) && sallyport.OutcomeOf(err) != sallyport.OutcomeLogin {
		return
	}
	if dead(l) {
		a.distrust(l)
	}
	a.mu.Lock()
	if a.link == l {
		a.link = nil
	}
	a.mu.Unlock()
	l.carrier.Close()
}

func (l *link) isLeft() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.left
}

// get asks the gateway for one JSON document.
func (a *Agent) get(ctx context.Context, path string, query url.Values, into any) error {
	return a.do(ctx, func(l *link) error {
		defer a.during("gateway " + l.host)()
		ctx, cancel := context.WithTimeout(ctx, apiTimeout)
		defer cancel()
		return a.answered(ctx, l, func(ctx context.Context) error { return l.get(ctx, path, query, into) })
	})
}

func (l *link) get(ctx context.Context, path string, query url.Values, into any) error {
	began := time.Now()
	resp, err := l.request(ctx, http.MethodGet, path, query, nil)
	if err != nil {
		return tunnel.DialFailure(l.host, err)
	}
	defer resp.Body.Close()
	l.measured(time.Since(began))
	if resp.StatusCode != http.StatusOK {
		return connect.ReadRefusal(resp)
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, 16<<20)).Decode(into); err != nil {
		return &sallyport.Error{
			Outcome: sallyport.OutcomeUnavailable, Code: connect.ProblemUnintelligible,
			Message: "gateway " + l.host + " answered something that this version does not read", Err: err,
		}
	}
	return nil
}

func (l *link) request(ctx context.Context, method, path string, query url.Values, body io.Reader) (*http.Response, error) {
	u := url.URL{Path: path, RawQuery: query.Encode()}
	req, err := http.NewRequestWithContext(ctx, method, u.String(), body)
	if err != nil {
		return nil, err
	}
	return l.carrier.RoundTrip(req)
}

func (l *link) measured(d time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.rtt == 0 || d < l.rtt {
		l.rtt = d
	}
}

// readEvents keeps the event stream open while the carrier lives.
func (a *Agent) readEvents(ctx context.Context, l *link) {
	for {
		err := a.streamEvents(ctx, l)
		if dead(l) || ctx.Err() != nil {
			return
		}
		a.cfg.Log.Debug("event stream ended", "gateway", l.gateway.URL, "error", err)
		if l.isLeft() {
			return // it was left for a reason
		}
		select {
		case <-ctx.Done():
			return
		case <-l.carrier.Done():
			return
		case <-time.After(time.Second):
		}
	}
}

func (a *Agent) streamEvents(ctx context.Context, l *link) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	quiet := time.AfterFunc(silence, func() { cancel(errors.New("the event stream fell silent")) })
	defer quiet.Stop()
	resp, err := l.request(ctx, http.MethodGet, connect.PathEvents, nil, nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return connect.ReadRefusal(resp)
	}
	l.once.Do(func() { close(l.hears) })
	lines := bufio.NewScanner(resp.Body)
	lines.Buffer(nil, maxEvent)
	for lines.Scan() {
		quiet.Reset(silence)
		var e connect.Event
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			return fmt.Errorf("event: %w", err)
		}
		a.take(l, e)
	}
	if err := lines.Err(); err != nil {
		return err
	}
	return io.EOF
}

// take acts on one event.
func (a *Agent) take(l *link, e connect.Event) {
	e.Reason = connect.Printable(e.Reason, 500)
	switch e.Type {
	case connect.EventWithdrawn:
		l.cut(e)
	case connect.EventSession:
		if e.Code == connect.ProblemSessionRevoked || e.Code == "session_expired" {
			l.end(e)
		}
	case connect.EventDrain:
		a.leave(l, errors.New("the gateway is going away"))
	case connect.EventGateways:
		a.newGateways(e.Gateways)
	}
}

// cut notes why a flow was withdrawn and wakes who waits for that.
func (l *link) cut(e connect.Event) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, known := l.cuts[e.Flow]; !known {
		l.order = append(l.order, e.Flow)
	}
	l.cuts[e.Flow] = e
	if len(l.order) > maxCuts {
		delete(l.cuts, l.order[0])
		l.order = l.order[1:]
	}
	if w := l.waiting[e.Flow]; w != nil {
		delete(l.waiting, e.Flow)
		close(w)
	}
}

// end notes that the session is over and wakes everybody.
func (l *link) end(e connect.Event) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.over = &e
	for id, w := range l.waiting {
		delete(l.waiting, id)
		close(w)
	}
}

// whyCut waits for the event that explains the end of a flow.
func (l *link) whyCut(ctx context.Context, id sallyport.FlowID) (connect.Event, bool) {
	l.mu.Lock()
	e, ok := l.cuts[id]
	if !ok && l.over != nil {
		e, ok = *l.over, true
	}
	w := l.waiting[id]
	if !ok && w == nil {
		w = make(chan struct{})
		l.waiting[id] = w
	}
	l.mu.Unlock()
	if ok {
		return e, true
	}
	select {
	case <-w:
	case <-ctx.Done():
	case <-l.carrier.Done():
		// What the gateway flushed before it closed may still be on its way to us.
		select {
		case <-w:
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.waiting, id)
	if e, ok := l.cuts[id]; ok {
		return e, true
	}
	if l.over != nil {
		return *l.over, true
	}
	return connect.Event{}, false
}

// newGateways keeps a changed list for the next dial.
func (a *Agent) newGateways(list []sallyport.GatewayInfo) {
	if len(list) == 0 {
		return
	}
	a.mu.Lock()
	if a.session != nil {
		s := *a.session
		s.Gateways = list
		a.session = &s
	}
	a.mu.Unlock()
	p, err := a.Profile()
	if err == nil && p.Session != "" {
		p.Gateways = list
		err = p.save(a.dir)
	}
	if err != nil {
		a.cfg.Log.Warn("list of gateways not saved", "error", err)
	}
}

// owePosture asks the report loop for a report.
func (a *Agent) owePosture() {
	select {
	case a.owed <- struct{}{}:
	default:
	}
}

// reportFirst sends the posture that a new carrier starts with.
func (a *Agent) reportFirst(ctx context.Context, l *link) error {
	select {
	case <-a.factsKnown:
	case <-ctx.Done():
		return nil // unknown facts: policyd decides what that means
	}
	err := a.report(ctx, l)
	if err != nil {
		a.owePosture()
	}
	return err
}

// reportLoop sends a report whenever one is owed, again after a pause if it did
// not get through.
func (a *Agent) reportLoop(ctx context.Context) {
	retry := time.NewTicker(2 * time.Second)
	defer retry.Stop()
	failed := false
	for {
		select {
		case <-ctx.Done():
			return
		case <-a.owed:
		case <-retry.C:
			if !failed {
				continue
			}
		}
		l := a.liveLink()
		if l == nil {
			failed = false // a new link starts with a report, and asks for another
			continue
		}
		reportCtx, cancel := context.WithTimeout(ctx, apiTimeout)
		failed = a.report(reportCtx, l) != nil
		cancel()
	}
}

// report signs the newest facts and sends them.
func (a *Agent) report(ctx context.Context, l *link) error {
	key, err := a.deviceKey(ctx, false)
	if err != nil {
		return err
	}
	a.mu.Lock()
	if a.reporter == nil {
		a.reporter = &posture.Reporter{Key: key, Device: key.ID}
	}
	facts, reading, reporter := a.facts, a.reading, a.reporter
	a.mu.Unlock()
	if l.knows(reading) {
		return nil
	}
	jws, err := reporter.Sign(l.session, facts)
	if err != nil {
		return err
	}
	began := time.Now()
	resp, err := l.request(ctx, http.MethodPost, connect.PathPosture, nil, strings.NewReader(jws))
	if err != nil {
		return tunnel.DialFailure(l.host, err)
	}
	defer resp.Body.Close()
	l.measured(time.Since(began))
	if resp.StatusCode/100 != 2 {
		e := connect.ReadRefusal(resp)
		a.cfg.Log.Warn("posture report refused", "code", e.Code, "message", e.Message)
		return e
	}
	l.mu.Lock()
	l.reported = max(l.reported, reading)
	l.mu.Unlock()
	return nil
}

// knows reports whether a reading of facts has been sent on this link already.
func (l *link) knows(reading int) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.reported >= reading
}
