// SPDX-License-Identifier: BSD-2-Clause

package restore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/snapshot/device"
	"github.com/dsync-backup/dsync-backup/snapshot/stream"
)

// ErrNotFollowing says that a stream does not go on from where the target is.
var ErrNotFollowing = errors.New("the stream does not follow on")

// MergeOptions say where streams are applied to. Target and StateDir must be
// set.
type MergeOptions struct {
	Target   string // a block device or a file
	StateDir string // for what is known of a device; a file's lies beside it
	Force    bool   // overwrite a target that holds what no merge left there
	// Spool names a folder in which a stream is kept until it is whole, before
	// anything of it is applied; "" applies as it comes.
	Spool    string
	Parallel int // writes in flight; 0 means 16
	// Serving: what follows the end of the stream is not looked at.
	Serving  bool
	Progress func(Progress)
}

// Merge is a target to which one stream is applied. Nobody else can claim it
// until it is closed.
type Merge struct {
	o         MergeOptions
	target    *target
	statePath string
	state     *mergeState // nil: no merge left anything
	reason    string      // why the state does not count
	holds     string      // of a target that is not known
	sums      stream.ID   // given out by this very Merge
	started   bool
}

// OpenMerge looks at a target and claims it. It changes nothing. A target that
// is mounted or in use is [device.ErrInUse].
func OpenMerge(ctx context.Context, o MergeOptions) (_ *Merge, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("merge to %s: %w", o.Target, err)
		}
	}()
	m := &Merge{o: o}
	if m.target, err = findTarget(o.Target); err != nil {
		return nil, err
	}
	if m.absent() {
		return m, nil
	}
	if err := m.target.open(); err != nil {
		return nil, errors.Join(err, m.target.close())
	}
	if err := m.look(ctx); err != nil {
		return nil, errors.Join(err, m.target.close())
	}
	return m, nil
}

// findTarget finds out what a path leads to.
func findTarget(path string) (*target, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	t := &target{path: abs, kind: device.File}
	d, err := device.Open(abs, device.Options{})
	if errors.Is(err, fs.ErrNotExist) {
		return t, t.mayCreate()
	}
	if err != nil {
		return nil, err
	}
	// The state lies beside the file itself, not beside a link to it.
	t.path, t.kind, t.size = d.RealPath(), d.Kind(), d.Size()
	if err := d.Close(); err != nil {
		return nil, err
	}
	return t, device.CheckTarget(t.path)
}

