package sqlite

// CheckpointAt has the log written back from that many pages on.
func CheckpointAt(s *Store, pages int) { s.wal.checkpointAt = pages }

// ApplicationID is what the header of each of our files says.
const ApplicationID = applicationID

// Migration returns the statements that lead from schema v to v+1.
func Migration(v int) []string { return migration(v) }

// Small is the configuration of a store that opens quickly, because nothing is
// reserved for revocations.
func Small() Config { return Config{reserve: 1, journal: 64 << 10} }

// NoJournal is the configuration of a store without a journal.
func NoJournal() Config { return Config{journal: -1} }

// BreakJournal has the journal's next write fail.
func BreakJournal(s *Store) { s.journal.f.Close() }

// Stepping has step told before each step of a replacement.
func Stepping(cfg Config, step func()) Config {
	cfg.step = step
	return cfg
}
