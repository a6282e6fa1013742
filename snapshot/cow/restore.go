// SPDX-License-Identifier: BSD-2-Clause

package cow

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel/devmapper"
	"github.com/dsync-backup/dsync-backup/kernel/dm"
)

// Clean puts back what a process that died has left of a snapshot of a tracked
// device. A snapshot that is in use is ErrBusy.
func Clean(ctx context.Context, t *dm.Tracker) error {
	s := &Snapshot{tracker: t, name: filepath.Base(t.Device())}
	err := s.takeLock()
	if err == nil {
		err = s.restore(ctx)
	}
	if err != nil {
		err = fmt.Errorf("clear away a snapshot of %s: %w", t.Device(), err)
	}
	return errors.Join(err, s.unlock())
}

// restore takes the snapshot's devices from under the mapped device, whichever
// of them there are.
func (s *Snapshot) restore(ctx context.Context) error {
	ctx = context.WithoutCancel(ctx)
	i, err := devmapper.Stat(s.name)
	if err != nil {
		return err
	}
	if i.Suspended {
		// By us: nobody else has the lock, and a watchdog died too.
		s.suspended = true
		if err := s.Resume(ctx); err != nil {
			return err
		}
	}
	if i, err = devmapper.Stat(s.name); err == nil && i.Inactive {
		err = devmapper.Clear(s.name) // loaded, and never put in place
	}
	if err != nil {
		return err
	}
	origin, err := devmapper.Stat(originName(s.name))
	switch {
	case errors.Is(err, unix.ENXIO):
	case err != nil:
		return err
	default:
		if err := s.unstack(ctx, origin); err != nil {
			return err
		}
	}
	for _, name := range []string{originName(s.name), cowName(s.name)} {
		err := devmapper.Remove(ctx, name, devmapper.RemoveOptions{})
		if errors.Is(err, unix.EBUSY) {
			// Somebody else reads it, and is nobody whom we serve: nothing lies
			// on it any more.
			err = devmapper.Remove(ctx, name, devmapper.RemoveOptions{Deferred: true})
		}
		if err != nil && !errors.Is(err, unix.ENXIO) {
			return err
		}
	}
	return nil
}

// unstack puts the mapped device back onto the device beneath its origin.
func (s *Snapshot) unstack(ctx context.Context, origin devmapper.Info) error {
	table, err := devmapper.Table(s.name, devmapper.Query{})
	if err != nil {
		return err
	}
	number, offset, sectors, err := parseDsync(table)
	if err != nil {
		return err
	}
	if number != fmt.Sprintf("%d:%d", origin.Major(), origin.Minor()) {
		return nil // it never was put on top
	}
	below, err := devmapper.Deps(origin.Name)
	if err != nil {
		return err
	}
	if len(below) != 1 {
		return fmt.Errorf("%s lies on %d devices instead of one", origin.Name, len(below))
	}
	if offset != 0 {
		return fmt.Errorf("it begins at sector %d of %s", offset, origin.Name)
	}
	s.sectors = sectors
	if err := s.move(below[0]); err != nil {
		return err
	}
	// The kernel suspends it for the new table and lets it go on in one call: killed in it,
	// which no watchdog looks after, this process leaves nothing suspended. The file system need
	// not be at rest: no I/O is lost by a suspension.
	s.suspended = true
	err = devmapper.Resume(ctx, s.name, devmapper.ResumeOptions{SuspendOptions: devmapper.SuspendOptions{SkipLockFS: true}, NoNode: true})
	if err != nil {
		return errors.Join(fmt.Errorf("put %s back onto the device beneath: %w", s.tracker.Device(), err), s.Resume(ctx))
	}
	s.suspended = false
	return nil
}
