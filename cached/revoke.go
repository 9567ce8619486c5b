package cached

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"

	"sallyport"
)

// maxSubjects bounds one revocation.
const maxSubjects = 1_000

// Revoke implements sallyport.Revoker: one batch ends every session of the
// subjects and is durable when it returns. A session is deleted; a login or user
// loses its logins and their sessions; a device loses its sessions and the
// logins behind them, and is marked revoked. Sessions made afterwards live.
func (s *Server) Revoke(ctx context.Context, r sallyport.Revocation) (sallyport.Revoked, error) {
	if len(r.Subjects) == 0 || len(r.Subjects) > maxSubjects {
		return sallyport.Revoked{}, refuse("a revocation names 1 to %d subjects, this one %d", maxSubjects, len(r.Subjects))
	}
	j := &job{alone: true, why: "revoked"}
	for _, subject := range r.Subjects {
		switch subject.Kind {
		case sallyport.SubjectSession, sallyport.SubjectLogin, sallyport.SubjectUser, sallyport.SubjectDevice:
		default:
			return sallyport.Revoked{}, refuse("a %s cannot be revoked", subject.Kind)
		}
		if subject.ID == "" || len(subject.ID) > maxID || hasControl(subject.ID) {
			return sallyport.Revoked{}, refuse("%s: %q is not an id", subject.Kind, subject.ID)
		}
		j.notes = append(j.notes, revocationNote(r, subject))
	}
	var ended int
	j.plan = func(v *view) ([]sallyport.Op, error) {
		ended = 0
		w := withdrawal{view: v, seen: map[Key]struct{}{}}
		for _, subject := range r.Subjects {
			if err := w.subject(subject); err != nil {
				return nil, err
			}
		}
		ended = w.ended
		return w.ops, nil
	}
	rev, err := s.submit(ctx, j)
	if err != nil {
		return sallyport.Revoked{}, fmt.Errorf("revoke: %w", err)
	}
	return sallyport.Revoked{Sessions: ended, Durable: true, Revision: rev}, nil
}

func revocationNote(r sallyport.Revocation, subject sallyport.Subject) sallyport.AuditRecord {
	note := sallyport.AuditRecord{Type: sallyport.AuditRevocation, Detail: subject.String()}
	if r.By != "" {
		note.Detail += " by " + r.By
	}
	if r.Reason != "" {
		note.Detail += ": " + r.Reason
	}
	nameSubject(&note, subject)
	return note
}

// withdrawal collects what a revocation deletes.
type withdrawal struct {
	view  *view
	seen  map[Key]struct{}
	ops   []sallyport.Op
	ended int // live sessions among them
}

func (w *withdrawal) subject(s sallyport.Subject) error {
	switch s.Kind {
	case sallyport.SubjectSession:
		return w.drop(Key{sallyport.KindSession, s.ID})
	case sallyport.SubjectLogin:
		return w.login(sallyport.LoginID(s.ID))
	case sallyport.SubjectUser:
		return w.owned(Owner{User: sallyport.UserID(s.ID)})
	}
	if err := w.owned(Owner{Device: sallyport.DeviceID(s.ID)}); err != nil {
		return err
	}
	return w.device(s.ID)
}

// login ends a login and its sessions.
func (w *withdrawal) login(id sallyport.LoginID) error {
	if id == "" {
		return nil
	}
	if _, done := w.seen[Key{sallyport.KindLogin, string(id)}]; done {
		return nil
	}
	if err := w.drop(Key{sallyport.KindLogin, string(id)}); err != nil {
		return err
	}
	return w.owned(Owner{Login: id})
}

// owned ends everything that hangs on owner, and the logins behind it.
func (w *withdrawal) owned(owner Owner) error {
	rows, err := w.view.tx.Owned(owner)
	if err != nil {
		return fmt.Errorf("find sessions: %w", w.view.server.check(err))
	}
	for i := range rows {
		row := &rows[i]
		if row.Kind == sallyport.KindLogin {
			if err := w.login(sallyport.LoginID(row.ID)); err != nil {
				return err
			}
			continue
		}
		w.dropRow(row)
		if owner.Login == "" && w.view.server.trusted(row) {
			if err := w.login(row.Owner.Login); err != nil {
				return err
			}
		}
	}
	return nil
}

// drop deletes the record if there is one.
func (w *withdrawal) drop(k Key) error {
	row, err := w.view.get(k)
	if err != nil {
		return err
	}
	if row == nil {
		w.seen[k] = struct{}{}
		return nil
	}
	w.dropRow(row)
	return nil
}

func (w *withdrawal) dropRow(row *Row) {
	k := row.Key()
	if _, done := w.seen[k]; done {
		return
	}
	w.seen[k] = struct{}{}
	if row.Deleted {
		return
	}
	if k.Kind == sallyport.KindSession && w.view.server.live(row, w.view.server.clock.now()) {
		w.ended++
	}
	w.ops = append(w.ops, sallyport.Op{Kind: k.Kind, ID: k.ID, Delete: true})
}

// device marks a device revoked, keeping every field that is not ours. A record
// that cannot be marked is deleted: absent means revoked, too.
func (w *withdrawal) device(id string) error {
	live, err := w.view.live(Key{sallyport.KindDevice, id})
	if err != nil || live == nil {
		return err
	}
	op := sallyport.Op{Kind: sallyport.KindDevice, ID: id}
	var fields map[string]json.RawMessage
	if json.Unmarshal(live.Payload, &fields) != nil || fields == nil {
		op.Delete = true
		w.ops = append(w.ops, op)
		return nil
	}
	if bytes.Equal(fields["revoked"], revokedTrue) {
		return nil
	}
	fields["revoked"] = revokedTrue
	if op.Payload, err = json.Marshal(fields); err != nil {
		return fmt.Errorf("device %s: payload: %w", id, err)
	}
	op.Version, op.Expires = live.Version, live.Expires
	w.ops = append(w.ops, op)
	return nil
}

var revokedTrue = json.RawMessage("true")

// revokes reports whether op marks a device revoked.
func revokes(op *sallyport.Op) bool {
	if op.Kind != sallyport.KindDevice {
		return false
	}
	var d struct {
		Revoked bool `json:"revoked"`
	}
	return json.Unmarshal(op.Payload, &d) == nil && d.Revoked
}