func (m *Merge) absent() bool {
	return m.target.blocks == nil && m.target.kind == device.File && !exists(m.target.path)
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// look reads the state of a target that is open, and whether it counts.
func (m *Merge) look(ctx context.Context) error {
	t := m.target
	if t.kind == device.File {
		if err := lockFile(t.soft); err != nil {
			return err
		}
	}
	identity, err := identify(ctx, t.path, t.kind)
	if err != nil {
		return err
	}
	m.statePath = statePath(t.path, m.o.StateDir, t.kind, identity)
	s, err := readState(m.statePath)
	if err != nil && !m.o.Force {
		return err
	}
	switch {
	case s == nil:
	case s.Identity != identity:
		m.reason = "it is another than the one that was merged to"
	case !s.Written:
		m.state = s
	default:
		changed := int64(0)
		if t.kind == device.File {
			if changed, err = changeTime(t.soft); err != nil {
				return err
			}
		}
		if m.reason, err = s.doubt(ctx, t, changed); err != nil {
			return err
		}
		if m.reason == "" {
			m.state = s
		}
	}
	if !m.known() {
		m.holds, err = device.HasData(ctx, t.path)
	}
	return err
}

// lockFile keeps a second merge away from an image file.
func lockFile(f *os.File) error {
	rc, err := f.SyscallConn()
	if err != nil {
		return err
	}
	ctlErr := rc.Control(func(fd uintptr) { err = unix.Flock(int(fd), unix.LOCK_EX|unix.LOCK_NB) })
	if errors.Is(err, unix.EWOULDBLOCK) {
		return fmt.Errorf("%w: another merge holds it", device.ErrInUse)
	}
	if err := errors.Join(ctlErr, err); err != nil {
		return fmt.Errorf("lock target: %w", err)
	}
	return nil
}

// known reports whether the target is what a merge left.
func (m *Merge) known() bool { return m.state != nil && m.state.Written }

// Hello says what there is.
func (m *Merge) Hello() stream.Hello {
	h := stream.Hello{
		Protocol: stream.ProtocolVersion, Target: m.target.path, Holds: m.holds, Reason: m.reason,
		Size: m.target.size, File: m.target.kind == device.File, Known: m.known(),
	}
	if m.known() {
		h.Position, h.Partly, h.Incomplete, h.Source = m.state.At, m.state.Partly, m.state.Incomplete, m.state.Source
	}
	return h
}

// overwrite reports why a target may not be written to that holds what no merge
// left there.
func (m *Merge) overwrite() error {
	if m.known() || m.o.Force || m.holds == "" && m.reason == "" {
		return nil
	}
	if m.reason != "" {
		return fmt.Errorf("%w: %s, and is overwritten only with --force", ErrHasData, m.reason)
	}
	return fmt.Errorf("%w: it has %s, and no merge left that there: it is overwritten only with --force", ErrHasData, m.holds)
}

// follows reports why a stream cannot be applied to the target as it is.
func (m *Merge) follows(h stream.Header) error {
	if h.Kind == stream.Sums {
		return fmt.Errorf("%w: it holds sums and no data", ErrNotFollowing)
	}
	if err := m.overwrite(); err != nil {
		return err
	}
	again := m.known() && m.state.Stream == h.ID
	if h.Kind != stream.Since && m.known() && m.state.Source != h.Source && !m.o.Force {
		return fmt.Errorf("%w: it is a copy of %s, and the stream is of %s: it is overwritten only with --force", ErrHasData, m.state.Source, h.Source)
	}
	switch h.Kind {
	case stream.Full:
		return nil
	case stream.Against:
		if h.Base == m.sums || m.state != nil && h.Base == m.state.Sums || again {
			return nil
		}
		return fmt.Errorf("%w: it was made against other sums than the last that this target gave: make them anew with merge --sums", ErrNotFollowing)
	}
	switch {
	case again:
		return nil
	case m.reason != "":
		return fmt.Errorf("%w: the target is at no known position, since %s: send with --changes compare, or full", ErrNotFollowing, m.reason)
	case !m.known():
		return fmt.Errorf("%w: it holds what changed since %v, and the target is at no position: send with --changes full first", ErrNotFollowing, h.From)
	case m.state.At.IsZero():
		return fmt.Errorf("%w: it holds what changed since %v, and the target is at no position: send with --changes compare, or full", ErrNotFollowing, h.From)
	}
	for _, p := range []kernel.Position{m.state.At, m.state.Partly} {
		if !p.IsZero() && !covers(h, p) {
			if p.Tracker != h.From.Tracker {
				return fmt.Errorf("%w: the target is at a position of tracker %v, and the stream is of tracker %v: another device's, or tracking was started afresh: send with --changes compare, or full",
					ErrNotFollowing, p.Tracker, h.From.Tracker)
			}
			return fmt.Errorf("%w: the target is at %v, and the stream leads from %v to %v: send what changed since %v, or with --changes compare", ErrNotFollowing, p, h.From, h.To, m.Position())
		}
	}
	return nil
}

// covers reports whether a stream brings a target at p to its own position.
func covers(h stream.Header, p kernel.Position) bool {
	if p == h.From || p == h.To {
		return true
	}
	for _, q := range h.Through {
		if p == q {
			return true
		}
	}
	return false
}

// Position is where the target is, as `extract --since` takes it.
func (m *Merge) Position() Position {
	if !m.known() {
		return Position{}
	}
	return Position{m.state.At, m.state.Partly, m.state.Incomplete}
}

// Sums prepares to write the sums of the first size bytes, those of what is not
// there being zeros, and notes that it does, so that a stream made against them
// is known. With a negative size they are of all that there is. What it returns
// writes them, once; meanwhile a stream may be applied, if what it says of a
// block was made after the block's sum had been read.
func (m *Merge) Sums(ctx context.Context, size int64) (write func(context.Context, io.Writer) error, err error) {
	if size < 0 {
		size = m.target.size
	}
	h := stream.Header{Kind: stream.Sums, Size: size, ID: stream.NewID(), Source: m.target.path}
	m.sums = h.ID
	if m.absent() {
		return func(ctx context.Context, w io.Writer) error { return m.writeSums(ctx, w, h, nil) }, nil
	}
	if !m.o.Serving {
		s := m.state
		if s == nil {
			identity, err := identify(ctx, m.target.path, m.target.kind)
			if err != nil {
				return nil, err
			}
			s = &mergeState{Target: m.target.path, Identity: identity, Stream: h.ID}
			m.state = s
		}
		s.Sums = h.ID
		if err := s.write(m.statePath); err != nil {
			return nil, err
		}
	}
	d, err := device.Open(m.target.path, device.Options{})
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context, w io.Writer) error {
		defer d.Close()
		return m.writeSums(ctx, w, h, d)
	}, nil
}

// Close lets go of the target.
func (m *Merge) Close() error { return m.target.close() }
