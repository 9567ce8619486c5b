// Package posture collects what is known about this machine. It owns the reading
// of facts (package sallyport lists them), from the operating system through an
// fs.FS and a command runner, and from a file; when they are read again; and the
// signed report. It judges nothing: whether a fact is good enough is policyd's
// business. What the machine cannot know is left out, never guessed.
package posture

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"time"

	"sallyport"
	"sallyport/proto/proof"
)

// How often facts are looked at and told. A changed value is told at once.
const (
	filePoll    = 100 * time.Millisecond
	settle      = 60 * time.Millisecond // between two readings of a file that is being written
	systemPoll  = 15 * time.Second
	reportEvery = time.Minute
)

// Runner runs a command and returns its standard output. The error is
// fs.ErrPermission when the command says that only root may know.
type Runner func(ctx context.Context, name string, args ...string) ([]byte, error)

// Machine is where facts come from. Tests fill it from recordings.
type Machine struct {
	OS   string // runtime.GOOS
	FS   fs.FS  // rooted at /
	Run  Runner
	Env  func(name string) string
	Home string // without leading slash, as a path in FS
	// AgentVersion and KeyProtection are facts that the agent knows of itself.
	AgentVersion  string
	KeyProtection string
}

// ThisMachine returns the machine that the agent runs on.
func ThisMachine(agentVersion, keyProtection string) Machine {
	m := Machine{OS: runtime.GOOS, FS: os.DirFS("/"), Run: run, Env: os.Getenv, AgentVersion: agentVersion, KeyProtection: keyProtection}
	if home, err := os.UserHomeDir(); err == nil && len(home) > 1 {
		m.Home = home[1:]
	}
	return m
}

func run(ctx context.Context, name string, args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	path, err := exec.LookPath(name)
	for _, dir := range []string{"/usr/sbin/", "/sbin/"} { // not in every person's PATH
		if err != nil {
			path, err = exec.LookPath(dir + name)
		}
	}
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil && (bytes.Contains(stderr.Bytes(), []byte("not permitted")) || bytes.Contains(stderr.Bytes(), []byte("ermission denied"))) {
		err = fs.ErrPermission
	}
	return out, err
}

// Collect reads every fact that the machine can know.
func (m Machine) Collect(ctx context.Context) map[string]sallyport.Fact {
	values := map[string]any{sallyport.FactOS: m.OS}
	set := func(name, value string) {
		if value != "" {
			values[name] = value
		}
	}
	set(sallyport.FactAgentVersion, m.AgentVersion)
	set(sallyport.FactKeyProtection, m.KeyProtection)
	if m.OS == "linux" {
		m.linux(ctx, values)
	} else {
		version, kernel := systemVersion()
		set(sallyport.FactOSVersion, version)
		set(sallyport.FactKernel, kernel)
	}
	now := time.Now().UTC().Round(time.Millisecond)
	facts := make(map[string]sallyport.Fact, len(values))
	for name, v := range values {
		facts[name] = sallyport.Fact{Value: v, At: now, Source: sallyport.SourceOS}
	}
	return facts
}

// Source is a machine and, if wanted, a file with further facts.
type Source struct {
	machine Machine
	file    string

	mu     sync.Mutex
	system map[string]sallyport.Fact
	text   []byte
	extra  map[string]sallyport.Fact
}

// Open returns a source. file may be empty; one that cannot be read now is an
// *sallyport.Error of OutcomeUsage. Facts of the file stand before those of the
// machine.
func Open(m Machine, file string) (*Source, error) {
	s := &Source{machine: m, file: file}
	if file == "" {
		return s, nil
	}
	text, err := readFile(file)
	if err == nil {
		err = s.take(text)
	}
	if err != nil {
		return nil, &sallyport.Error{
			Outcome: sallyport.OutcomeUsage, Code: "usage.posture_file",
			Message: "cannot use the posture file " + file + ": " + err.Error(),
		}
	}
	return s, nil
}

func (s *Source) take(text []byte) error {
	facts, err := ParseFile(text, time.Now().UTC().Round(time.Millisecond))
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.text, s.extra = text, facts
	return nil
}

