package cached

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"

	"sallyport"
)

// auditJob writes down what the job is about to change. If that cannot be
// written the job is refused, unless it only takes away: a full disk must not
// keep a session alive (DESIGN section 5, "Revocation").
func (s *Server) auditJob(ctx context.Context, j *job, ops []sallyport.Op, rev sallyport.Revision) error {
	if s.audit == nil {
		return nil
	}
	err := s.auditAll(ctx, j, ops, rev)
	if err == nil {
		return nil
	}
	if !onlyTakesAway(ops) {
		return &sallyport.Error{
			Outcome: sallyport.OutcomeUnavailable,
			Code:    "audit.unavailable",
			Message: "the change cannot be audited and is refused",
			Err:     err,
		}
	}
	s.log.Error("deletion is not audited", "revision", uint64(rev), "error", err)
	return nil
}

func (s *Server) auditAll(ctx context.Context, j *job, ops []sallyport.Op, rev sallyport.Revision) error {
	for _, note := range j.notes {
		if err := s.append(ctx, note); err != nil {
			return err
		}
	}
	for i := range ops {
		if !audited(ops[i].Kind) {
			continue
		}
		if err := s.append(ctx, changeNote(&ops[i], rev, j.why)); err != nil {
			return err
		}
	}
	return nil
}

// auditFailure tells that the revisions that a plan announced were not written
// after all.
func (s *Server) auditFailure(v *view, cause error) {
	if s.audit == nil || len(v.rows) == 0 {
		return
	}
	code := sallyport.CodeOf(cause)
	if code == "" {
		code = codeBroken
	}
	note := sallyport.AuditRecord{
		Type:   sallyport.AuditChange,
		Code:   code,
		Detail: fmt.Sprintf("revisions %d to %d were not written", v.base.Revision+1, v.revision),
	}
	if err := s.append(context.Background(), note); err != nil {
		s.log.Error("failed write is not audited", "revision", uint64(v.revision), "error", err)
	}
}

func (s *Server) append(ctx context.Context, r sallyport.AuditRecord) error {
	r.Time = s.clock.now()
	return s.audit.Append(ctx, r)
}

// audited leaves out housekeeping, and codes: their ids may be secrets.
func audited(kind sallyport.Kind) bool {
	switch kind {
	case sallyport.KindCode, sallyport.KindLease, sallyport.KindAuditHead:
		return false
	}
	return true
}

// onlyTakesAway reports whether no op can give anybody anything.
func onlyTakesAway(ops []sallyport.Op) bool {
	for i := range ops {
		if op := &ops[i]; !op.Delete && !revokes(op) {
			return false
		}
	}
	return true
}

func changeNote(op *sallyport.Op, rev sallyport.Revision, why string) sallyport.AuditRecord {
	r := sallyport.AuditRecord{Type: sallyport.AuditChange}
	if op.Kind == sallyport.KindConfig {
		r.Type = sallyport.AuditConfigApply
	}
	verb := "put"
	if op.Delete {
		verb = "delete"
	}
	r.Detail = fmt.Sprintf("%s %s %s at revision %d", verb, op.Kind, op.ID, rev)
	if op.Kind == sallyport.KindConfig && !op.Delete {
		why = appliedBy(op.Payload)
	}
	if why != "" {
		r.Detail += " (" + why + ")"
	}
	if subject, ok := sallyport.SubjectOf(op.Kind, op.ID); ok {
		nameSubject(&r, subject)
	}
	return r
}

// appliedBy tells who says to have applied a configuration, and whether it is an
// earlier one that was brought back.
func appliedBy(payload []byte) string {
	var c struct {
		By         string             `json:"by"`
		RollbackTo sallyport.Revision `json:"rollback_to"`
	}
	if err := json.Unmarshal(payload, &c); err != nil {
		return "unreadable"
	}
	var words []string
	if c.RollbackTo != 0 {
		words = append(words, fmt.Sprintf("rollback to revision %d", c.RollbackTo))
	}
	if c.By != "" {
		words = append(words, fmt.Sprintf("by %.64q", c.By))
	}
	return strings.Join(words, ", ")
}

// nameSubject fills in the field that a search for the subject looks at.
func nameSubject(r *sallyport.AuditRecord, s sallyport.Subject) {
	switch s.Kind {
	case sallyport.SubjectSession:
		r.Session = sallyport.SessionID(s.ID)
	case sallyport.SubjectUser:
		r.User = sallyport.UserID(s.ID)
	case sallyport.SubjectDevice:
		r.Device = sallyport.DeviceID(s.ID)
	}
}
