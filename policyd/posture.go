package policyd

import (
	"cmp"
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"sallyport"

	"golang.org/x/time/rate"
)

const (
	postureEvery = time.Second // at most one write a device in this time …
	postureBurst = 3           // … beyond the first few
	postureTries = 3           // writes of one report that met another's
)

// desk accepts posture reports, one device at a time.
type desk struct {
	mu      sync.Mutex
	devices map[sallyport.DeviceID]*deviceDesk
}

// deviceDesk is where the reports of one device wait to be written.
type deviceDesk struct {
	turn    chan struct{} // capacity 1: held while writing
	limiter *rate.Limiter

	mu       sync.Mutex
	sequence int64 // of the last accepted report, written or not
	writing  bool
	waiting  *posting // nil: nothing waits
	lastUsed time.Time
}

// posting is a report on its way; newer reports take its place until it is
// written, so a device that flips ten times a second writes once.
type posting struct {
	posture sallyport.Posture
	done    chan struct{}
	err     error // set before done is closed
}

func (d *desk) of(id sallyport.DeviceID) *deviceDesk {
	d.mu.Lock()
	defer d.mu.Unlock()
	dev := d.devices[id]
	if dev == nil {
		dev = &deviceDesk{turn: make(chan struct{}, 1), limiter: rate.NewLimiter(rate.Every(postureEvery), postureBurst)}
		if d.devices == nil {
			d.devices = make(map[sallyport.DeviceID]*deviceDesk)
		}
		d.devices[id] = dev
	}
	dev.mu.Lock()
	dev.lastUsed = time.Now()
	dev.mu.Unlock()
	return dev
}

// tidy forgets devices that have not reported for so long that any report of
// theirs that was recorded is refused for its age.
func (d *desk) tidy(ctx context.Context, ttl func() time.Duration) error {
	t := time.NewTicker(time.Minute)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
		d.mu.Lock()
		for id, dev := range d.devices {
			dev.mu.Lock()
			if dev.waiting == nil && !dev.writing && time.Since(dev.lastUsed) > 2*ttl()+time.Minute {
				delete(d.devices, id)
			}
			dev.mu.Unlock()
		}
		d.mu.Unlock()
	}
}

// ReportPosture implements sallyport.PostureSink. A changed report is written to
// cached at once, up to three in a row and then one each second; an unchanged
// one only when the stored one has lived a third of the time for which it counts.
func (s *Server) ReportPosture(ctx context.Context, session sallyport.SessionID, jws string) error {
	err := s.reportPosture(ctx, session, jws)
	s.metrics.reports.Inc(reportWord(err))
	return err
}

// reportWord is how the figures name the end of a report.
func reportWord(err error) string {
	if err == nil {
		return "ok"
	}
	return cmp.Or(sallyport.CodeOf(err), "error")
}

func (s *Server) reportPosture(ctx context.Context, session sallyport.SessionID, jws string) error {
	v, err := s.view()
	if err != nil {
		return err
	}
	p, err := s.accept(v, session, jws)
	if err != nil {
		return err
	}
	dev := s.desk.of(p.Device)
	wait, err := dev.join(p, &s.snap)
	if err != nil || wait == nil {
		return err
	}
	for {
		select {
		case <-wait.done:
			return wait.err
		case <-ctx.Done():
			return ctx.Err()
		case dev.turn <- struct{}{}:
			err := s.writeNext(ctx, dev)
			<-dev.turn
			if err != nil {
				return postureUnavailable(err)
			}
		}
	}
}

// join accepts p's sequence and puts it in line; nil if the report that governs
// says the same and is fresh enough.
func (dev *deviceDesk) join(p sallyport.Posture, current *atomic.Pointer[snapshot]) (*posting, error) {
	dev.mu.Lock()
	defer dev.mu.Unlock()
	snap := current.Load() // under the lock: a write that just ended is in it
	stored, _ := snap.postures.get(string(p.Device))
	if stored != nil {
		dev.sequence = max(dev.sequence, stored.value.Sequence)
	}
	if p.Sequence <= dev.sequence {
		return nil, refusePosture("posture.replayed", "the report is not newer than the last one")
	}
	dev.sequence = p.Sequence
	quiet := dev.waiting == nil && !dev.writing
	if quiet && stored != nil && sameFacts(stored.value.Facts, p.Facts) &&
		!stored.expired(p.Received) && p.Received.Sub(stored.value.Received) < snap.rules.renewal {
		return nil, nil
	}
	if dev.waiting == nil {
		dev.waiting = &posting{done: make(chan struct{})}
	}
	dev.waiting.posture = p
	return dev.waiting, nil
}

// writeNext writes what waits at the device, at the device's pace. The caller
// holds the device's turn. An error means that ctx leaves no time for it.
func (s *Server) writeNext(ctx context.Context, dev *deviceDesk) error {
	dev.mu.Lock()
	idle := dev.waiting == nil
	dev.mu.Unlock()
	if idle {
		return nil
	}
	if err := dev.limiter.Wait(ctx); err != nil {
		return err
	}
	dev.mu.Lock()
	next := dev.waiting
	dev.waiting, dev.writing = nil, true
	dev.mu.Unlock()
	next.err = s.writePosture(ctx, next.posture)
	dev.mu.Lock()
	dev.writing = false
	dev.mu.Unlock()
	close(next.done)
	return nil
}

// writePosture writes p unless something newer is there, and returns when the
// own snapshot has it.
func (s *Server) writePosture(ctx context.Context, p sallyport.Posture) error {
	snap := s.snap.Load()
	stored, _ := snap.postures.get(string(p.Device))
	cond := sallyport.Condition{Absent: true}
	if stored != nil && !stored.expired(time.Now()) {
		cond = sallyport.Condition{Revision: stored.revision}
	}
	for range postureTries {
		op := sallyport.Put(sallyport.KindPosture, string(p.Device), p)
		op.If = cond
		rev, err := s.records.Apply(ctx, []sallyport.Op{op})
		if err == nil {
			return s.await(ctx, snap.epoch, rev)
		}
		if !errors.Is(err, sallyport.ErrConflict) {
			return postureUnavailable(err)
		}
		if cond, err = s.overtaken(ctx, p); err != nil {
			return err
		}
	}
	return postureUnavailable(sallyport.ErrConflict)
}

// overtaken looks at what another policyd wrote meanwhile and returns the
// condition for the next try.
func (s *Server) overtaken(ctx context.Context, p sallyport.Posture) (sallyport.Condition, error) {
	rec, err := s.records.Get(ctx, sallyport.KindPosture, string(p.Device))
	if errors.Is(err, sallyport.ErrNotFound) {
		return sallyport.Condition{Absent: true}, nil
	}
	if err != nil {
		return sallyport.Condition{}, postureUnavailable(err)
	}
	if stored, err := sallyport.Decode[sallyport.Posture](rec); err == nil && stored.Sequence >= p.Sequence {
		return sallyport.Condition{}, refusePosture("posture.replayed", "the report is not newer than the last one")
	}
	return sallyport.Condition{Revision: rec.Revision}, nil
}

func postureUnavailable(err error) error {
	e := unavailable("posture.unavailable", "the report could not be stored")
	e.Err = err
	return e
}

func refusePosture(code, message string) *sallyport.Error { return usage(code, message) }
