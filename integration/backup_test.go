package integration

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"sallyport"
	"sallyport/cached"
	"sallyport/cached/postgres/postgrestest"
	"sallyport/integration/stack"
	"sallyport/internal/logging"
	"sallyport/internal/oidcrp/oidcrptest"
	"sallyport/proto/control"
	"sallyport/proto/proof"
)

// TestRestore_WhoWasRevokedStaysOut loses the database and restores the backup of a
// time at which alice was not revoked yet. With the journal she stays out and
// nobody else notices; without it everybody has to log in again.
func TestRestore_WhoWasRevokedStaysOut(t *testing.T) {
	w := newWorldWith(t, stack.Apart, func(c *stack.Config) {
		c.Users[1].Groups = []string{"dba"} // bob
		c.Users = append(c.Users, stack.User{ID: "carol", Email: "carol@test.example", Groups: []string{"dba"}})
	})
	backup := filepath.Join(t.TempDir(), "one.bak")
	alice, bob := w.loggedIn(t, "alice"), w.loggedIn(t, "bob")
	w.Operator("backup", "--config", w.File, "--to", backup)
	w.Operator("sessions", "revoke", "--config", w.File, "--user", "alice@test.example")
	carol := w.loggedIn(t, "carol")
	_, live := openConn(t, bob)

	w.stopCached()
	w.loseDatabase(t)
	said := w.Operator("restore", backup, "--config", w.File).Stdout
	wantWords(t, said, "journal covers revisions ", "1 session ended since the backup stays ended, 1 session lives on", "kept: ", "2 devices (0 revoked)")
	w.startCached()
	if err := stack.Echo(live, "through a restore"); err != nil {
		t.Errorf("bob's connection: %v", err)
	}
	recovers(t, bob)
	for _, a := range []*stack.Agent{alice, carol} { // revoked; logged in after the backup
		mustLogIn(t, a)
	}
	carol.Login()
	recovers(t, carol)

	w.stopCached()
	said = w.Operator("restore", backup, "--config", w.File, "--journal", "none").Stdout
	wantWords(t, said, "no journal covers the time since the backup (--journal none): all 2 sessions are ended; everybody logs in again")
	w.startCached()
	stack.CutWithin(t, live, 10*time.Second)
	for _, a := range []*stack.Agent{alice, bob, carol} {
		mustLogIn(t, a)
	}
	bob.Login()
	recovers(t, bob)
	testAudit(t, w)
}

// mustLogIn is true of an agent whose session is over. Until authd has found cached
// again, a moment after its start, it can only say that it does not know.
func mustLogIn(t *testing.T, a *stack.Agent) {
	t.Helper()
	var r stack.Result
	stack.Eventually(t, 5*time.Second, func() error {
		if r = a.Run("connect", "db.internal:5432", "--listen", "127.0.0.1:0"); r.Exit == stack.ExitUnavailable {
			return errors.New(r.Stderr)
		}
		return nil
	})
	wantExit(t, r, stack.ExitLogin)
}

// stopCached ends cached in order.
func (w *world) stopCached() {
	w.Daemon("cached").Signal(syscall.SIGTERM)
	w.Daemon("cached").Wait(20 * time.Second)
}

// startCached starts cached again. The others follow by themselves.
func (w *world) startCached() {
	w.StartDaemon("cached")
	for _, name := range []string{"cached", "policyd", "gateway", "authd"} {
		w.WaitReady(name)
	}
}

// loseDatabase deletes everything of the store but the journal.
func (w *world) loseDatabase(t *testing.T) {
	t.Helper()
	database := filepath.Join(w.Dir, "data", "cached.db")
	files, err := filepath.Glob(database + "*")
	if err != nil || len(files) < 2 {
		t.Fatalf("found %v, %v; want a database and its journal", files, err)
	}
	for _, file := range files {
		if file == database+".journal" {
			continue
		}
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
	}
}

