// SPDX-License-Identifier: BSD-2-Clause

package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel/devmapper"
	"github.com/dsync-backup/dsync-backup/kernel/trackers"
	"github.com/dsync-backup/dsync-backup/snapshot"
	"github.com/dsync-backup/dsync-backup/snapshot/cow"
	"github.com/dsync-backup/dsync-backup/snapshot/device"
	"github.com/dsync-backup/dsync-backup/snapshot/lvm"
)

// lvmSnapshot is the Instant of a logical volume, of which LVM makes a snapshot
// at a moment of its own.
type lvmSnapshot struct {
	g      *globals
	snap   *lvm.Snapshot
	device *device.Device // the snapshot
}

// newLVMSnapshot prepares a snapshot of the logical volume at path.
func newLVMSnapshot(ctx context.Context, g *globals, f *backupFlags, path string) (*lvmSnapshot, error) {
	o := lvm.Options{Look: func(ctx context.Context) error { return lookAtTracker(ctx, path) }}
	if f.cow != "" {
		if strings.HasPrefix(f.cow, "memory:") || strings.HasPrefix(f.cow, "/") {
			return nil, fmt.Errorf("--cow %s: the space for a snapshot of a logical volume is in its volume group: say --cow SIZE", f.cow)
		}
		n, err := cow.ParseSize(f.cow)
		if err != nil {
			return nil, fmt.Errorf("--cow: %w", err)
		}
		o.Size = n
	}
	s, err := lvm.New(ctx, path, o)
	if errors.Is(err, lvm.ErrNotVolume) {
		return nil, fmt.Errorf("--snapshot lvm is for logical volumes, and %s is none: say --snapshot precopy or freeze", path)
	}
	if err != nil {
		return nil, err
	}
	return &lvmSnapshot{g: g, snap: s}, nil
}

// lookAtTracker has the tracker of a device, if there is one, look at the tables
// beneath it. It allows for one change between two looks.
func lookAtTracker(ctx context.Context, path string) error {
	t, err := trackers.Open(path)
	if err != nil {
		return nil //nolint:nilerr // the backup says what is wrong with it, or goes without
	}
	defer t.Close()
	_, err = t.Status(ctx)
	return err
}

// lvmCannot says that an error is no more than a reason for another way.
func lvmCannot(err error) bool {
	for _, reason := range []error{lvm.ErrMissing, lvm.ErrNoRoom, lvm.ErrUnsupported} {
		if errors.Is(err, reason) {
			return true
		}
	}
	return false
}

// Kind implements snapshot.Instant.
func (*lvmSnapshot) Kind() snapshot.PointInTime { return snapshot.PointInTimeLVM }

// Begin implements snapshot.Instant.
func (*lvmSnapshot) Begin(ctx context.Context) (context.Context, error) { return ctx, nil }

// End implements snapshot.Instant.
func (*lvmSnapshot) End() (time.Duration, error) { return 0, nil }

// Atomic implements snapshot.Snapshotter.
func (*lvmSnapshot) Atomic() bool { return false }

// Take implements snapshot.Snapshotter.
func (s *lvmSnapshot) Take(ctx context.Context) (*device.Device, error) {
	path, err := s.snap.Take(ctx)
	if err == nil {
		s.device, err = device.Open(path, device.Options{})
	}
	return s.device, err
}

// Watch implements snapshot.Snapshotter.
func (s *lvmSnapshot) Watch(ctx context.Context) context.Context { return s.snap.Watch(ctx, s.g.warn) }

// Check implements snapshot.Snapshotter.
func (s *lvmSnapshot) Check(ctx context.Context) error { return s.snap.Check(ctx) }

// Drop implements snapshot.Snapshotter.
func (s *lvmSnapshot) Drop() error {
	var err error
	if s.device != nil {
		err = s.device.Close()
		s.device = nil
	}
	return errors.Join(err, s.snap.Drop())
}

func (s *lvmSnapshot) close() {
	if err := s.Drop(); err != nil {
		s.g.warn(err)
	}
}

// mappedOpens is how often the device-mapper device at path is open; 0 if it is
// none.
func mappedOpens(path string) int {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return 0
	}
	i, err := devmapper.Find(st.Rdev)
	if err != nil {
		return 0
	}
	return i.Opens
}
