// Package state is the agent's directory on disk. It owns where that directory
// is (XDG), who may own it, and how files in it are read and written: never
// through a symbolic link, never one that another user owns or can read, always
// whole. It does not know what the files mean.
package state

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"sallyport"
)

const maxFile = 1 << 20 // bytes; nothing of ours comes near

// Dir is a checked directory. Its methods take plain names within it.
type Dir struct {
	root *os.Root
	path string
}

// DefaultPath returns where the state directory is: $XDG_STATE_HOME/sallyport if
// that is set (XDG Base Directory Specification; a relative value counts as
// unset), else ~/.local/state/sallyport, on macOS ~/Library/Application
// Support/Sallyport, on Windows %LocalAppData%\Sallyport.
func DefaultPath() (string, error) {
	if d := os.Getenv("XDG_STATE_HOME"); filepath.IsAbs(d) {
		return filepath.Join(d, "sallyport"), nil
	}
	switch runtime.GOOS {
	case "darwin":
		if d, err := os.UserConfigDir(); err == nil {
			return filepath.Join(d, "Sallyport"), nil
		}
	case "windows":
		if d, err := os.UserCacheDir(); err == nil {
			return filepath.Join(d, "Sallyport"), nil
		}
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return "", &sallyport.Error{
			Outcome: sallyport.OutcomeUsage, Code: "state.no_home",
			Message: "no directory to keep the session in", Hint: "set HOME or XDG_STATE_HOME", Err: err,
		}
	}
	return filepath.Join(home, ".local", "state", "sallyport"), nil
}

// Open returns the directory at path and creates it (0700) if it is missing. A
// symbolic link, another owner, or permissions for others are refused with an
// *sallyport.Error of OutcomeUsage that tells what to type.
func Open(path string) (*Dir, error) {
	path = filepath.Clean(path)
	if err := create(path); err != nil {
		return nil, err
	}
	before, err := os.Lstat(path)
	if err != nil {
		return nil, unusable(path, err)
	}
	if err := checkDir(path, before); err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(path)
	if err != nil {
		return nil, unusable(path, err)
	}
	// What was checked must be what was opened, or a link put there in between
	// would be followed after all.
	opened, err := root.Stat(".")
	if err != nil || !os.SameFile(before, opened) {
		root.Close()
		return nil, unusable(path, errors.New("the directory changed while it was opened"))
	}
	d := &Dir{root: root, path: path}
	if err := d.writable(); err != nil {
		root.Close()
		return nil, err
	}
	return d, nil
}

// create makes path below a parent that nobody else can play with.
func create(path string) error {
	if _, err := os.Lstat(path); err == nil || !errors.Is(err, fs.ErrNotExist) {
		return nil // Open looks at it and says what is wrong
	}
	parent := filepath.Dir(path)
	if err := os.MkdirAll(parent, 0o700); err != nil {
		return unusable(path, err)
	}
	info, err := os.Stat(parent)
	if err != nil {
		return unusable(path, err)
	}
	if uid, ok := ownerOf(info); ok && uid != os.Geteuid() && uid != 0 {
		return refuse("state.owner", fmt.Sprintf("%s belongs to uid %d, not to you (uid %d)", parent, uid, os.Geteuid()),
			"run the agent as the owner, or set XDG_STATE_HOME to a directory of your own")
	}
	if err := os.Mkdir(path, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return unusable(path, err)
	}
	return nil
}

func checkDir(path string, info fs.FileInfo) error {
	switch {
	case info.Mode()&fs.ModeSymlink != 0:
		return refuse("state.symlink", path+" is a symbolic link, and those are not followed", "rm "+path)
	case !info.IsDir():
		return refuse("state.not_a_directory", path+" is not a directory", "rm "+path)
	}
	if uid, ok := ownerOf(info); ok && uid != os.Geteuid() {
		return refuse("state.owner", fmt.Sprintf("%s belongs to uid %d, not to you (uid %d)", path, uid, os.Geteuid()),
			"run the agent as the owner, or set XDG_STATE_HOME to a directory of your own")
	}
	if permissions(info)&0o077 != 0 {
		return refuse("state.mode", fmt.Sprintf("%s is open to other users (mode %04o)", path, permissions(info)), "chmod 700 "+path)
	}
	return nil
}

func (d *Dir) writable() error {
	name := ".probe-" + rand.Text()
	f, err := d.root.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return unusable(d.path, err)
	}
	f.Close()
	d.root.Remove(name)
	return nil
}

func refuse(code, message, hint string) error {
	return &sallyport.Error{Outcome: sallyport.OutcomeUsage, Code: code, Message: message, Hint: hint}
}

func unusable(path string, err error) error {
	return &sallyport.Error{
		Outcome: sallyport.OutcomeUsage, Code: "state.unusable", Message: "cannot use " + path + ": " + cause(err),
		Hint: "make it a directory of your own with mode 0700, or set XDG_STATE_HOME to one", Err: err,
	}
}

// cause is the innermost word of an error: "permission denied".
func cause(err error) string {
	for {
		inner := errors.Unwrap(err)
		if inner == nil {
			return err.Error()
		}
		err = inner
	}
}

// Path returns the directory's path, for messages.
func (d *Dir) Path() string { return d.path }

// Close releases the directory.
func (d *Dir) Close() error { return d.root.Close() }

