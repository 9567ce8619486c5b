package gateway

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"sallyport"
	"sallyport/gateway/upstream"
	"sallyport/internal/logging"
	"sallyport/internal/relay"
	"sallyport/internal/telemetry"
	"sallyport/proto/connect"
	"sallyport/tunnel"
	"sallyport/tunnel/h3"
	"sallyport/tunnel/lane"
)

// Deps are what a gateway works with.
type Deps struct {
	// Domain is the trust domain of session certificates. This field is required.
	Domain string
	// Authorizer decides. This field is required.
	Authorizer sallyport.Authorizer
	// Explainer answers /v1/me, /v1/targets and /v1/why. This field is required.
	Explainer sallyport.Explainer
	// Changes tells what changed. This field is required.
	Changes sallyport.Changes
	// Posture takes posture reports. This field is required.
	Posture sallyport.PostureSink
	// Audit takes the record of every flow. This field is required. If it fails,
	// new flows are refused; whoever wants them let in wraps it.
	Audit sallyport.Auditor
	// Log; nil: nothing is logged.
	Log logging.Logger
	// Certificate returns the tunnel host's certificate; it is called at each
	// handshake. This field is required.
	Certificate func() *tls.Certificate
	// ResetKey are 32 secret bytes that outlive the process. From them and its name
	// the gateway makes the key of QUIC's stateless resets; nil: a random one.
	ResetKey []byte
	// Metrics takes the gateway's figures; nil: nobody counts.
	Metrics *telemetry.Registry
	// Version is what /v1/events says hello with.
	Version string
	// Resolver resolves the names of services; nil: net.DefaultResolver.
	Resolver upstream.Resolver
}

// Server is a gateway. It implements tunnel.Handler.
type Server struct {
	cfg    Config
	deps   Deps
	log    logging.Logger
	limits Limits

	table   *table
	hub     hub
	metrics metrics
	guard   *upstream.Guard
	dialer  *upstream.Dialer
	// dialUpstream is dialer.Dial, replaced in tests that have no network.
	dialUpstream func(context.Context, sallyport.Upstream) (relay.Conn, error)

	hosts      map[string]host // by name, lower case; fixed by New
	quic       *h3.Server
	handshakes *budget
	trust      atomic.Pointer[trust]

	again   chan struct{}  // holds one: something is due
	endings sync.WaitGroup // carriers that are being closed
}

var _ tunnel.Handler = (*Server)(nil)

// New returns a gateway that lets nobody in until Serve runs and policyd has
// been heard.
func New(cfg Config, deps Deps) (*Server, error) {
	if err := cfg.Validate().Err(); err != nil {
		return nil, err
	}
	switch {
	case deps.Domain == "":
		return nil, errors.New("gateway: Deps.Domain is required")
	case deps.Authorizer == nil || deps.Explainer == nil || deps.Changes == nil || deps.Posture == nil || deps.Audit == nil:
		return nil, errors.New("gateway: Deps: Authorizer, Explainer, Changes, Posture and Audit are required")
	case deps.Certificate == nil:
		return nil, errors.New("gateway: Deps.Certificate is required")
	}
	if deps.Log == nil {
		deps.Log = logging.Discard()
	}
	limits := cfg.Limits.withDefaults()
	guard := new(upstream.Guard)
	table := newTable(limits)
	s := &Server{
		cfg: cfg, deps: deps, log: deps.Log, limits: limits,
		table: table, metrics: newMetrics(deps.Metrics, table),
		guard:  guard,
		dialer: &upstream.Dialer{Guard: guard, Resolver: deps.Resolver, Timeout: limits.DialTimeout},
		again:  make(chan struct{}, 1),

		hosts:      make(map[string]host),
		handshakes: newBudget(limits.Handshakes),
	}
	s.dialUpstream = s.dialer.Dial
	lanes := lane.NewServer(lane.ServerConfig{Domain: deps.Domain, Host: cfg.host(), Handler: s, Log: deps.Log})
	s.quic = h3.NewServer(h3.ServerConfig{
		TLS:    &tls.Config{MinVersion: tls.VersionTLS13, GetConfigForClient: s.tunnelQUIC},
		Domain: deps.Domain, Host: cfg.host(), Handler: s, Log: deps.Log,
		ResetKey: resetKey(deps.ResetKey, cfg.Name, cfg.host()),
	})
	s.hosts[cfg.host()] = host{config: s.tunnelLane, serve: lanes.ServeConn}
	return s, nil
}

