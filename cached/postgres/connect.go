package postgres

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"sallyport/internal/logging"
	"sallyport/internal/tlsid"
)

// defaultSchema is where the tables lie, unless the URL has a search_path.
const defaultSchema = "sallyport"

// settings of each connection. A cached that stops in the middle of a transaction
// (SIGSTOP, a cut cable) holds everybody up for idle_in_transaction_session_timeout.
// The plans are the same whether a table is empty or has a million rows, because a
// plan that was made for an empty table would be used until the next ANALYZE.
var settings = map[string]string{
	"lock_timeout":                        "2s",
	"statement_timeout":                   "10s",
	"idle_in_transaction_session_timeout": "5s",
	"default_transaction_isolation":       "read committed",
	"timezone":                            "UTC",
	"enable_seqscan":                      "off",
	"enable_hashjoin":                     "off",
	"enable_mergejoin":                    "off",
	"jit":                                 "off",
}

// newPool returns the connections, none of them made yet.
func newPool(cfg Config) (*pgxpool.Pool, *primary, error) {
	c, err := pgxpool.ParseConfig(cfg.URL)
	if err != nil {
		return nil, nil, errors.New("cached.store: PostgreSQL's URL cannot be read") // the error may quote a password
	}
	params := c.ConnConfig.RuntimeParams
	for name, value := range settings {
		params[name] = value
	}
	if params["application_name"] == "" {
		params["application_name"] = "sallyport-cached"
	}
	params["search_path"] = cmp.Or(cfg.schema, params["search_path"], defaultSchema)
	p := &primary{schema: params["search_path"], sole: cfg.sole, several: len(c.ConnConfig.Fallbacks) > 0, log: cfg.Log}
	if c.ConnConfig.ConnectTimeout == 0 || c.ConnConfig.ConnectTimeout > 2*time.Second {
		c.ConnConfig.ConnectTimeout = 2 * time.Second
	}
	c.ConnConfig.OnNotice = noteWarning
	c.BeforeConnect = func(_ context.Context, cc *pgx.ConnConfig) error {
		p.guard(&cc.Config)
		return readPassword(cfg.PasswordFile, &cc.Config)
	}
	c.MaxConns, c.MaxConnIdleTime, c.MaxConnLifetime = maxConns, time.Minute, time.Hour
	c.MaxConnLifetimeJitter, c.PingTimeout = 10*time.Minute, 2*time.Second
	pool, err := pgxpool.NewWithConfig(context.Background(), c)
	if err != nil {
		return nil, nil, fmt.Errorf("cached.store: %w", err)
	}
	return pool, p, nil
}

// readPassword takes the password as the file has it now.
func readPassword(path string, c *pgconn.Config) error {
	if path == "" {
		return nil
	}
	text, err := tlsid.ReadKeyFile(path)
	if err != nil {
		return passed{fmt.Errorf("cached.store_password_file: %w", err)}
	}
	c.Password = strings.TrimRight(string(text), "\r\n")
	return nil
}

// primary says which servers may be talked to.
type primary struct {
	schema  string
	sole    bool // nobody else shall use the store
	several bool // hosts in the URL
	log     logging.Logger

	mu       sync.Mutex // guards what follows
	timeline string     // the highest seen; they have all the same length
	shunned  string     // the address of a server that could not confirm
}

// guard has a new connection lead to the primary or nowhere. Once it is there,
// nothing is dialled for it any more: the driver would have PostgreSQL cancel what
// takes too long, and a commit that waits for its standby would go through without.
func (p *primary) guard(c *pgconn.Config) {
	var connected atomic.Bool
	dial := c.DialFunc
	c.DialFunc = func(ctx context.Context, network, addr string) (net.Conn, error) {
		if connected.Load() {
			return nil, errors.New("a statement is left to its own timeout")
		}
		if p.shuns(addr) {
			return nil, errors.New("its synchronous standby does not answer")
		}
		return dial(ctx, network, addr)
	}
	c.ValidateConnect = func(ctx context.Context, conn *pgconn.PgConn) error {
		err := p.check(ctx, conn)
		if err == nil {
			err = p.enter(ctx, conn)
		}
		connected.Store(err == nil)
		return err
	}
}

// asking also sees to it that a commit is a promise: with synchronous_commit off
// or local, it is none when the primary is lost.
const asking = `SELECT pg_is_in_recovery(), current_setting('transaction_read_only'),
	CASE WHEN pg_is_in_recovery() THEN '' ELSE substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8) END,
	CASE WHEN current_setting('synchronous_commit') IN ('off', 'local') THEN set_config('synchronous_commit', 'on', false) END`

