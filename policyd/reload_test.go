package policyd

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"sallyport"
)

// alternating are two configurations whose decisions tell them apart: under an even
// number the rule of every route is "even" and the second route is open, under an
// odd one it is not there at all.
func alternating(n int) sallyport.Config {
	routes := []sallyport.Route{
		{From: "tcp://a.internal:1", Policy: "[{name: odd, allow: {or: [{authenticated_user: true}]}}]"},
		{From: "tcp://b.internal:1", Policy: "[{name: odd, deny: {or: [{accept: true}]}}]"},
	}
	if n%2 == 0 {
		routes[0].Policy = "[{name: even, allow: {or: [{groups: {has: dba}}]}}]"
		routes[1].Policy = "[{name: even, allow: {or: [{groups: {has: dba}}]}}]"
	}
	return sallyport.Config{Routes: routes}
}

// TestCase_I10_EachDecisionBelongsToOneRevision: while configurations are applied
// one after the other, each answer is wholly that of the revision it names, and one
// batch has one revision.
func TestCase_I10_EachDecisionBelongsToOneRevision(t *testing.T) {
	inSite(t, Config{}, nil, func(t *testing.T, s *site) {
		const rounds, askers = 200, 4
		var even sync.Map // revision → whether its configuration is an even one
		apply := func(n int) {
			rev, err := s.cached.Apply(t.Context(), []sallyport.Op{sallyport.Put(sallyport.KindConfig, "current", alternating(n))})
			if err != nil {
				t.Error(err)
			}
			even.Store(rev, n%2 == 0)
			if err := s.await(t.Context(), s.snap.Load().epoch, rev); err != nil {
				t.Error(err)
			}
		}
		synctest.Wait()
		apply(0)

		var questions []sallyport.Request
		for _, to := range []string{"tcp://a.internal:1", "tcp://b.internal:1", "tcp://a.internal:1", "tcp://b.internal:1"} {
			target, err := sallyport.ParseTarget(to)
			if err != nil {
				t.Fatal(err)
			}
			questions = append(questions, sallyport.Request{Session: "s1", Target: target})
		}
		var over atomic.Bool
		var seen sync.Map // revisions
		var asked [askers][][]sallyport.Decision
		var all sync.WaitGroup
		for i := range askers {
			all.Go(func() {
				for !over.Load() {
					batch, err := s.Authorize(context.Background(), questions)
					if err != nil {
						t.Error(err)
						return
					}
					asked[i] = append(asked[i], batch)
					seen.Store(batch[0].PolicyRevision, true)
				}
			})
		}
		for n := range rounds {
			apply(n + 1)
		}
		over.Store(true)
		all.Wait()
		count := 0
		seen.Range(func(any, any) bool { count++; return true })
		if count < 3 {
			t.Fatalf("all decisions are of %d revisions; want many", count)
		}
		t.Logf("%d revisions were decided by", count)
		for _, batches := range asked {
			for _, batch := range batches {
				checkRevision(t, batch, &even)
			}
		}
	})
}

// checkRevision wants a batch that one configuration has decided.
func checkRevision(t *testing.T, batch []sallyport.Decision, even *sync.Map) {
	t.Helper()
	isEven, known := even.Load(batch[0].PolicyRevision)
	if !known {
		t.Fatalf("decided by policy revision %d, which nobody applied", batch[0].PolicyRevision)
	}
	want := []string{"odd allow", "odd deny", "odd allow", "odd deny"}
	if isEven.(bool) {
		want = []string{"even allow", "even allow", "even allow", "even allow"}
	}
	for i, d := range batch {
		if got := d.Rule + " " + d.Verdict.String(); got != want[i] || d.PolicyRevision != batch[0].PolicyRevision || d.AsOf < d.PolicyRevision {
			t.Fatalf("answer %d: %s by policy revision %d as of %d; want %s by %d", i, got, d.PolicyRevision, d.AsOf, want[i], batch[0].PolicyRevision)
		}
	}
}

// TestCase_I10_RefusedFile: a file that cannot even become a record changes no
// decision, and everybody who looks is told.
func TestCase_I10_RefusedFile(t *testing.T) {
	inSite(t, Config{}, routes, func(t *testing.T, s *site) {
		audited := func() int { return len(s.Server.audit.(*ledger).of(sallyport.AuditPolicyBroken)) }
		why := errors.New("sallyport.yaml:12: routes[0].policy: column 26: unknown key")
		for range 2 {
			s.Refuse(t.Context(), why)
			s.want("s1", db, sallyport.VerdictAllow)
			if err := s.Ready(); sallyport.CodeOf(err) != codeStale || !strings.Contains(err.Error(), "policy.stale") || !strings.Contains(err.Error(), why.Error()) {
				t.Errorf("ready: %v; want policy.stale and the line", err)
			}
		}
		if audited() != 1 {
			t.Errorf("%d policy.broken records of one fault; want 1", audited())
		}
		if s.broken(s.snap.Load()) == nil {
			t.Error("the figure does not show it")
		}
		s.Refuse(t.Context(), nil)
		if err := s.Ready(); err != nil {
			t.Errorf("ready after the repair: %v", err)
		}
	})
}

// A record knows no line of the file it came from; what it knows, it tells.
func TestBrokenRecordTellsWhere(t *testing.T) {
	inSite(t, Config{}, routes, func(t *testing.T, s *site) {
		c := sallyport.Config{Source: "/etc/sallyport.yaml", Routes: []sallyport.Route{
			{From: "tcp://ok.internal:1", Policy: "allow: {or: [{accept: true}]}"},
			{From: db, Policy: "- name: dba\n  alow: {or: [{accept: true}]}"},
			{From: "nonsense", Policy: "allow: {or: [{accept: true}]}"},
		}}
		rev := s.put(sallyport.KindConfig, "current", c)
		for _, part := range []string{
			fmt.Sprintf("configuration of revision %d (from /etc/sallyport.yaml) does not load", rev),
			"routes[1].policy of " + db + `: 2:3: unknown key "alow"`, "routes[2].from: ",
		} {
			if err := s.Ready(); !strings.Contains(fmt.Sprint(err), part) {
				t.Errorf("got %v; want %q", err, part)
			}
		}
	})
}
