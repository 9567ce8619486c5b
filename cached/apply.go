package cached

import (
	"context"
	"fmt"
	"sync"

	"sallyport"
)

// maxGroup bounds how many batches share one transaction.
const maxGroup = 512

// queue holds the batches that wait for a round.
type queue struct {
	// busy has room for one: whoever put a token in runs a round.
	busy chan struct{}

	mu      sync.Mutex
	waiting []*job
}

// job is one batch on its way.
type job struct {
	// plan says what to write, seeing the records as the batches before it leave
	// them. No ops: nothing is to be done. It runs in a round and must not block;
	// the last call counts, if there are several.
	plan func(*view) ([]sallyport.Op, error)
	// touches are the records that plan will look at or write, as far as that is
	// known: they are read in one go.
	touches []Key
	// notes are audited before the ops, with the detail completed by plan.
	notes []sallyport.AuditRecord
	// alone asks for a round of its own: plan looks at the store directly.
	alone bool
	// why is added to the audit of each op: "expired".
	why string

	// revision and err are set before done is closed.
	done     chan struct{}
	revision sallyport.Revision
	err      error
}

func (j *job) finish(rev sallyport.Revision, err error) {
	j.revision, j.err = rev, err
	close(j.done)
}

// Apply implements sallyport.Records. A ctx that ends before the batch's round
// began withdraws the batch; afterwards Apply waits for the outcome.
func (s *Server) Apply(ctx context.Context, batch []sallyport.Op) (sallyport.Revision, error) {
	if err := checkBatch(batch); err != nil {
		return 0, err
	}
	for i := range batch {
		if batch[i].Kind == sallyport.KindLease {
			return 0, refuse("leases are written by Lease alone")
		}
	}
	return s.submit(ctx, admitting(batch))
}

// admitting is the job that writes a batch if its preconditions hold.
func admitting(batch []sallyport.Op) *job {
	j := &job{plan: func(v *view) ([]sallyport.Op, error) { return v.admit(batch) }}
	for i := range batch {
		j.touches = append(j.touches, Key{batch[i].Kind, batch[i].ID})
	}
	return j
}

// submit queues the job and returns once it is durable or refused.
func (s *Server) submit(ctx context.Context, j *job) (sallyport.Revision, error) {
	j.done = make(chan struct{})
	q := &s.queue
	q.mu.Lock()
	q.waiting = append(q.waiting, j)
	q.mu.Unlock()
	for {
		select {
		case <-j.done:
			return j.revision, j.err
		case q.busy <- struct{}{}:
			s.round()
			<-q.busy
		case <-ctx.Done():
			if q.withdraw(j) {
				return 0, ctx.Err()
			}
			<-j.done // a round has it: whoever runs that ends it
			return j.revision, j.err
		}
	}
}

// withdraw takes j out of the queue, unless a round already has it.
func (q *queue) withdraw(j *job) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	for i, w := range q.waiting {
		if w == j {
			q.waiting = append(q.waiting[:i], q.waiting[i+1:]...)
			return true
		}
	}
	return false
}

// take returns the jobs of the next round: a job that wants to be alone, or
// those before the next such one.
func (q *queue) take() []*job {
	q.mu.Lock()
	defer q.mu.Unlock()
	n := min(len(q.waiting), maxGroup)
	for i := range n {
		if q.waiting[i].alone {
			n = max(i, 1)
			break
		}
	}
	jobs := q.waiting[:n:n]
	q.waiting = append([]*job(nil), q.waiting[n:]...)
	return jobs
}

// errStartedOver is why revisions that a plan announced come to nothing when the
// engine asks for the plan again, which announces them anew.
var errStartedOver = &sallyport.Error{
	Outcome: sallyport.OutcomeUnavailable,
	Code:    "storage.started_over",
	Message: "the record store began the write again",
}

// round writes one group of batches. The caller holds queue.busy.
func (s *Server) round() {
	jobs := s.queue.take()
	var v *view
	err := s.alive()
	if err == nil {
		err = s.update(context.Background(), func(tx Tx) (Change, error) {
			if v != nil {
				s.auditFailure(v, errStartedOver)
			}
			var err error
			if v, err = s.view(tx); err != nil {
				return Change{}, err
			}
			if err := v.planAll(jobs); err != nil {
				return Change{}, err
			}
			return v.change()
		})
		if err != nil && v != nil {
			s.auditFailure(v, err)
		}
	}
	for i, j := range jobs {
		switch {
		case v != nil && i < len(v.outcomes) && v.outcomes[i].err != nil:
			j.finish(0, v.outcomes[i].err)
		case err != nil:
			j.finish(0, fmt.Errorf("apply: %w", err))
		default:
			j.finish(v.outcomes[i].revision, nil)
		}
	}
}

// update has the engine carry out a plan and tells the watches what it wrote.
func (s *Server) update(ctx context.Context, plan func(Tx) (Change, error)) error {
	var from sallyport.Revision
	var change Change
	err := s.store.Update(ctx, func(tx Tx) (c Change, err error) {
		from = tx.Head().Revision
		change, err = plan(tx)
		return change, err
	})
	if err != nil {
		return s.check(err)
	}
	if change.Head.Revision > from { // new codes and keys are nobody's news
		s.feed.publish(from, change.Head.Revision, change.Rows)
	}
	return nil
}

// outcome is what becomes of a job if its group is written.
type outcome struct {
	revision sallyport.Revision
	err      error
}