// check refuses a server that is not the primary, so that the next host of the
// URL is tried.
func (p *primary) check(ctx context.Context, conn *pgconn.PgConn) error {
	results, err := conn.Exec(ctx, asking).ReadAll()
	if err != nil {
		return err
	}
	answer := results[0].Rows[0]
	p.mu.Lock()
	defer p.mu.Unlock()
	timeline := string(answer[2])
	switch {
	case string(answer[0]) != "f":
		return errors.New("it is a standby")
	case string(answer[1]) != "off":
		return errors.New("it takes no writes")
	case timeline < p.timeline:
		return errors.New("another server was promoted in its place")
	}
	if p.timeline != "" && p.timeline != timeline {
		p.log.Info("PostgreSQL has a new primary", "timeline", timeline)
	}
	p.timeline = timeline
	return nil
}

// enter has the connection hold the store's lock of use for as long as it lasts:
// together with others, or alone.
func (p *primary) enter(ctx context.Context, conn *pgconn.PgConn) error {
	text := `SELECT pg_try_advisory_lock_shared($1, hashtext($2))`
	if p.sole {
		text = `SELECT pg_try_advisory_lock($1, hashtext($2))`
	}
	args := [][]byte{[]byte(strconv.Itoa(advisoryUse)), []byte(p.schema)}
	answer := conn.ExecParams(ctx, text, args, nil, nil, nil).Read()
	switch {
	case answer.Err != nil:
		return answer.Err
	case string(answer.Rows[0][0]) == "t":
		return nil
	case p.sole:
		return passed{inUse()}
	}
	return errors.New("another store is about to take its place")
}

// shun has the other hosts tried first, and reports whether there are any.
func (p *primary) shun(conn *pgconn.PgConn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.several {
		p.shunned = conn.Conn().RemoteAddr().String()
	}
	return p.several
}

func (p *primary) shuns(addr string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.shunned == addr
}

// forgive takes back shun.
func (p *primary) forgive() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.shunned = ""
}

const warningsKey = "warnings"

// noteWarning counts warnings: one at a commit means that it was not replicated.
func noteWarning(conn *pgconn.PgConn, n *pgconn.Notice) {
	if n.SeverityUnlocalized == "WARNING" {
		count, _ := conn.CustomData()[warningsKey].(int)
		conn.CustomData()[warningsKey] = count + 1
	}
}

func warnings(conn *pgx.Conn) int {
	count, _ := conn.PgConn().CustomData()[warningsKey].(int)
	return count
}

// read runs a short read, again if it was not PostgreSQL's answer but its absence
// that ended it.
func (s *Store) read(ctx context.Context, do func(context.Context, *pgx.Conn) error) error {
	return s.attempt(ctx, readFor, func(ctx context.Context, conn *pgx.Conn) error {
		ctx, cancel := context.WithTimeout(ctx, attemptFor)
		defer cancel()
		return do(ctx, conn)
	})
}

// Pauses between two attempts.
const (
	pauseMin = 10 * time.Millisecond
	pauseMax = 200 * time.Millisecond
)

// attempt runs do on a connection, until it succeeds or fails for good. The
// context that do gets ends with patience, after which there is no other attempt.
func (s *Store) attempt(ctx context.Context, patience time.Duration, do func(context.Context, *pgx.Conn) error) error {
	bounded, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	var failed error // the last attempt's; later ones may only run out of time
	for pause := pauseMin; ; pause = min(2*pause, pauseMax) {
		err := s.once(bounded, do)
		var p passed
		switch {
		case err == nil:
			return nil
		case errors.As(err, &p):
			return p.error
		case ctx.Err() != nil:
			return ctx.Err()
		case !transient(err):
			return classify(ctx, err)
		case bounded.Err() == nil || failed == nil:
			failed = err
		}
		select {
		case <-bounded.Done():
			return classify(ctx, failed)
		case <-time.After(pause):
		}
	}
}

// once runs do on a connection of the pool. One that is not idle afterwards is
// closed.
func (s *Store) once(ctx context.Context, do func(context.Context, *pgx.Conn) error) error {
	conn, err := s.pool.Acquire(ctx)
	if err != nil {
		s.primary.forgive() // there is no other
		return err
	}
	defer conn.Release()
	return do(ctx, conn.Conn())
}

// passed is an error that is none of PostgreSQL's.
type passed struct{ error }

func pass(err error) error {
	if err == nil {
		return nil
	}
	return passed{err}
}