// Facts reads everything anew.
func (s *Source) Facts(ctx context.Context) map[string]sallyport.Fact {
	system := s.machine.Collect(ctx)
	s.poll(ctx)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.system = system
	return s.merged()
}

func (s *Source) merged() map[string]sallyport.Fact {
	all := maps.Clone(s.system)
	if all == nil {
		all = map[string]sallyport.Fact{}
	}
	maps.Copy(all, s.extra)
	return all
}

// poll reads the file again and reports whether its facts changed. A file that is
// gone or broken, still after a moment, has no facts: what it said must not be
// believed for ever.
func (s *Source) poll(ctx context.Context) (changed bool) {
	if s.file == "" {
		return false
	}
	text, err := readFile(s.file)
	s.mu.Lock()
	same := err == nil && s.text != nil && bytes.Equal(text, s.text)
	gone := err != nil && s.text == nil
	s.mu.Unlock()
	if same || gone {
		return false
	}
	// Whoever writes it may be in the midst of that: wait until it holds still.
	for range 10 {
		select {
		case <-ctx.Done():
			return false
		case <-time.After(settle):
		}
		again, errAgain := readFile(s.file)
		still := bytes.Equal(again, text) && (err == nil) == (errAgain == nil)
		text, err = again, errAgain
		if still {
			break
		}
	}
	before := s.values()
	if err != nil || s.take(text) != nil {
		s.mu.Lock()
		s.text, s.extra = nil, nil
		s.mu.Unlock()
	}
	return !maps.Equal(before, s.values())
}

// values returns the values of the file's facts, for comparing.
func (s *Source) values() map[string]any {
	s.mu.Lock()
	defer s.mu.Unlock()
	return valuesOf(s.extra)
}

func valuesOf(facts map[string]sallyport.Fact) map[string]any {
	v := make(map[string]any, len(facts))
	for name, f := range facts {
		v[name] = f.Value
	}
	return v
}

// Watch calls each with all facts: now, at once when a value changed, and each
// minute. It returns when ctx ends. each runs on Watch's goroutine, and may take
// its time: changes meanwhile are not lost.
func (s *Source) Watch(ctx context.Context, each func(map[string]sallyport.Fact)) {
	told := s.Facts(ctx)
	each(told)
	file := time.NewTicker(filePoll)
	defer file.Stop()
	system := time.NewTicker(systemPoll)
	defer system.Stop()
	due := time.NewTimer(reportEvery)
	defer due.Stop()
	for {
		var facts map[string]sallyport.Fact
		select {
		case <-ctx.Done():
			return
		case <-file.C:
			if !s.poll(ctx) {
				continue
			}
			s.mu.Lock()
			facts = s.merged()
			s.mu.Unlock()
		case <-system.C:
			facts = s.Facts(ctx)
			if maps.Equal(valuesOf(facts), valuesOf(told)) {
				continue
			}
		case <-due.C:
			facts = s.Facts(ctx)
		}
		if ctx.Err() != nil {
			return
		}
		told = facts
		each(facts)
		due.Reset(reportEvery)
	}
}

// Reporter signs reports, each with a higher sequence than the one before.
type Reporter struct {
	Key    proof.Signer
	Device sallyport.DeviceID

	mu   sync.Mutex
	last int64
}

// Sign returns the report as a compact JWS of type proof.TypePosture.
func (r *Reporter) Sign(session sallyport.SessionID, facts map[string]sallyport.Fact) (string, error) {
	r.mu.Lock()
	r.last = max(r.last+1, time.Now().UnixMilli())
	report := sallyport.PostureReport{Device: r.Device, Session: session, Sequence: r.last, Facts: facts}
	r.mu.Unlock()
	jws, err := proof.Sign(r.Key, proof.TypePosture, report)
	if err != nil {
		return "", fmt.Errorf("sign posture report: %w", err)
	}
	return jws, nil
}

const maxPostureFile = 64 << 10

func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, innermost(err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxPostureFile+1))
	if err != nil {
		return nil, innermost(err)
	}
	if len(b) > maxPostureFile {
		return nil, fmt.Errorf("larger than %d bytes", maxPostureFile)
	}
	return b, nil
}

func innermost(err error) error {
	var p *fs.PathError
	if errors.As(err, &p) {
		return p.Err
	}
	return err
}
