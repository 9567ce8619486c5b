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
	// revision is the last one written; it belongs to whoever runs a round.
	revision sallyport.Revision

	mu      sync.Mutex
	waiting []*job
}

// job is one batch on its way.
type job struct {
	// plan says what to write, seeing the records as the batches before it leave
	// them. No ops: nothing is to be done. It runs in a round, so it may be
	// called at most once and must not block.
	plan func(*view) ([]sallyport.Op, error)
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
	return s.submit(ctx, &job{plan: func(v *view) ([]sallyport.Op, error) { return v.admit(batch) }})
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

// round writes one group of batches. The caller holds queue.busy.
func (s *Server) round() {
	jobs := s.queue.take()
	if err := s.Ready(); err != nil {
		for _, j := range jobs {
			j.finish(0, err)
		}
		return
	}
	v := &view{ctx: context.Background(), server: s, revision: s.queue.revision, written: map[key]*Row{}}
	var admitted []*job
	for _, j := range jobs {
		if err := s.plan(v, j); err != nil {
			j.finish(0, err)
			continue
		}
		admitted = append(admitted, j)
	}
	err := s.write(v)
	for _, j := range admitted {
		j.finish(j.revision, err)
	}
}

// plan adds the job's rows to the group, or nothing.
func (s *Server) plan(v *view, j *job) error {
	ops, err := j.plan(v)
	if err != nil {
		return err
	}
	rev := v.revision
	if len(ops) > 0 {
		rev++
	}
	if !onlyTakesAway(ops) {
		if err := v.room(); err != nil {
			return err
		}
	}
	if err := s.auditJob(v.ctx, j, ops, rev); err != nil {
		return err
	}
	j.revision = rev
	v.add(ops, rev)
	return nil
}

// write makes the group durable and tells the watches.
func (s *Server) write(v *view) error {
	if len(v.rows) == 0 {
		return nil
	}
	if err := s.store.Write(v.ctx, v.rows); err != nil {
		s.auditFailure(v.ctx, s.queue.revision+1, v.revision, err)
		return fmt.Errorf("apply: %w", s.check(err))
	}
	s.queue.revision = v.revision
	s.feed.publish(v.rows)
	return nil
}

// view is the records as the batches of a group see them: what the batches
// before them write, then the store.
type view struct {
	ctx      context.Context
	server   *Server
	revision sallyport.Revision // of the group's last batch so far
	rows     []Row              // of the group, in order
	written  map[key]*Row       // the group's last row of each record

	roomAsked bool
	roomErr   error
}

// room asks the store once for the whole group.
func (v *view) room() error {
	if !v.roomAsked {
		v.roomAsked, v.roomErr = true, v.server.check(v.server.store.Room(v.ctx))
	}
	return v.roomErr
}

// get returns the row as it stands, trusted or not; nil if there is none.
func (v *view) get(k key) (*Row, error) {
	if row, ok := v.written[k]; ok {
		return row, nil
	}
	row, err := v.server.store.Get(v.ctx, k.kind, k.id)
	if isNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", k.kind, v.server.check(err))
	}
	return &row, nil
}

// live returns the record if it counts, else nil.
func (v *view) live(k key) (*sallyport.Record, error) {
	row, err := v.get(k)
	if err != nil || row == nil || !v.server.live(row, v.server.now()) {
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
			live, err := v.live(key{op.Kind, op.ID})
			if err != nil {
				return nil, err
			}
			if !holds(op.If, live) {
				return nil, fmt.Errorf("apply %s: %w", op.Kind, sallyport.ErrConflict)
			}
		}
		if op.Delete {
			row, err := v.get(key{op.Kind, op.ID})
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

// add appends the rows that ops leave behind.
func (v *view) add(ops []sallyport.Op, rev sallyport.Revision) {
	for i := range ops {
		row := v.server.seal.seal(recordOf(&ops[i], rev))
		v.rows = append(v.rows, row)
		v.written[key{row.Kind, row.ID}] = &row
	}
	v.revision = rev
}
