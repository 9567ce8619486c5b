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

// OnRefused has f called with why a changed file was not taken, and with nil once
// one was. A refusal that only the moment is to blame for is not told.
func (p *Process) OnRefused(f func(context.Context, error)) { p.refusals = append(p.refusals, f) }

// Watch has the configuration loaded again too when one of the files changes that
// files returns for the one in force. It is called before these files are read, so
// that no change of them is missed.
func (p *Process) Watch(files func(*config.File) []string) {
	p.watched = append(p.watched, files)
	p.seen += stamps(files(p.Config))
}

// stamp tells two states of the configuration, and of what else is watched, apart.
func (p *Process) stamp(file string, running *config.File) string {
	all := stamps([]string{file})
	for _, files := range p.watched {
		all += stamps(files(running))
	}
	return all
}

// Stale returns why the file that lies there now is not what the process runs
// with; nil if it is.
func (p *Process) Stale() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.stale
}

// watch takes changes of the file over, on SIGHUP and when it or a watched file
// changes on disk.
func (p *Process) watch(file string) func(context.Context) error {
	return func(ctx context.Context) error {
		hup := make(chan os.Signal, 1)
		signal.Notify(hup, syscall.SIGHUP)
		defer signal.Stop(hup)
		tick := time.NewTicker(pollEvery)
		defer tick.Stop()
		running, seen := p.Config, p.seen
		var again time.Time // zero: no need
		for {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-hup:
			case now := <-tick.C:
				if p.stamp(file, running) == seen && (again.IsZero() || now.Before(again)) {
					continue
				}
			}
			seen, again = p.stamp(file, running), time.Time{}
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

// stamps tells two states of files apart without reading them.
func stamps(files []string) string {
	var all strings.Builder
	for _, file := range files {
		fmt.Fprintf(&all, "%s %s\n", file, stampOf(file))
	}
	return all.String()
}

func stampOf(file string) string {
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