// view is the records as the batches of a group see them: what the batches
// before them write, then the store.
type view struct {
	server   *Server
	tx       Tx
	seal     *sealer
	base     Head
	sum      sum                // of all rows, with what the group writes
	revision sallyport.Revision // of the group's last batch so far
	rows     []Row              // of the group, in order
	ended    []Ending           // by them
	seen     map[Key]*Row       // as the group leaves them; nil: there is none
	outcomes []outcome          // one for each job

	roomAsked bool
	roomErr   error
}

// view opens the head that a plan follows on.
func (s *Server) view(tx Tx) (*view, error) {
	head := tx.Head()
	if err := s.follows(head, s.feed.reached()); err != nil {
		return nil, err
	}
	if err := s.keysFor(head, ringOf(tx)); err != nil {
		return nil, err
	}
	seal := s.sealer.Load()
	total, err := seal.openHead(head)
	if err != nil {
		return nil, s.check(err)
	}
	return &view{server: s, tx: tx, seal: seal, base: head, sum: total, revision: head.Revision, seen: map[Key]*Row{}}, nil
}

// planAll asks each job what to write, having read what they touch.
func (v *view) planAll(jobs []*job) error {
	var keys []Key
	for _, j := range jobs {
		for _, k := range j.touches {
			if _, twice := v.seen[k]; !twice {
				v.seen[k] = nil
				keys = append(keys, k)
			}
		}
	}
	if err := v.read(keys); err != nil {
		return err
	}
	for _, j := range jobs {
		rev, err := v.plan(j)
		v.outcomes = append(v.outcomes, outcome{rev, err})
	}
	return nil
}

// read takes rows in as the store has them.
func (v *view) read(keys []Key) error {
	if len(keys) == 0 {
		return nil
	}
	rows, err := v.tx.Rows(keys...)
	if err != nil {
		return fmt.Errorf("read: %w", v.server.check(err))
	}
	for i := range rows {
		v.seen[rows[i].Key()] = &rows[i]
	}
	return nil
}

// plan adds the job's rows to the group, or nothing.
func (v *view) plan(j *job) (sallyport.Revision, error) {
	ops, err := j.plan(v)
	if err != nil {
		return 0, err
	}
	rev := v.revision
	if len(ops) > 0 {
		rev++
	}
	if !onlyTakesAway(ops) {
		if err := v.room(); err != nil {
			return 0, err
		}
	}
	if err := v.server.auditJob(context.Background(), j, ops, rev); err != nil {
		return 0, err
	}
	return rev, v.add(ops, rev)
}

// change is what the group writes.
func (v *view) change() (Change, error) {
	if len(v.rows) == 0 {
		return Change{}, nil
	}
	head := v.base
	head.Revision = v.revision
	return Change{Rows: v.rows, Ended: v.ended, Head: v.seal.sealHead(head, v.sum)}, nil
}

// room asks the store once for the whole group.
func (v *view) room() error {
	if !v.roomAsked {
		v.roomAsked, v.roomErr = true, v.server.check(v.server.store.Room(context.Background()))
	}
	return v.roomErr
}

// get returns the row as it stands, trusted or not; nil if there is none.
func (v *view) get(k Key) (*Row, error) {
	if row, ok := v.seen[k]; ok {
		return row, nil
	}
	v.seen[k] = nil
	if err := v.read([]Key{k}); err != nil {
		delete(v.seen, k)
		return nil, err
	}
	return v.seen[k], nil
}

// live returns the record if it counts, else nil. A lease counts until it has
// ended by either clock: its end lets somebody else in.
func (v *view) live(k Key) (*sallyport.Record, error) {
	now := v.server.clock.now
	if k.Kind == sallyport.KindLease {
		now = v.server.clock.earlier
	}
	row, err := v.get(k)
	if err != nil || row == nil || !v.server.live(row, now()) {
		return nil, err
	}
	return &row.Record, nil
}

// admit returns the batch's ops that change something, or ErrConflict.
func (v *view) admit(batch []sallyport.Op) ([]sallyport.Op, error) {
	ops := make([]sallyport.Op, 0, len(batch))
	for i := range batch {
		op := &batch[i]
		if op.If != (sallyport.Condition{}) {
			live, err := v.live(Key{op.Kind, op.ID})
			if err != nil {
				return nil, err
			}
			if !holds(op.If, live) {
				return nil, fmt.Errorf("apply %s: %w", op.Kind, sallyport.ErrConflict)
			}
		}
		if op.Delete {
			row, err := v.get(Key{op.Kind, op.ID})
			if err != nil {
				return nil, err
			}
			if row == nil || (row.Deleted && v.server.trusted(row)) {
				continue // nothing is there to delete
			}
		}
		ops = append(ops, *op)
	}
	return ops, nil
}

// add appends the rows that ops leave behind. An error leaves the view as it was.
func (v *view) add(ops []sallyport.Op, rev sallyport.Revision) error {
	for i := range ops { // everything is read before anything is changed
		if _, err := v.get(Key{ops[i].Kind, ops[i].ID}); err != nil {
			return err
		}
	}
	for i := range ops {
		row := v.seal.seal(recordOf(&ops[i], rev))
		old := v.seen[row.Key()]
		if old != nil {
			v.sum.sub(v.seal.term(old))
		}
		if e, ok := v.ends(old, &row); ok {
			v.ended = append(v.ended, e)
		}
		v.sum.add(v.seal.term(&row))
		v.rows = append(v.rows, row)
		v.seen[row.Key()] = &row
	}
	v.revision = rev
	return nil
}