// Sub returns a directory within d, created (0700) if missing and checked like d.
func (d *Dir) Sub(name string) (*Dir, error) {
	if err := d.root.Mkdir(name, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, unusable(filepath.Join(d.path, name), err)
	}
	return Open(filepath.Join(d.path, name))
}

// Names returns the names of the entries.
func (d *Dir) Names() ([]string, error) {
	f, err := d.root.Open(".")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return f.Readdirnames(-1)
}

// Read returns the content of a file. A symbolic link, a file of another user,
// and one that others can read are refused with the command that mends it;
// a missing file is fs.ErrNotExist.
func (d *Dir) Read(name string) ([]byte, error) {
	path := filepath.Join(d.path, name)
	before, err := d.root.Lstat(name)
	if err != nil {
		return nil, err
	}
	if err := checkFile(path, before); err != nil {
		return nil, err
	}
	f, err := d.root.Open(name)
	if err != nil {
		return nil, unusable(path, err)
	}
	defer f.Close()
	if opened, err := f.Stat(); err != nil || !os.SameFile(before, opened) {
		return nil, unusable(path, errors.New("the file changed while it was opened"))
	}
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(b) > maxFile {
		err = fmt.Errorf("larger than %d bytes", maxFile)
	}
	if err != nil {
		return nil, unusable(path, err)
	}
	return b, nil
}

func checkFile(path string, info fs.FileInfo) error {
	switch {
	case info.Mode()&fs.ModeSymlink != 0:
		return refuse("state.symlink", path+" is a symbolic link, and those are not followed", "rm "+path)
	case !info.Mode().IsRegular():
		return refuse("state.not_a_file", path+" is not a plain file", "rm "+path)
	}
	if uid, ok := ownerOf(info); ok && uid != os.Geteuid() {
		return refuse("state.owner", fmt.Sprintf("%s belongs to uid %d, not to you (uid %d)", path, uid, os.Geteuid()),
			"chown "+fmt.Sprint(os.Geteuid())+" "+path)
	}
	if permissions(info)&0o077 != 0 {
		return refuse("state.mode", fmt.Sprintf("%s can be read by other users (mode %04o)", path, permissions(info)), "chmod 600 "+path)
	}
	return nil
}

// ReadJSON decodes a file into v. A missing file is fs.ErrNotExist.
func (d *Dir) ReadJSON(name string, v any) error {
	b, err := d.Read(name)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, v); err != nil {
		return unusable(filepath.Join(d.path, name), err)
	}
	return nil
}

// Write replaces a file (0600) as a whole: after a crash it is the old or the
// new one.
func (d *Dir) Write(name string, data []byte) error {
	return d.place(name, data, (*os.File).Sync, func(temp string) error { return d.root.Rename(temp, name) })
}

// ShowJSON replaces a file for other processes to read while this one lives. They
// see the old or the new one; after a crash of the machine it may be neither, and
// that spares the disk a flush.
func (d *Dir) ShowJSON(name string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	return d.place(name, append(b, '\n'), func(*os.File) error { return nil }, func(temp string) error { return d.root.Rename(temp, name) })
}

// WriteJSON writes v with Write.
func (d *Dir) WriteJSON(name string, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	return d.Write(name, append(b, '\n'))
}

// Create writes a file (0600) that must not exist yet: fs.ErrExist otherwise.
// Of two processes that create the same file, one does.
func (d *Dir) Create(name string, data []byte) error {
	return d.place(name, data, (*os.File).Sync, func(temp string) error {
		defer d.root.Remove(temp)
		return d.root.Link(temp, name)
	})
}

func (d *Dir) place(name string, data []byte, sync func(*os.File) error, publish func(temp string) error) error {
	temp := "." + name + "-" + rand.Text()
	f, err := d.root.OpenFile(temp, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return unusable(filepath.Join(d.path, name), err)
	}
	_, err = f.Write(data)
	if err == nil {
		err = sync(f)
	}
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err == nil {
		err = publish(temp)
	}
	if errors.Is(err, fs.ErrExist) {
		return err
	}
	if err != nil {
		d.root.Remove(temp)
		return unusable(filepath.Join(d.path, name), err)
	}
	return nil
}

// Remove deletes a file; a missing one is no error.
func (d *Dir) Remove(name string) error {
	if err := d.root.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return unusable(filepath.Join(d.path, name), err)
	}
	return nil
}

// ErrLocked is what TryLock returns while another process has the lock.
var ErrLocked = errors.New("locked by another process")

// TryLock takes the lock of that name, or returns ErrLocked. The lock ends with
// unlock or with the process, however that ends.
func (d *Dir) TryLock(name string) (unlock func(), err error) {
	f, err := d.root.OpenFile(name, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, unusable(filepath.Join(d.path, name), err)
	}
	if err := lockFile(f); err != nil {
		f.Close()
		return nil, err
	}
	return func() { f.Close() }, nil
}

// Lock waits for the lock until ctx ends.
func (d *Dir) Lock(ctx context.Context, name string) (unlock func(), err error) {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		unlock, err := d.TryLock(name)
		if !errors.Is(err, ErrLocked) {
			return unlock, err
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("lock %s: %w", name, context.Cause(ctx))
		case <-tick.C:
		}
	}
}
