package authd

import (
	"cmp"
	"context"
	"crypto/x509"
	"encoding/pem"
	"maps"
	"slices"
	"strings"
	"time"

	"sallyport"
	"sallyport/internal/tlsid"
)

// The session CA can be replaced while everything runs. Whoever does it gives
// each authd the new CA beside the one in force; the trust record, which all of
// them write, then takes three steps:
//
//	the new one is published, the old one signs   until gateways know the new one
//	the new one signs, the old one is believed    for 2 certificate lifetimes: agents renew
//	the old one is retired                        its term stays, so that it does not come back
//
// An authd that has not been given the new CA signs with the old one, and moves
// its retirement further away for as long as it does.
const trustID = "current"

const (
	// maxStale is what Deps.MaxStale is unless told otherwise.
	maxStale = 30 * time.Second
	// spreadSlack is how much longer than MaxStale a CA is published before it
	// signs: heartbeats on two hops, and authds whose clocks differ.
	spreadSlack = 5 * time.Second
	// trustEvery is the longest time between two looks at the trust record.
	trustEvery = time.Minute
)

// Spread is how long a new session CA is published before it signs, where gateways
// may go on for max without news of the records (0: 30 s).
func Spread(max time.Duration) time.Duration { return cmp.Or(max, maxStale) + spreadSlack }

// Overlap is how long a session CA is believed after it has signed last.
func (s Session) Overlap() time.Duration { return 2 * s.certificateLifetime() }

// TakeSessionCAs replaces the session CAs, the newest first. The newest signs as
// soon as gateways know it.
func (s *Server) TakeSessionCAs(cas []*tlsid.CA) {
	s.cas.Store(&cas)
	select {
	case s.rotated <- struct{}{}:
	default:
	}
}

// keepTrust looks after the trust record until ctx ends.
func (s *Server) keepTrust(ctx context.Context) error {
	for {
		due, err := s.publishTrust(ctx)
		if err != nil {
			s.log.Warn("trust record not written yet", "error", err)
			due = retryEvery
		}
		timer := time.NewTimer(due)
		select {
		case <-timer.C:
		case <-s.rotated:
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		}
		timer.Stop()
	}
}

// publishTrust makes the trust record what it should be now, and returns in what
// time to look at it again.
func (s *Server) publishTrust(ctx ctx) (due time.Duration, err error) {
	had, stored, as, err := find[sallyport.Trust](ctx, s.deps.Records, sallyport.KindTrust, trustID)
	if err != nil {
		return 0, err
	}
	view := s.viewTrust(had)
	view.enter()
	ca, idle := view.signer()
	s.idle.Store(&idle)
	if idle == nil && view.retireOthers(ca) {
		s.log.Warn("another authd signs with a newer session CA: copy keys/session-ca.* from the machine that keeps the keys")
	}
	op := sallyport.Put(sallyport.KindTrust, trustID, view.trust())
	op.If = as
	if batch := changed(nil, op, stored); len(batch) > 0 {
		rev, err := s.deps.Records.Apply(ctx, batch)
		if err != nil {
			return 0, err
		}
		s.log.Info("trust record written", "revision", rev)
	}
	return view.due(), nil
}

// signer returns the CA that signs at this moment, or why none does.
func (s *Server) signer(ctx ctx) (*tlsid.CA, error) {
	had, _, _, err := find[sallyport.Trust](ctx, s.deps.Records, sallyport.KindTrust, trustID)
	if err != nil {
		return nil, err
	}
	return s.viewTrust(had).signer()
}

// trustView is the trust record as one authd sees it at one moment.
type trustView struct {
	now     time.Time
	spread  time.Duration // from the publication of a CA to its first signature
	overlap time.Duration // from its last signature to its end
	held    []*tlsid.CA   // the authd's own, the newest first

	first  bool // nobody has published anything yet
	bundle []*x509.Certificate
	terms  map[string]sallyport.TrustTerm
}

func (s *Server) viewTrust(t sallyport.Trust) *trustView {
	return &trustView{
		now: s.now().UTC(), overlap: s.session.Load().Overlap(),
		spread: Spread(s.deps.MaxStale), held: *s.cas.Load(),
		first: t.SessionCAs == "" && len(t.Terms) == 0, bundle: certificatesOf(t.SessionCAs), terms: maps.Clone(t.Terms),
	}
}

