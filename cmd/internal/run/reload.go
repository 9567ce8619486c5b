package run

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"sallyport"
	"sallyport/cmd/internal/config"
)

const (
	// pollEvery leaves most of the second in which a change has to take effect to
	// what it costs to load and to decide again.
	pollEvery = 200 * time.Millisecond
	// retryEvery is when a change is tried again that only the moment kept from
	// being taken.
	retryEvery = 2 * time.Second
)

// OnReload has f called with each changed, valid configuration. Every f must
// take the whole change or nothing of it.
func (p *Process) OnReload(f func(*config.File) error) { p.reloads = append(p.reloads, f) }

// ReloadOn has the configuration read again when another file changes, too: one
// that the configuration names or implies.
func (p *Process) ReloadOn(file string) { p.watched = append(p.watched, file) }

// OnRefused has f called with why a changed file was not taken, and with nil once
// one was. A refusal that only the moment is to blame for is not told.
func (p *Process) OnRefused(f func(context.Context, error)) { p.refusals = append(p.refusals, f) }

// Stale returns why the file that lies there now is not what the process runs
// with; nil if it is.
func (p *Process) Stale() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.stale
}

// watch takes changes of the file over, on SIGHUP and when it changes on disk.
// began is the stamp of what the process was started with.
func (p *Process) watch(file, began string) func(context.Context) error {
	seen := p.stampsWith(began)
	return func(ctx context.Context) error {
		hup := make(chan os.Signal, 1)
		signal.Notify(hup, syscall.SIGHUP)
		defer signal.Stop(hup)
		tick := time.NewTicker(pollEvery)
		defer tick.Stop()
		running := p.Config
		var again time.Time // zero: no need
		for {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-hup:
			case now := <-tick.C:
				if p.stamps(file) == seen && (again.IsZero() || now.Before(again)) {
					continue
				}
			}
			seen, again = p.stamps(file), time.Time{}
			next, err := p.reload(running, file)
			p.settle(ctx, err)
			if err != nil {
				p.Log.Error("configuration not taken, the old one stays", "file", file, "error", err)
				if passing(err) {
					again = time.Now().Add(retryEvery)
				}
				continue
			}
			running = next
		}
	}
}

// settle notes how a change ended, and tells those who want to know.
func (p *Process) settle(ctx context.Context, err error) {
	p.mu.Lock()
	p.stale = err
	p.mu.Unlock()
	if err != nil && passing(err) {
		return
	}
	for _, f := range p.refusals {
		f(ctx, err)
	}
}

// passing reports whether a change that was not taken may be later, as it is:
// cached was away, or somebody else wrote at the same time.
func passing(err error) bool {
	return sallyport.OutcomeOf(err) == sallyport.OutcomeUnavailable ||
		errors.Is(err, sallyport.ErrConflict) || errors.Is(err, context.DeadlineExceeded)
}

// reload returns the configuration that is in force afterwards.
func (p *Process) reload(running *config.File, file string) (*config.File, error) {
	next, err := config.Load(file, p.Name)
	if err != nil {
		return nil, err
	}
	changed, fixed := config.Changed(running, next)
	if len(fixed) > 0 {
		p.Log.Warn("changed keys need a restart", "keys", strings.Join(fixed, ", "))
	}
	for _, f := range p.reloads {
		if err := f(next); err != nil {
			return nil, fmt.Errorf("reload: %w", err)
		}
	}
	p.Log.Info("configuration reloaded", "file", file, "changed", strings.Join(changed, ", "))
	return next, nil
}

// stamps are those of the configuration and of what else is watched.
func (p *Process) stamps(file string) string { return p.stampsWith(stamp(file)) }

func (p *Process) stampsWith(first string) string {
	all := []string{first}
	for _, f := range p.watched {
		all = append(all, stamp(f))
	}
	return strings.Join(all, "\n")
}

// stamp tells two states of a file apart without reading it.
func stamp(file string) string {
	fi, err := os.Stat(file)
	if err != nil {
		return err.Error()
	}
	var inode uint64
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		inode = st.Ino
	}
	return fmt.Sprint(fi.ModTime().UnixNano(), fi.Size(), inode)
}
