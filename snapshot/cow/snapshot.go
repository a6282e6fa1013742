// SPDX-License-Identifier: BSD-2-Clause

package cow

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel/devmapper"
	"github.com/dsync-backup/dsync-backup/kernel/dm"
)

// Errors on which callers decide. Test with errors.Is.
var (
	// ErrFull says that the space was used up: the snapshot is worth nothing.
	ErrFull = errors.New("the copy-on-write space is full")
	// ErrBusy says that another process has a snapshot of the device.
	ErrBusy = errors.New("another backup reads a snapshot of it")
)

const (
	chunkSectors = 8 // 4 KiB: small writes copy little
	lockDir      = "/run/dsync-backup"
	uuidPrefix   = "DSYNCSNAPSHOT-"

	pollInterval = 500 * time.Millisecond
	warnPercent  = 80
)

// Snapshot is one snapshot of a tracked device. The calls come in this order:
// New, Suspend, Take, Resume, Watch, Check, Drop; Resume and Drop may come at
// any time, and again.
type Snapshot struct {
	tracker *dm.Tracker
	name    string // of the mapped device
	number  string // of the device beneath, as major:minor
	sectors uint64 // of the mapped device
	space   *Space
	lock    *os.File

	suspended bool
	stacked   bool // the tables may have been changed
}

// Names of the devices that a snapshot of NAME needs.
func originName(name string) string { return name + "-origin" }
func cowName(name string) string    { return name + "-cow" }

// New prepares a snapshot of a tracked device and clears away what a process
// that died has left. It takes the space over, also when it fails.
func New(ctx context.Context, t *dm.Tracker, space *Space) (*Snapshot, error) {
	s := &Snapshot{tracker: t, name: filepath.Base(t.Device()), space: space}
	if err := s.open(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("prepare a snapshot of %s: %w", t.Device(), err), s.Drop())
	}
	return s, nil
}

func (s *Snapshot) open(ctx context.Context) error {
	if err := s.takeLock(); err != nil {
		return err
	}
	if err := s.restore(ctx); err != nil {
		return err
	}
	table, err := devmapper.Table(s.name, devmapper.Query{})
	if err != nil {
		return err
	}
	var offset uint64
	s.number, offset, s.sectors, err = parseDsync(table)
	if err != nil {
		return err
	}
	if offset != 0 {
		return fmt.Errorf("it begins at sector %d of the device beneath, not at its start", offset)
	}
	for _, kind := range []string{"snapshot-origin", "snapshot"} {
		if _, err := devmapper.TargetVersion(kind); err != nil {
			return fmt.Errorf("the kernel module dm-snapshot is not there: %w", err)
		}
	}
	return s.prepare(ctx)
}

// parseDsync reads the table of a device that the kernel module tracks.
func parseDsync(table []devmapper.Target) (number string, offset, sectors uint64, err error) {
	if len(table) == 1 && table[0].Type == "dsync" {
		if _, err = fmt.Sscanf(table[0].Params, "%s %d", &number, &offset); err == nil {
			return number, offset, table[0].Length, nil
		}
	}
	return "", 0, 0, fmt.Errorf("its table is not one of dsync alone: %v", table)
}

func (s *Snapshot) takeLock() (err error) {
	s.lock, err = Lock(s.name)
	return err
}

// Lock has one process at a time make snapshots of what has that name, until
// the file is closed. ErrBusy: another one has.
func Lock(name string) (*os.File, error) {
	if err := os.MkdirAll(lockDir, 0o700); err != nil {
		return nil, fmt.Errorf("lock %s: %w", name, err)
	}
	f, err := os.OpenFile(filepath.Join(lockDir, name+".snapshot"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock %s: %w", name, err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("%w: wait for its end, or say --snapshot precopy", ErrBusy)
		}
		return nil, fmt.Errorf("lock %s: %w", name, err)
	}
	return f, nil
}

func (s *Snapshot) unlock() error {
	if s.lock == nil {
		return nil
	}
	err := s.lock.Close()
	s.lock = nil
	return err
}