func (v *trustView) term(c *x509.Certificate) sallyport.TrustTerm {
	return v.terms[sallyport.CertificateID(c.Raw)]
}

func (v *trustView) setTerm(c *x509.Certificate, t sallyport.TrustTerm) {
	if v.terms == nil {
		v.terms = make(map[string]sallyport.TrustTerm)
	}
	v.terms[sallyport.CertificateID(c.Raw)] = t
}

// enter puts the newest CA into the bundle and takes out those that count no
// more. A term goes when its CA must have expired.
func (v *trustView) enter() {
	v.bundle = slices.DeleteFunc(v.bundle, func(c *x509.Certificate) bool {
		return !c.NotAfter.After(v.now) || v.term(c).Retired(v.now)
	})
	maps.DeleteFunc(v.terms, func(_ string, t sallyport.TrustTerm) bool { return t.Retired(v.now.Add(-tlsid.CALife)) })
	newest := v.held[0].Certificate()
	if slices.ContainsFunc(v.bundle, newest.Equal) || v.term(newest).Retired(v.now) {
		return
	}
	v.bundle = slices.Insert(v.bundle, 0, newest)
	if !v.first {
		v.setTerm(newest, sallyport.TrustTerm{Since: v.now})
	}
}

// signer returns the newest CA that all gateways know and believe.
func (v *trustView) signer() (*tlsid.CA, error) {
	retired := 0
	for _, ca := range v.held {
		term := v.term(ca.Certificate())
		switch {
		case v.first:
			return ca, nil // no gateway knows of another
		case term.Retired(v.now):
			retired++
		case slices.ContainsFunc(v.bundle, ca.Certificate().Equal) && !v.now.Before(term.Since.Add(v.spread)):
			return ca, nil
		}
	}
	if retired == len(v.held) {
		return nil, &sallyport.Error{
			Outcome: sallyport.OutcomeUnavailable, Code: "session_ca.retired", Message: "the session CA of this authd is retired",
			Hint: "copy keys/session-ca.* from the machine that keeps the keys",
		}
	}
	return nil, &sallyport.Error{
		Outcome: sallyport.OutcomeUnavailable, Code: "session_ca.spreading", Message: "gateways are still being told of the session CA",
		Hint: "it signs after " + v.spread.String(),
	}
}

// retireOthers sets the end of CAs that were published before ca, which signs now.
// If another authd has set an end to ca, that end moves, and behind says so.
func (v *trustView) retireOthers(ca *tlsid.CA) (behind bool) {
	own, end := v.term(ca.Certificate()), v.now.Add(v.overlap)
	for _, c := range v.bundle {
		if term := v.term(c); term.Since.Before(own.Since) && term.Retires.IsZero() {
			term.Retires = end
			v.setTerm(c, term)
		}
	}
	if own.Retires.IsZero() || own.Retires.After(end.Add(-v.overlap/4)) {
		return false
	}
	own.Retires = end
	v.setTerm(ca.Certificate(), own)
	return true
}

// trust is the record for what is seen.
func (v *trustView) trust() sallyport.Trust {
	var bundle strings.Builder
	for _, c := range v.bundle {
		bundle.Write(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}))
	}
	return sallyport.Trust{SessionCAs: bundle.String(), Terms: v.terms}
}

// due is in what time the record may have to change: often enough to move an end
// before it comes, and when the newest CA may sign.
func (v *trustView) due() time.Duration {
	due := min(v.overlap/8, trustEvery)
	if left := v.term(v.held[0].Certificate()).Since.Add(v.spread).Sub(v.now); left > 0 {
		due = min(due, left)
	}
	return max(due, retryEvery)
}

// certificatesOf returns the certificates of a PEM bundle that can be read.
func certificatesOf(bundle string) []*x509.Certificate {
	var out []*x509.Certificate
	for rest := []byte(bundle); ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			return out
		}
		if cert, err := x509.ParseCertificate(block.Bytes); err == nil {
			out = append(out, cert)
		}
	}
}
