package postgres

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"

	"sallyport/cached"
)

const (
	// listenFor is how long the listener believes in its connection without a
	// sign of life.
	listenFor = 10 * time.Second
	// aloneFor is how long nobody else must have written for our own writes to be
	// no news.
	aloneFor = time.Second
)

// Wait implements cached.Shared.
func (s *Store) Wait(ctx context.Context, max time.Duration) error {
	s.listening.Do(func() {
		s.listener.Go(s.listen)
	})
	timer := time.NewTimer(max)
	defer timer.Stop()
	select {
	case <-s.wake:
	case <-timer.C:
	case <-ctx.Done():
		return ctx.Err()
	}
	return nil
}

// Confirm implements cached.Shared: a commit that the synchronous standby must
// acknowledge, and with it everything before.
func (s *Store) Confirm(ctx context.Context) error {
	return s.attempt(ctx, confirmFor, func(ctx context.Context, conn *pgx.Conn) error {
		var b pgx.Batch
		var head cached.Head
		b.Queue(`BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE`)
		b.Queue(selectHead).QueryRow(func(row pgx.Row) (err error) {
			head, err = readHead(row)
			return err
		})
		b.Queue(putBeat, s.id)
		if err := s.commit(ctx, conn, &b); err != nil {
			return err
		}
		s.knows(head)
		return nil
	})
}

const putBeat = `INSERT INTO server (id, write, beat) VALUES ($1, 0, now()) ON CONFLICT (id) DO UPDATE SET beat = excluded.beat`

// listen wakes Wait at each notification until the store is closed. While there is
// no connection, followers look by themselves now and then.
func (s *Store) listen() {
	for s.ended.Err() == nil {
		if err := s.hear(s.ended); err != nil && s.ended.Err() == nil {
			s.log.Debug("notifications are not heard", "error", err)
		}
		select {
		case <-s.ended.Done():
		case <-time.After(pauseMax):
		}
	}
}

// hear listens on a connection of its own for as long as that lasts.
func (s *Store) hear(ctx context.Context) error {
	pooled, err := s.pool.Acquire(ctx)
	if err != nil {
		return err
	}
	conn := pooled.Hijack()
	defer conn.Close(context.WithoutCancel(ctx))
	if _, err := conn.Exec(ctx, `LISTEN `+pgx.Identifier{s.schema}.Sanitize()); err != nil {
		return err
	}
	s.wakeUp() // what came before was not heard
	var others time.Time
	for {
		wait, cancel := context.WithTimeout(ctx, listenFor)
		n, err := conn.WaitForNotification(wait)
		silent := wait.Err() != nil
		cancel()
		switch {
		case err == nil && n.Payload != s.id:
			others = time.Now()
			s.wakeUp()
		case err == nil:
			if time.Since(others) < aloneFor {
				s.wakeUp()
			}
		case !silent || ctx.Err() != nil:
			return err
		default:
			check, cancel := context.WithTimeout(ctx, confirmFor)
			err := s.primary.check(check, conn.PgConn())
			cancel()
			if err != nil {
				return err
			}
		}
	}
}

func (s *Store) wakeUp() {
	select {
	case s.wake <- struct{}{}:
	default: // it is awake
	}
}