// resetKey is another one for each gateway of a site, also where they share the
// secret: one must not answer for the connections of another (RFC 9000, section
// 21.11).
func resetKey(secret []byte, name, host string) (key [32]byte) {
	if len(secret) == 0 {
		return key
	}
	mac := hmac.New(sha256.New, secret)
	fmt.Fprintf(mac, "%q %q", name, host)
	mac.Sum(key[:0])
	return key
}

// Serve runs the gateway on its listeners until ctx ends and then drains it: the
// agents are told, live flows may go on for Limits.Drain, the rest is closed.
// Either listener may be nil. Serve closes both and returns nil after a drain,
// or the error that made going on impossible.
func (s *Server) Serve(ctx context.Context, tcp net.Listener, udp net.PacketConn) error {
	s.guard.SetOwn(ownAddrs(tcp, udp))
	// What serves outlives ctx by the drain; what accepts does not.
	serving, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	g, serving := errgroup.WithContext(serving)
	g.Go(func() error { return s.watch(serving) })
	g.Go(func() error { return s.reask(serving) })
	g.Go(func() error { return s.tick(serving) })
	if tcp != nil {
		g.Go(func() error { return s.acceptTCP(ctx, serving, g, tcp) })
	}
	if udp != nil {
		defer udp.Close()
		g.Go(func() error { return s.quic.Serve(serving, udp) })
	}

	select {
	case <-ctx.Done():
		s.drain(serving)
	case <-serving.Done(): // a listener broke
	}
	stop()
	err := g.Wait()
	s.endings.Wait()
	return err
}

// Ready returns why nothing can be let in right now, or nil.
func (s *Server) Ready() error {
	switch {
	case s.trust.Load() == nil:
		return errors.New("no session CA is known yet: policyd has not been heard")
	case s.deps.Certificate() == nil:
		return errors.New("the tunnel host has no certificate")
	}
	s.table.mu.Lock()
	defer s.table.mu.Unlock()
	if s.table.draining {
		return errors.New("draining")
	}
	return s.table.fresh.mayOpen(time.Now())
}

// drain tells every agent that the gateway goes away, waits until no flow is
// left or Limits.Drain has passed, and closes what still lives.
func (s *Server) drain(ctx context.Context) {
	s.table.mu.Lock()
	s.table.draining = true
	s.table.mu.Unlock()
	s.hub.broadcast(connect.Event{Type: connect.EventDrain, Code: wordDrain, Reason: "the gateway is going away"})

	limit := time.NewTimer(s.limits.Drain)
	defer limit.Stop()
	poll := time.NewTicker(20 * time.Millisecond)
	defer poll.Stop()
	for s.table.flowCount() > 0 {
		select {
		case <-poll.C:
			continue
		case <-limit.C:
		case <-ctx.Done():
		}
		break
	}
	s.end(s.table.withdrawAll(cut{code: connect.CodeDraining, word: wordDrain, reason: "the gateway is going away", learned: time.Now()}))
	s.endings.Wait()
}

func ownAddrs(tcp net.Listener, udp net.PacketConn) []netip.AddrPort {
	var own []netip.AddrPort
	add := func(a net.Addr) {
		if ap, err := netip.ParseAddrPort(a.String()); err == nil {
			own = append(own, ap)
		}
	}
	if tcp != nil {
		add(tcp.Addr())
	}
	if udp != nil {
		add(udp.LocalAddr())
	}
	return own
}
