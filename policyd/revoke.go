package policyd

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode"

	"sallyport"
	"sallyport/internal/backoff"
	"sallyport/policyd/policy"
)

const (
	maxSubjects  = 1_000           // of one revocation
	maxSubjectID = 255             // bytes of an id; those of users are the longest
	durableWait  = 2 * time.Second // how long Revoke waits for cached
	replayLimit  = 5 * time.Second // of one call to cached
)

// overrides are the direct revocations that the snapshot does not show yet. A
// value is immutable.
type overrides struct {
	all      []*override
	subjects map[sallyport.Subject]struct{}
}

// override is one revoked subject.
type override struct {
	subject sallyport.Subject
	done    chan struct{} // closed when cached has it

	// Set before done is closed: where cached has it.
	epoch    sallyport.Epoch
	revision sallyport.Revision
}

func (o *override) isWritten() bool {
	select {
	case <-o.done:
		return true
	default:
		return false
	}
}

func newOverrides(all []*override) *overrides {
	o := &overrides{all: all, subjects: make(map[sallyport.Subject]struct{}, len(all))}
	for _, ov := range all {
		o.subjects[ov.subject] = struct{}{}
	}
	return o
}

func (o *overrides) has(kind sallyport.SubjectKind, id string) bool {
	_, ok := o.subjects[sallyport.Subject{Kind: kind, ID: id}]
	return ok
}

// end says why p's session is over, or "". While cached is out of reach nobody
// can log in again, so a user's override ends every session of the user.
func (o *overrides) end(p *policy.Person) string {
	switch {
	case len(o.all) == 0:
		return ""
	case o.has(sallyport.SubjectSession, string(p.Session.ID)):
		return "session revoked"
	case o.has(sallyport.SubjectLogin, string(p.Session.Login)), o.has(sallyport.SubjectUser, string(p.Session.User)):
		return "login revoked"
	case p.Session.Device != "" && o.has(sallyport.SubjectDevice, string(p.Session.Device)):
		return "device revoked"
	}
	return ""
}

// mayEnd reports whether end has anything to say about the session: a quick look
// for who goes through all of them.
func (o *overrides) mayEnd(s *held[session]) bool {
	return o.has(sallyport.SubjectSession, s.id) || o.has(sallyport.SubjectLogin, string(s.value.login)) ||
		o.has(sallyport.SubjectUser, string(s.value.user.Value())) || o.has(sallyport.SubjectDevice, string(s.value.device.Value()))
}

// pending reports whether something has not been written to cached yet.
func (o *overrides) pending() bool {
	return slices.ContainsFunc(o.all, func(o *override) bool { return !o.isWritten() })
}

// replay writes overrides to cached as soon as it is in reach.
type replay struct {
	connected atomic.Bool   // the stream is complete: the snapshot has all that cached knows
	kick      chan struct{} // capacity 1

	mu sync.Mutex // held while the server's overrides are replaced
}

func (r *replay) wake() {
	select {
	case r.kick <- struct{}{}:
	default:
	}
}

// Revoke implements sallyport.Revoker for the moment when cached is out of reach:
// it takes effect at once in memory. If cached answers within two seconds the
// revocation is durable too.
func (s *Server) Revoke(ctx context.Context, r sallyport.Revocation) (sallyport.Revoked, error) {
	if err := checkRevocation(r); err != nil {
		return sallyport.Revoked{}, err
	}
	snap, before := s.snap.Load(), s.revoked.Load()
	added := s.override(r.Subjects)
	s.tellRevoked(r)
	s.replay.wake()
	s.auditRevocation(ctx, r)
	out := sallyport.Revoked{Sessions: snap.countEnded(before, newOverrides(added))} // nobody waits for it but the caller
	if !s.replay.connected.Load() {
		return out, nil
	}
	out.Durable, out.Revision = waitWritten(ctx, added)
	return out, nil
}

func checkRevocation(r sallyport.Revocation) error {
	if len(r.Subjects) == 0 || len(r.Subjects) > maxSubjects {
		return usage("revoke.subjects", fmt.Sprintf("a revocation names 1 to %d subjects, this one %d", maxSubjects, len(r.Subjects)))
	}
	for _, subject := range r.Subjects {
		switch subject.Kind {
		case sallyport.SubjectSession, sallyport.SubjectLogin, sallyport.SubjectUser, sallyport.SubjectDevice:
		default:
			return usage("revoke.subjects", fmt.Sprintf("a %s cannot be revoked", subject.Kind))
		}
		if subject.ID == "" || len(subject.ID) > maxSubjectID || strings.ContainsFunc(subject.ID, unicode.IsControl) {
			return usage("revoke.subjects", fmt.Sprintf("%.80q is not the id of a %s", subject.ID, subject.Kind)) // cached would never take it
		}
	}
	return nil
}

func usage(code, message string) *sallyport.Error {
	return &sallyport.Error{Outcome: sallyport.OutcomeUsage, Code: code, Message: message}
}