// Suspend stops all I/O of the mapped device, without the file system that may
// be mounted on it: that is frozen already, if it is to be at rest. What lies
// on the device is not written to until Resume.
func (s *Snapshot) Suspend(ctx context.Context, mounted bool) error {
	s.suspended = true // also if it fails half way
	err := devmapper.Suspend(ctx, s.name, devmapper.SuspendOptions{SkipLockFS: mounted})
	if err != nil {
		return errors.Join(fmt.Errorf("suspend %s: %w", s.tracker.Device(), err), s.Resume(ctx))
	}
	return nil
}

// prepare makes all that needs memory, while the device goes on.
func (s *Snapshot) prepare(ctx context.Context) error {
	s.stacked = true
	// The origin comes after its snapshot: on its resume it learns into what
	// chunks writes are to be cut. The snapshot itself is not active yet.
	err := s.make(cowName(s.name), "snapshot", fmt.Sprintf("%s %s N %d", s.number, s.space.Path, chunkSectors))
	if err != nil {
		return err
	}
	if err := s.make(originName(s.name), "snapshot-origin", s.number); err != nil {
		return err
	}
	if err := devmapper.Resume(ctx, originName(s.name), devmapper.ResumeOptions{NoNode: true}); err != nil {
		return err
	}
	origin, err := devmapper.Stat(originName(s.name))
	if err != nil {
		return err
	}
	return s.move(origin.Dev)
}

// make makes a device as long as the one beneath, with a table that is not live
// yet.
func (s *Snapshot) make(name, kind, params string) error {
	if _, err := devmapper.Create(name, uuidPrefix+name); err != nil {
		return err
	}
	return devmapper.Load(name, devmapper.LoadOptions{}, devmapper.Target{Length: s.sectors, Type: kind, Params: params})
}

// move has the next resume put the dsync target, which keeps its history, onto
// another device with the same content.
func (s *Snapshot) move(to uint64) error {
	number := fmt.Sprintf("%d:%d", unix.Major(to), unix.Minor(to))
	target := devmapper.Target{Length: s.sectors, Type: "dsync", Params: number + " 0"}
	if err := devmapper.Load(s.name, devmapper.LoadOptions{}, target); err != nil {
		return err
	}
	_, err := devmapper.Message(s.name, 0, "rebase "+number+" 0")
	return err
}

// Take makes the snapshot of the suspended device, lets that go on, and gives
// the node of the snapshot.
func (s *Snapshot) Take(ctx context.Context) (string, error) {
	ctx = context.WithoutCancel(ctx)
	err := devmapper.Resume(ctx, cowName(s.name), devmapper.ResumeOptions{NoNode: true})
	if err == nil {
		err = s.Resume(ctx)
	}
	var i devmapper.Info
	if err == nil {
		i, err = devmapper.Stat(cowName(s.name))
	}
	if err != nil {
		return "", fmt.Errorf("make a snapshot of %s: %w", s.tracker.Device(), err)
	}
	return Node(ctx, i)
}

// Node gives the node of a mapped device, in a moment at which file systems may be
// frozen.
func Node(ctx context.Context, i devmapper.Info) (string, error) {
	// The kernel itself makes this one, at once: udev need not be waited for.
	path := fmt.Sprintf("/dev/dm-%d", i.Minor())
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err == nil && st.Rdev == i.Dev {
		return path, nil
	}
	return devmapper.Path(i.Name), devmapper.EnsureNode(ctx, i)
}

// Resume lets the mapped device go on.
func (s *Snapshot) Resume(ctx context.Context) error {
	if !s.suspended {
		return nil
	}
	err := devmapper.Resume(context.WithoutCancel(ctx), s.name, devmapper.ResumeOptions{NoNode: true})
	if err != nil {
		return fmt.Errorf("resume %s (by hand: dmsetup resume %s): %w", s.tracker.Device(), s.name, err)
	}
	s.suspended = false
	return nil
}

// Drop puts the tables back as they were, and frees the space.
func (s *Snapshot) Drop() error {
	if s.lock == nil {
		return s.space.Close() // before there was anything, or done already
	}
	ctx := context.Background()
	err := s.Resume(ctx)
	if s.stacked && err == nil {
		if err = s.restore(ctx); err == nil {
			s.stacked = false
		}
	}
	if err != nil {
		err = fmt.Errorf("remove the snapshot of %s (the next backup tries again): %w", s.tracker.Device(), err)
	}
	return errors.Join(err, s.space.Close(), s.unlock())
}
