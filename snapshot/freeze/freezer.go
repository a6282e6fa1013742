// SPDX-License-Identifier: BSD-2-Clause

package freeze

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/snapshot/device"
)

// Bounds that hold if Options do not say.
const (
	DefaultMaxFreeze = time.Minute
	DefaultMaxSync   = 10 * time.Minute
)

// grace is what the watchdog has beyond the deadline before the parent thaws
// by itself, and what Close waits for it to leave.
const grace = 3 * time.Second

// Options of Start.
type Options struct {
	// MaxFreeze bounds the freeze, from the first file system's to the last
	// one's thaw. 0 is DefaultMaxFreeze.
	MaxFreeze time.Duration
	// MaxSync bounds the writing out of dirty data before the freeze, while
	// writers still go on. 0 is DefaultMaxSync.
	MaxSync time.Duration
	// Resume names device-mapper devices that this process may suspend while it
	// freezes: whatever ends the freeze resumes them first.
	Resume []string
	// Outputs hold from Freeze until Thaw or Close. What this process writes
	// anywhere while it freezes goes through one of them.
	Outputs []*HoldOutput
}

// fsState is what the parent knows of one file system.
type fsState int

const (
	idle     fsState = iota
	freezing         // the watchdog is about to freeze it, or has just done so
	frozen
)

// Freezer freezes a set of file systems once. Its methods may be called from
// many goroutines; Close is always called in the end, and thaws.
type Freezer struct {
	mounts  []device.Mount // topmost first
	files   []*os.File
	options Options
	cmd     *exec.Cmd
	socket  *os.File
	sending sync.Mutex

	ready   chan struct{}
	holding chan struct{}
	ended   chan struct{} // closed when nothing is frozen any more and end is set
	gone    chan struct{} // closed when the watchdog is gone and rescued after
	expired chan struct{}

	mu       sync.Mutex
	states   []fsState
	began    time.Time // of the first freeze, by the parent's clock
	backstop *time.Timer
	thawing  bool // Thaw or Close has been called: the end is no surprise
	end      outcome
	locked   bool // memory and outputs
}

// outcome is how the freeze ended: err is nil for a thaw as ordered.
type outcome struct {
	set    bool
	frozen time.Duration
	err    error
}

// Start opens the mounts, as listed by [device.Mounts], and starts the
// watchdog process. Nothing is frozen yet; a mount that cannot be opened is an
// error. While it runs, the mounts are busy.
func Start(ctx context.Context, mounts []device.Mount, o Options) (*Freezer, error) {
	if o.MaxFreeze <= 0 {
		o.MaxFreeze = DefaultMaxFreeze
	}
	if o.MaxSync <= 0 {
		o.MaxSync = DefaultMaxSync
	}
	f := &Freezer{
		mounts: slices.Clone(mounts), options: o, states: make([]fsState, len(mounts)),
		ready: make(chan struct{}), holding: make(chan struct{}), ended: make(chan struct{}),
		gone: make(chan struct{}), expired: make(chan struct{}),
	}
	// What lies on top is frozen first: its last writes go to what is below.
	slices.SortStableFunc(f.mounts, func(a, b device.Mount) int { return cmp.Compare(b.Depth, a.Depth) })
	for _, m := range f.mounts {
		file, err := m.Open()
		if err != nil {
			f.closeFiles()
			return nil, fmt.Errorf("start freeze watchdog: %w", err)
		}
		f.files = append(f.files, file)
	}
	if err := f.spawn(); err != nil {
		f.closeFiles()
		return nil, fmt.Errorf("start freeze watchdog: %w", err)
	}
	select {
	case <-f.ready:
		return f, nil
	case <-f.ended:
		return nil, errors.Join(f.end.err, f.Close())
	case <-ctx.Done():
		return nil, errors.Join(fmt.Errorf("start freeze watchdog: %w", ctx.Err()), f.Close())
	}
}

func (f *Freezer) spawn() error {
	// Non-blocking, so that closing our end wakes who reads from it.
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return err
	}
	f.socket = os.NewFile(uintptr(pair[0]), "watchdog")
	theirs := os.NewFile(uintptr(pair[1]), "parent")
	defer theirs.Close()

	f.cmd = exec.Command("/proc/self/exe", WatchdogArg)
	f.cmd.Args[0] = os.Args[0]
	f.cmd.Dir = "/"
	f.cmd.Env = []string{} // the environment may hold passwords
	f.cmd.ExtraFiles = append([]*os.File{theirs}, f.files...)
	// A session of its own: no key on the terminal reaches it.
	f.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := f.cmd.Start(); err != nil {
		f.socket.Close()
		return err
	}
	c := config{MaxFreeze: f.options.MaxFreeze, MaxSync: f.options.MaxSync, Resume: f.options.Resume}
	for _, m := range f.mounts {
		c.Mounts = append(c.Mounts, fsConfig{Name: m.Path, ReadOnly: m.ReadOnly})
	}
	go f.listen()
	if err := f.send(c); err != nil {
		return errors.Join(err, f.Close())
	}
	return nil
}