func (s *Server) override(subjects []sallyport.Subject) []*override {
	added := make([]*override, len(subjects))
	for i, subject := range subjects {
		added[i] = &override{subject: subject, done: make(chan struct{})}
	}
	s.replay.mu.Lock()
	defer s.replay.mu.Unlock()
	s.revoked.Store(newOverrides(slices.Concat(s.revoked.Load().all, added)))
	return added
}

// countEnded counts the sessions that were live under before and end by added.
func (s *snapshot) countEnded(before, added *overrides) int {
	if s == nil {
		return 0
	}
	n, now := 0, time.Now()
	var p person
	for session := range s.sessions.all() {
		if added.mayEnd(session) && s.person(sallyport.SessionID(session.id), before, now, &p) == "" && added.end(&p.Person) != "" {
			n++
		}
	}
	return n
}

func (s *Server) tellRevoked(r sallyport.Revocation) {
	var rev sallyport.Revision
	if snap := s.snap.Load(); snap != nil {
		rev = snap.revision
	}
	changes := make([]sallyport.SubjectChange, len(r.Subjects))
	for i, subject := range r.Subjects {
		why := "session revoked"
		switch subject.Kind {
		case sallyport.SubjectLogin, sallyport.SubjectUser:
			why = "login revoked"
		case sallyport.SubjectDevice:
			why = "device revoked"
		}
		changes[i] = sallyport.SubjectChange{Subject: subject, Revision: rev, Why: why}
	}
	s.fanout.tell(changes)
}

// auditRevocation writes one record a subject. A failure changes nothing: the
// revocation only takes away.
func (s *Server) auditRevocation(ctx context.Context, r sallyport.Revocation) {
	for _, subject := range r.Subjects {
		detail := strings.TrimSuffix(fmt.Sprintf("direct: %s by %s: %s", subject, r.By, r.Reason), ": ")
		rec := sallyport.AuditRecord{Type: sallyport.AuditRevocation, Time: time.Now(), Detail: clip(detail, 200)}
		switch subject.Kind {
		case sallyport.SubjectSession:
			rec.Session = sallyport.SessionID(subject.ID)
		case sallyport.SubjectUser:
			rec.User = sallyport.UserID(subject.ID)
		case sallyport.SubjectDevice:
			rec.Device = sallyport.DeviceID(subject.ID)
		}
		if err := s.audit.Append(ctx, rec); err != nil {
			s.log.Error("audit record lost", "type", rec.Type, "error", err)
			return
		}
	}
}

// waitWritten waits a while until cached has all of added.
func waitWritten(ctx context.Context, added []*override) (bool, sallyport.Revision) {
	t := time.NewTimer(durableWait)
	defer t.Stop()
	var rev sallyport.Revision
	for _, o := range added {
		select {
		case <-o.done:
			rev = max(rev, o.revision)
		case <-t.C:
			return false, 0
		case <-ctx.Done():
			return false, 0
		}
	}
	return true, rev
}

// replayAll writes pending overrides whenever there are some and cached is in
// reach, until ctx ends.
func (s *Server) replayAll(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-s.replay.kick:
		}
		var retry backoff.Backoff
		for s.replay.connected.Load() && s.revoked.Load().pending() {
			err := s.replayOnce(ctx)
			if err == nil {
				continue
			}
			s.log.Warn("direct revocation not written to cached yet", "error", err, "attempt", retry.Attempt()+1)
			if retry.Wait(ctx) != nil {
				return nil
			}
		}
	}
}

// replayOnce has cached revoke what is pending. Only cached knows all that there is
// to end: a session that was made a moment ago may still be on its way to us.
func (s *Server) replayOnce(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, replayLimit)
	defer cancel()
	snap := s.snap.Load()
	open := slices.DeleteFunc(slices.Clone(s.revoked.Load().all), (*override).isWritten)
	for batch := range slices.Chunk(open, maxSubjects) {
		r := sallyport.Revocation{By: "policyd", Reason: "direct revocation"}
		for _, o := range batch {
			r.Subjects = append(r.Subjects, o.subject)
		}
		done, err := s.records.Revoke(ctx, r)
		if err != nil {
			return err
		}
		for _, o := range batch {
			o.epoch, o.revision = snap.epoch, max(snap.revision, done.Revision)
			close(o.done)
		}
	}
	s.settle(s.snap.Load())
	return nil
}

// settle drops overrides that snap shows. In another epoch than the one they
// were written in they may be gone, and are written again.
func (s *Server) settle(snap *snapshot) {
	if len(s.revoked.Load().all) == 0 {
		return
	}
	s.replay.mu.Lock()
	defer s.replay.mu.Unlock()
	var left []*override
	for _, o := range s.revoked.Load().all {
		switch {
		case !o.isWritten():
			left = append(left, o)
		case o.epoch != snap.epoch:
			left = append(left, &override{subject: o.subject, done: make(chan struct{})})
		case o.revision > snap.revision:
			left = append(left, o)
		}
	}
	s.revoked.Store(newOverrides(left))
}
