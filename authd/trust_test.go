package authd

import (
	"strings"
	"testing"
	"time"

	"sallyport"
	"sallyport/internal/logging"
	"sallyport/internal/tlsid"
)

// rotation is a deployment in which session CAs change: records, a clock, and the
// authds that share them.
type rotation struct {
	t     *testing.T
	vault *vault
	now   time.Time
}

func newRotation(t *testing.T) *rotation {
	r := &rotation{t: t, now: time.Now()}
	r.vault = testVault(t, func() time.Time { return r.now })
	return r
}

const certificateLife = time.Hour

// authd is one that holds the session CAs, the newest first.
func (r *rotation) authd(cas ...*tlsid.CA) *Server {
	s := &Server{
		deps: Deps{Records: r.vault.records, MaxStale: maxStale}, now: func() time.Time { return r.now },
		log: logging.Discard(), rotated: make(chan struct{}, 1),
	}
	s.session.Store(&Session{CertificateLifetime: certificateLife})
	s.TakeSessionCAs(cas)
	return s
}

func (r *rotation) newCA(life time.Duration) *tlsid.CA {
	r.t.Helper()
	ca, err := tlsid.NewCA("session-ca", life)
	if err != nil {
		r.t.Fatal(err)
	}
	return ca
}

// pass lets time go by in which each authd looks after the trust record as often
// as it wants to.
func (r *rotation) pass(d time.Duration, authds ...*Server) {
	r.t.Helper()
	for end := r.now.Add(d); r.now.Before(end); {
		next := end.Sub(r.now)
		for _, s := range authds {
			due, err := s.publishTrust(r.t.Context())
			if err != nil {
				r.t.Fatal(err)
			}
			next = min(next, due)
		}
		r.now = r.now.Add(next)
	}
}

// believed wants gateways to believe these CAs and no other.
func (r *rotation) believed(when string, want ...*tlsid.CA) {
	r.t.Helper()
	trust, _, err := get[sallyport.Trust](r.t.Context(), r.vault.records, sallyport.KindTrust, trustID)
	if err != nil {
		r.t.Fatal(err)
	}
	var bundle []string
	for _, ca := range want {
		bundle = append(bundle, string(ca.PEM()))
	}
	if got := trust.Believed(r.now); got != strings.Join(bundle, "") {
		r.t.Errorf("%s: gateways believe %d CAs, not the %d wanted in their order", when, strings.Count(got, "BEGIN"), len(want))
	}
}

// signs wants the authd to sign with the CA; nil: with none, for the reason code.
func (r *rotation) signs(when string, s *Server, want *tlsid.CA, code string) {
	r.t.Helper()
	got, err := s.signer(r.t.Context())
	if got != want || sallyport.CodeOf(err) != code {
		r.t.Errorf("%s: signs with the wanted CA: %t, error %v; want code %q", when, got == want, err, code)
	}
}

// A rotated session CA: the new one is known to gateways before it signs, the old
// one is believed for two certificate lifetimes after it has signed last, then no
// more, and nothing brings it back.
func TestCase_O1_SessionCARotation(t *testing.T) {
	r := newRotation(t)
	older, newer := r.newCA(0), r.newCA(0)
	s := r.authd(older)
	r.signs("before anything is published", s, older, "")
	r.pass(time.Minute, s)
	r.believed("before", older)

	s.TakeSessionCAs([]*tlsid.CA{newer, older})
	r.signs("before it is published", s, older, "")
	r.pass(time.Second, s)
	r.believed("published", newer, older)
	r.signs("published", s, older, "")
	r.pass(maxStale+spreadSlack-2*time.Second, s)
	r.signs("at the end of the spread", s, older, "")
	r.pass(2*time.Second, s)
	r.signs("known", s, newer, "")
	r.signs("started anew", r.authd(newer, older), newer, "")

	r.pass(2*certificateLife-time.Minute, s)
	r.believed("for two lifetimes", newer, older)
	r.pass(2*time.Minute, s)
	r.believed("after two lifetimes", newer)

	stale := r.authd(older) // from a backup
	r.pass(3*certificateLife, s, stale)
	r.believed("an authd with the old CA", newer)
	r.signs("an authd with the old CA", stale, nil, "session_ca.retired")
	if err := *stale.idle.Load(); sallyport.CodeOf(err) != "session_ca.retired" {
		t.Errorf("not ready for %v", err)
	}
}

// An authd that nobody has given the new CA goes on, and so does what it signs.
func TestCase_O1_AuthdWithTheOldCAGoesOn(t *testing.T) {
	r := newRotation(t)
	older, newer := r.newCA(0), r.newCA(0)
	behind := r.authd(older)
	r.pass(time.Minute, behind)
	ahead := r.authd(newer, older)
	r.pass(time.Minute, ahead, behind)
	r.signs("the one ahead", ahead, newer, "")
	r.pass(24*certificateLife, ahead, behind)
	r.signs("the one behind", behind, older, "")
	r.believed("while one is behind", newer, older)

	behind.TakeSessionCAs([]*tlsid.CA{newer, older})
	r.signs("given the new one", behind, newer, "")
	r.pass(certificateLife, ahead, behind)
	r.believed("a lifetime later", newer, older)
	r.pass(certificateLife+trustEvery, ahead, behind)
	r.believed("two lifetimes later", newer)
}

// A CA without the one before it, in a deployment that runs, waits until gateways
// know it; in a new one it signs at once.
func TestSessionCAWithoutThePreviousOne(t *testing.T) {
	r := newRotation(t)
	older, newer := r.newCA(0), r.newCA(0)
	r.pass(time.Second, r.authd(older))
	s := r.authd(newer)
	r.signs("not published", s, nil, "session_ca.spreading")
	r.pass(time.Second, s)
	r.signs("published", s, nil, "session_ca.spreading")
	r.pass(time.Minute, s)
	r.signs("known", s, newer, "")
}

// What an earlier version wrote counts: CAs without terms are known to everybody.
// One that has expired is taken out.
func TestTrustOfAnEarlierVersion(t *testing.T) {
	r := newRotation(t)
	own, other, short := r.newCA(48*time.Hour), r.newCA(48*time.Hour), r.newCA(time.Hour)
	old := sallyport.Trust{SessionCAs: string(own.PEM()) + string(other.PEM()) + string(short.PEM())}
	if _, err := r.vault.records.Apply(t.Context(), []sallyport.Op{sallyport.Put(sallyport.KindTrust, trustID, old)}); err != nil {
		t.Fatal(err)
	}
	s := r.authd(own)
	r.signs("at once", s, own, "")
	r.pass(30*time.Minute, s)
	r.believed("unchanged", own, other, short)
	r.pass(30*time.Minute+trustEvery, s)
	r.believed("one has expired", own, other)
}