// TestBackup_UnderLoadIsOneInstant: what was written together is in a backup
// together, however many write meanwhile.
func TestBackup_UnderLoadIsOneInstant(t *testing.T) {
	c := newCachedAlone(t, "")
	records := c.start()
	l := &ledger{slots: map[string]slot{}, revoked: map[string]bool{}}
	ctx, stop := context.WithCancel(t.Context())
	var writers sync.WaitGroup
	for writer := range 4 {
		writers.Go(func() { l.write(ctx, t, "unix:"+c.socket(), writer, 0) })
	}
	defer writers.Wait()
	defer stop()
	for range 10 {
		before := l.count()
		stack.Eventually(t, 20*time.Second, func() error {
			if l.count() < before+50 {
				return errors.New("too few writes")
			}
			return nil
		})
		var backup bytes.Buffer
		if err := records.Backup(t.Context(), &backup); err != nil {
			t.Fatal(err)
		}
		if whole := wholeSlots(t, backup.Bytes()); whole == 0 {
			t.Error("the backup holds none of what is written")
		}
	}
}

// wholeSlots counts the slots in a backup, each of which must be of one batch.
func wholeSlots(t *testing.T, backup []byte) int {
	t.Helper()
	batches := map[string]map[string]int{} // slot → batch → records
	for _, row := range rowsOf(t, backup) {
		if row.Kind != sallyport.KindRecord || row.Deleted {
			continue
		}
		p, err := sallyport.Decode[crashed](row.Record)
		if err != nil {
			t.Fatal(err)
		}
		if batches[p.Slot] == nil {
			batches[p.Slot] = map[string]int{}
		}
		batches[p.Slot][p.Batch]++
	}
	for name, of := range batches {
		if len(of) != 1 {
			t.Errorf("slot %s is half of one batch and half of another: %v", name, of)
		}
		for _, n := range of {
			if n != perBatch {
				t.Errorf("slot %s has %d records; want %d", name, n, perBatch)
			}
		}
	}
	return len(batches)
}