// Freeze freezes all file systems, the topmost first, and returns when they
// are all still. If one cannot be frozen, those that were are thawed again. A
// Freezer freezes once: whatever the outcome, another freeze is another Start.
// It locks this process's memory and holds its outputs until Thaw or Close.
func (f *Freezer) Freeze(ctx context.Context) error {
	if err := f.prepare(); err != nil {
		return err
	}
	if err := f.send(orderFreeze); err != nil {
		return errors.Join(fmt.Errorf("freeze: %w: %w", ErrWatchdog, err), f.relax())
	}
	select {
	case <-f.holding:
		return nil
	case <-f.ended:
	case <-ctx.Done():
		_, err := f.Thaw()
		return errors.Join(fmt.Errorf("freeze: %w", ctx.Err()), ignoreThawed(err))
	}
	// Ended without an error: somebody called Thaw or Close meanwhile.
	return errors.Join(cmp.Or(f.end.err, errNotFrozen), f.relax())
}

func ignoreThawed(err error) error {
	if errors.Is(err, ErrThawed) || errors.Is(err, errNotFrozen) {
		return nil
	}
	return err
}

var errNotFrozen = errors.New("the file systems were never all frozen")

func (f *Freezer) prepare() error {
	f.mu.Lock()
	if f.locked || f.thawing {
		f.mu.Unlock()
		return errors.New("freeze: this freezer was used before")
	}
	if f.end.set {
		f.mu.Unlock()
		return f.end.err
	}
	f.locked = true
	f.backstop = time.AfterFunc(f.options.MaxSync+f.options.MaxFreeze+grace, f.overdue)
	f.mu.Unlock()
	for _, o := range f.options.Outputs {
		o.Hold()
	}
	if err := LockMemory(); err != nil {
		return errors.Join(fmt.Errorf("freeze: %w", err), f.relax())
	}
	return nil
}

// send may be called from several goroutines. It does not wait: an order fits
// into the socket's buffer.
func (f *Freezer) send(v any) error {
	f.sending.Lock()
	defer f.sending.Unlock()
	return json.NewEncoder(f.socket).Encode(v)
}

// Thaw thaws all file systems and says for how long the first of them was
// frozen. An error means that what was read meanwhile is no point in time:
// ErrTooLong, ErrThawed, ErrWatchdog, or a thaw that failed. Calling it again
// returns the same.
func (f *Freezer) Thaw() (time.Duration, error) {
	f.mu.Lock()
	first := !f.thawing
	f.thawing = true
	f.mu.Unlock()
	if first {
		// If the watchdog cannot be told, it is gone, and listen thaws.
		_ = f.send(orderThaw)
	}
	<-f.ended
	relaxErr := f.relax()
	select {
	case <-f.holding:
		return f.end.frozen, errors.Join(f.end.err, relaxErr)
	default:
		return f.end.frozen, errors.Join(cmp.Or(f.end.err, errNotFrozen), relaxErr)
	}
}

// Expired is closed when the freeze ended before Thaw was called: on the
// deadline, or because the watchdog ended. Whoever is reading stops then.
func (f *Freezer) Expired() <-chan struct{} { return f.expired }

// WithContext returns a context that also ends when the freeze does, with the
// reason as its cause.
func (f *Freezer) WithContext(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	go func() {
		select {
		case <-f.expired:
			cancel(f.end.err)
		case <-ctx.Done():
		}
	}()
	return ctx, func() { cancel(nil) }
}

// Covers reports whether all of mounts, listed anew while they are frozen, are
// among the frozen: a file system that was mounted in between is an error.
func (f *Freezer) Covers(mounts []device.Mount) error {
	for _, m := range mounts {
		if !slices.ContainsFunc(f.mounts, func(have device.Mount) bool { return have.Dev == m.Dev }) {
			return fmt.Errorf("freeze: %s was mounted just before, and is not frozen", m)
		}
	}
	return nil
}

// Close thaws what is frozen, lets the watchdog go, and closes the mounts.
func (f *Freezer) Close() error {
	f.mu.Lock()
	f.thawing = true
	f.mu.Unlock()
	// Its end of file is an order to thaw.
	if rc, err := f.socket.SyscallConn(); err == nil {
		_ = rc.Control(func(fd uintptr) { _ = unix.Shutdown(int(fd), unix.SHUT_WR) })
	}
	wait := time.After(f.options.MaxFreeze + grace)
	select {
	case <-f.ended:
	case <-wait:
	}
	var err error
	select {
	case <-f.gone:
	case <-time.After(grace):
		// It is not killed: it may sit in a freeze that would then outlive
		// it. It thaws as soon as it can.
		err = errors.New("close freezer: the watchdog is stuck; it thaws when it can")
	}
	return errors.Join(err, f.relax())
}

// relax gives outputs and memory back once nothing is frozen. Releasing an
// output may wait for its reader, so nothing is locked meanwhile.
func (f *Freezer) relax() error {
	f.mu.Lock()
	locked := f.locked
	f.locked, f.thawing = false, true
	f.mu.Unlock()
	if !locked {
		return nil
	}
	err := UnlockMemory()
	for _, o := range f.options.Outputs {
		err = errors.Join(err, o.Release())
	}
	return err
}

func (f *Freezer) closeFiles() {
	for _, file := range f.files {
		file.Close()
	}
}