func rowsOf(t *testing.T, backup []byte) (rows []cached.Row) {
	t.Helper()
	err := cached.ReadBackup(bytes.NewReader(backup), func(cached.BackupInfo) error { return nil }, func(row cached.Row) error {
		rows = append(rows, row)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return rows
}

// TestCase_L13_NoSecretInABackup scans a backup, byte by byte, that was taken while
// people were logged in and logging in through a real authd: none of what they or
// the identity provider gave it is in there to be read.
func TestCase_L13_NoSecretInABackup(t *testing.T) {
	idp := oidcrptest.New(t)
	idp.Claims = func(claims map[string]any) { claims["email"] = "alice@test.example" }
	canaries := map[string]string{"refresh token": "refresh-canary-7Q2M", "access token": "access-canary-9X4K", "client secret": oidcrptest.Secret}
	var mu sync.Mutex
	keep := func(what, secret string) {
		mu.Lock()
		defer mu.Unlock()
		if secret == "" {
			t.Errorf("there was no %s", what)
		}
		canaries[what] = secret
	}
	idp.Token = func(answer map[string]any) {
		answer["refresh_token"], answer["access_token"] = canaries["refresh token"], canaries["access token"]
		keep("ID token", answer["id_token"].(string))
	}
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte(oidcrptest.Secret), 0o600); err != nil {
		t.Fatal(err)
	}
	s := stack.Start(t, stack.Apart, stack.Config{
		IDP: map[string]any{"issuer": idp.Issuer(), "client_id": oidcrptest.ClientID, "client_secret_file": secret},
	})
	alice := s.NewAgent(t, "alice")
	alice.Login()
	// A second login stops half-way: its code is given out and not redeemed.
	device, err := proof.KeyOf(newKey(t).Public())
	if err != nil {
		t.Fatal(err)
	}
	code, _, verifier := authorize(t, s, "alice", device)
	keep("code", code)
	keep("code verifier", verifier)
	keep("state at the identity provider", idp.LastQuery().Get("state"))
	keep("nonce", idp.LastQuery().Get("nonce"))

	path := filepath.Join(t.TempDir(), "one.bak")
	s.Operator("backup", "--config", s.File, "--to", path)
	backup, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	kinds := map[sallyport.Kind]int{}
	for _, row := range rowsOf(t, backup) {
		if !row.Deleted {
			kinds[row.Kind]++
		}
	}
	for _, kind := range []sallyport.Kind{sallyport.KindSession, sallyport.KindIDPToken, sallyport.KindCode} {
		if kinds[kind] == 0 {
			t.Errorf("the backup holds no %s", kind)
		}
	}
	if !bytes.Contains(backup, []byte("alice@test.example")) {
		t.Error("the scan does not find what is no secret either")
	}
	key, err := os.ReadFile(filepath.Join(s.Dir, "data", "keys", "records.key"))
	if err != nil {
		t.Fatal(err)
	}
	keep("records key", string(key))
	for _, name := range []string{"PRIVATE KEY", "BEGIN EC"} {
		canaries[name] = name
	}
	for what, canary := range canaries {
		if bytes.Contains(backup, []byte(canary)) {
			t.Errorf("the backup holds the %s in the clear", what)
		}
	}
}

// TestRestore_AcrossEngines takes records from SQLite to PostgreSQL and back. With
// the journal of the SQLite store, sessions come along.
func TestRestore_AcrossEngines(t *testing.T) {
	db := postgrestest.Start(t)
	sqlite := newCachedAlone(t, "")
	sqlite.fill("first", 1500)
	for _, id := range []string{"stays", "ends"} {
		if _, err := sqlite.Records().Apply(t.Context(), []sallyport.Op{sallyport.Put(sallyport.KindSession, id, sallyport.Session{ID: sallyport.SessionID(id)})}); err != nil {
			t.Fatal(err)
		}
	}
	first := sqlite.backup()
	if _, err := sqlite.Records().Revoke(t.Context(), sallyport.Revocation{Subjects: []sallyport.Subject{{Kind: sallyport.SubjectSession, ID: "ends"}}}); err != nil {
		t.Fatal(err)
	}
	reached := sqlite.fill("lost", 4500)
	sqlite.stop()

	postgres := sqlite.on(fmt.Sprintf(`store: %q, store_password_file: %q`, db.URL(db.Database(t)), db.PasswordFile()))
	journal := filepath.Join(sqlite.dir, "data", "cached.db.journal")
	wantWords(t, postgres.operator(0, "restore", first, "--config", postgres.file, "--journal", journal).Stdout,
		"1 session ended since the backup stays ended, 1 session lives on")
	postgres.start()
	postgres.holds("first", 1500)
	if list, err := postgres.Records().List(t.Context(), sallyport.KindSession); err != nil || len(list) != 1 || list[0].ID != "stays" {
		t.Errorf("got sessions %v, %v; want the one that was not revoked", list, err)
	}
	postgres.fill("second", 1500)
	second := postgres.backup()
	// Once more into a database that is in use: what was there goes, and all of it.
	postgres.operator(1, "restore", first, "--config", postgres.file)
	postgres.stop()
	wantWords(t, postgres.operator(0, "restore", first, "--config", postgres.file).Stdout, "no journal covers the time since the backup (PostgreSQL has none)")
	postgres.start()
	postgres.holds("first", 1500)
	postgres.stop()

	wantWords(t, sqlite.operator(0, "restore", second, "--config", sqlite.file).Stdout, "no journal covers the time since the backup")
	sqlite.start()
	sqlite.holds("second", 1500)
	if next := sqlite.fill("third", 1); next <= reached {
		t.Errorf("revision %d was given out again: %d was before", next, reached)
	}
	sqlite.stop()
}

// TestRestore_InPlaceTakesAnOlderFile: an older copy of the database is refused, and
// taken with every session ended once the operator says so.
func TestRestore_InPlaceTakesAnOlderFile(t *testing.T) {
	c := newCachedAlone(t, "")
	c.fill("first", 10)
	records := c.start()
	if _, err := records.Apply(t.Context(), []sallyport.Op{sallyport.Put(sallyport.KindSession, "s1", sallyport.Session{ID: "s1"})}); err != nil {
		t.Fatal(err)
	}
	c.stop()
	database := filepath.Join(c.dir, "data", "cached.db")
	old, err := os.ReadFile(database)
	if err != nil {
		t.Fatal(err)
	}
	reached := c.fill("second", 1500)
	c.stop()
	if err := os.WriteFile(database, old, 0o600); err != nil {
		t.Fatal(err)
	}
	refused := stack.Run(t, stack.Command{Program: "cached", Args: []string{"--config", c.file}})
	wantExit(t, refused, 1)
	wantWords(t, refused.Stderr, "storage.rolled_back", "sallyport restore --in-place --config FILE")
	wantWords(t, c.operator(0, "restore", "--in-place", "--config", c.file).Stdout, "the store is taken as it is: the only session is ended")
	records = c.start()
	c.holds("first", 10)
	if list, err := records.List(t.Context(), sallyport.KindSession); err != nil || len(list) > 0 {
		t.Errorf("got sessions %v, %v; want none", list, err)
	}
	if next := c.fill("third", 10); next <= reached {
		t.Errorf("revision %d was given out again: %d was before", next, reached)
	}
	c.stop()
}

// TestRestore_KilledAtAnyMoment kills restores: afterwards there is the old store
// or the new one, and another restore completes.
func TestRestore_KilledAtAnyMoment(t *testing.T) {
	const rounds, size = 24, 3000
	c := newCachedAlone(t, "")
	backups := map[string]string{}
	names := []string{"even", "odd"}
	for _, name := range names {
		c.fill(name, size)
		backups[name] = c.backup()
		c.stop()
	}
	began := time.Now()
	c.operator(0, "restore", backups["even"], "--config", c.file)
	whole := time.Since(began)
	was, became := "even", map[string]int{}
	for n := range rounds {
		next := names[(n+1)%2]
		p := stack.StartProcess(t, stack.Command{Program: "sallyport", Args: []string{"restore", backups[next], "--config", c.file}})
		at := time.Duration(rand.Int64N(int64(whole)))
		select {
		case <-time.After(at):
			p.Signal(syscall.SIGKILL)
		case <-p.Done():
		}
		p.Wait(20 * time.Second)
		c.start()
		got := c.which()
		if got != was && got != next {
			t.Fatalf("round %d, killed after %s: the store holds %q; want %q or %q", n, at, got, was, next)
		}
		c.holds(got, size)
		c.stop()
		became[map[bool]string{true: "new", false: "old"}[got == next]]++
		c.operator(0, "restore", backups[next], "--config", c.file)
		was = next
	}
	t.Logf("%d kills within %s: %v", rounds, whole.Round(time.Millisecond), became)
	if became["old"] == 0 {
		t.Error("no kill came before the end")
	}
	c.start()
	c.holds(was, size)
	c.stop()
}

// cachedAlone is a cached without the other daemons.
type cachedAlone struct {
	t    *testing.T
	dir  string
	file string
	p    *stack.Process // nil: it is stopped
	*control.Client
}

// newCachedAlone makes one, with more in the section cached.
func newCachedAlone(t *testing.T, more string) *cachedAlone {
	t.Helper()
	c := (&cachedAlone{t: t, dir: t.TempDir()}).on(more)
	c.operator(0, "init", "--config", c.file)
	return c
}

// on is another configuration for the same data_dir.
func (c *cachedAlone) on(more string) *cachedAlone {
	c.t.Helper()
	other := &cachedAlone{t: c.t, dir: c.dir, file: filepath.Join(c.dir, fmt.Sprintf("sallyport-%d.yaml", len(more)))}
	section := fmt.Sprintf("cached: {listen: \"127.0.0.1:0\", %s}\n", more)
	if err := os.WriteFile(other.file, fmt.Appendf(nil, siteConfig, "", issuer, section), 0o600); err != nil {
		c.t.Fatal(err)
	}
	return other
}

func (c *cachedAlone) socket() string { return filepath.Join(c.dir, "data", "cached.sock") }

// start starts it, unless it runs.
func (c *cachedAlone) start() *control.Records {
	c.t.Helper()
	if c.p == nil {
		c.p = stack.StartProcess(c.t, stack.Command{Program: "cached", Args: []string{"--config", c.file}})
		if line := c.p.Line(20 * time.Second); !strings.HasPrefix(line, "ready ") {
			c.t.Fatalf("cached: no ready line but %q\n%s", line, c.p.Stderr())
		}
		client, err := control.Dial([]string{"unix:" + c.socket()}, nil, logging.Discard())
		if err != nil {
			c.t.Fatal(err)
		}
		c.t.Cleanup(func() { client.Close() })
		c.Client = client
		stack.Eventually(c.t, 10*time.Second, func() error { // PostgreSQL is asked first whether it is the primary
			_, err := c.Records().List(c.t.Context(), sallyport.KindConfig)
			return err
		})
	}
	return c.Records()
}

func (c *cachedAlone) stop() {
	c.t.Helper()
	c.Close()
	c.p.Signal(syscall.SIGTERM)
	if code := c.p.Wait(20 * time.Second); code != 0 {
		c.t.Fatalf("cached: exit code %d\n%s", code, c.p.Stderr())
	}
	c.p = nil
}

// operator runs the operator's tool and wants the exit code.
func (c *cachedAlone) operator(exit int, args ...string) stack.Result {
	c.t.Helper()
	r := stack.Run(c.t, stack.Command{Program: "sallyport", Args: args})
	if r.Exit != exit {
		c.t.Fatalf("sallyport %s: exit code %d; want %d\n%s%s", strings.Join(args, " "), r.Exit, exit, r.Stderr, r.Stdout)
	}
	return r
}

// fill writes n records that say the name, in the place of all others, and returns
// the revision of the last ones.
func (c *cachedAlone) fill(name string, n int) (last sallyport.Revision) {
	c.t.Helper()
	records := c.start()
	const group = 500
	for from := 0; from < n; from += group {
		var batch []sallyport.Op
		for i := from; i < min(n, from+group); i++ {
			batch = append(batch, sallyport.Put(sallyport.KindRecord, fmt.Sprintf("which/%d", i), map[string]string{"which": name}))
		}
		var err error
		if last, err = records.Apply(c.t.Context(), batch); err != nil {
			c.t.Fatal(err)
		}
	}
	return last
}

// backup takes a backup into a file.
func (c *cachedAlone) backup() string {
	c.t.Helper()
	path := filepath.Join(c.t.TempDir(), "backup")
	c.operator(0, "backup", "--config", c.file, "--to", path)
	c.operator(0, "backup", "verify", path, "--config", c.file)
	return path
}

// which is the name that the first record says.
func (c *cachedAlone) which() string {
	c.t.Helper()
	r, err := c.Records().Get(c.t.Context(), sallyport.KindRecord, "which/0")
	if err != nil {
		c.t.Fatal(err)
	}
	said, err := sallyport.Decode[map[string]string](r)
	if err != nil {
		c.t.Fatal(err)
	}
	return said["which"]
}

// holds wants n records that say the name, and no others.
func (c *cachedAlone) holds(name string, n int) {
	c.t.Helper()
	list, err := c.Records().List(c.t.Context(), sallyport.KindRecord)
	if err != nil || len(list) != n {
		c.t.Fatalf("got %d records, %v; want %d", len(list), err, n)
	}
	for _, r := range list {
		said, err := sallyport.Decode[map[string]string](r)
		if err != nil || said["which"] != name {
			c.t.Fatalf("%s says %v, %v; want %q", r.ID, said, err, name)
		}
	}
}
