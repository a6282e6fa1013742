// SPDX-License-Identifier: BSD-2-Clause

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/kernel/devmapper"
	"github.com/dsync-backup/dsync-backup/kernel/dm"
	"github.com/dsync-backup/dsync-backup/kernel/trackers"
	"github.com/dsync-backup/dsync-backup/snapshot"
	"github.com/dsync-backup/dsync-backup/snapshot/device"
	"github.com/dsync-backup/dsync-backup/snapshot/freeze"
	"github.com/dsync-backup/dsync-backup/snapshot/lvm"
)

// source is a device that is open, and the way to its point in time.
type source struct {
	device  *device.Device
	instant snapshot.Instant
	precopy *snapshot.Precopy // if it is to be copied in use first
	close   func()
}

func absolute(path string) (string, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return "", fmt.Errorf("make %s absolute: %w", path, err)
	}
	return abs, nil
}

// openSource opens the device and picks how its point in time is made. What
// has none is refused, unless the user said that none is needed.
func openSource(ctx context.Context, g *globals, f *backupFlags, p *progress, path string) (*source, error) {
	s := &source{close: func() {}}
	if !slices.Contains(snapshotWays, f.snapshot) {
		return nil, fmt.Errorf("--snapshot %q is not one of %s", f.snapshot, strings.Join(snapshotWays, ", "))
	}
	d, err := device.Open(path, device.Options{})
	if err != nil {
		return nil, err
	}
	s.device = d
	if d.Kind() == device.File {
		s.instant = snapshot.Still(snapshot.PointInTimeFile)
		return s, nil
	}
	use, err := device.InUse(path)
	if err != nil {
		d.Close()
		return nil, err
	}
	if err := s.ownLVM(ctx, g, f, path, use); err != nil {
		d.Close()
		return nil, err
	}
	if s.instant != nil {
		return s, nil
	}
	switch {
	case f.snapshot == "none":
		s.instant = snapshot.Still(snapshot.PointInTimeNone)
	case use.Empty() && (opens(path) > 1 || f.snapshot == "dm" || f.snapshot == "lvm"):
		// Somebody has it open who claims nothing, besides us: a database, or a
		// virtual machine.
		err = s.inUse(ctx, g, f, p, use)
	case use.Empty():
		// Claimed, so that it stays that way.
		d.Close()
		if s.device, err = device.Open(path, device.Options{Exclusive: true}); err != nil {
			return nil, err // another one claimed it in between
		}
		s.instant = snapshot.Still(snapshot.PointInTimeUnmounted)
	case s.suspendable(f):
		err = s.inUse(ctx, g, f, p, use)
	case len(use.Mounts) == 0 || use.CheckFreezable() != nil:
		err = fmt.Errorf("%s is in use by what cannot be frozen (%v): stop that, or say --snapshot none for a copy that is no point in time", path, use)
	case !use.ReadWrite() && len(use.Swaps) == 0:
		s.instant = readOnly(path)
	default:
		err = s.inUse(ctx, g, f, p, use)
	}
	if err != nil {
		s.device.Close()
		return nil, err
	}
	return s, nil
}

// snapshotWays are the arguments of --snapshot.
var snapshotWays = []string{"auto", "none", "freeze", "precopy", "dm", "lvm"}

// ownLVM is what --snapshot auto does with a logical volume in use. It does
// nothing if LVM can make no snapshot of it.
func (s *source) ownLVM(ctx context.Context, g *globals, f *backupFlags, path string, use device.Use) error {
	if f.snapshot != "auto" || !lvm.IsVolume(path) {
		return nil
	}
	readOnly := len(use.Mounts) > 0 && !use.ReadWrite() && len(use.Swaps)+len(use.Claimed) == 0
	if use.Empty() && mappedOpens(path) <= 1 || readOnly {
		return nil
	}
	snap, err := newLVMSnapshot(ctx, g, f, path)
	switch {
	case err == nil:
		s.instant, s.close = snap, snap.close
	case errors.Is(err, lvm.ErrNoRoom):
		g.warn(err)
	case !lvmCannot(err):
		return err
	}
	return nil
}

// suspendable says whether a snapshot is made by device-mapper, which can have
// anybody wait, whether a file system or not.
func (s *source) suspendable(f *backupFlags) bool {
	return f.snapshot == "dm" || f.snapshot == "lvm" || f.snapshot == "auto" && ownWay(s.device) == "dm"
}

// inUse picks the way to a point in time of a device that is written to.
func (s *source) inUse(ctx context.Context, g *globals, f *backupFlags, p *progress, use device.Use) error {
	path := s.device.Path()
	way := f.snapshot
	if way == "auto" {
		way = ownWay(s.device)
	}
	switch way {
	case "freeze":
		fr, err := newFrozen(ctx, g, cmp.Or(f.maxFreeze, freeze.DefaultMaxFreeze), p, path, use.Mounts)
		if err != nil {
			return err
		}
		s.instant, s.close = fr, fr.close
	case "precopy":
		pre, err := newPrecopied(ctx, g, cmp.Or(f.maxFreeze, defaultMaxPause), p, path, use.Mounts)
		if err != nil {
			return err
		}
		s.instant, s.close = pre, pre.close
		s.precopy = &snapshot.Precopy{MaxFreeze: pre.maxFreeze}
	case "dm":
		snap, err := newDMSnapshot(ctx, g, f, p, path, use)
		if err != nil {
			return err
		}
		s.instant, s.close = snap, snap.close
	case "lvm":
		snap, err := newLVMSnapshot(ctx, g, f, path)
		if err != nil {
			return err
		}
		s.instant, s.close = snap, snap.close
	default:
		return fmt.Errorf("%s is mounted read-write (%v): for a point in time have it tracked (`dsync-backup track start %s`) or say --snapshot freeze; else --snapshot none", path, use, path)
	}
	return nil
}

// ownWay is what --snapshot auto does with a device that is mounted
// read-write, or "" if there is nothing to be done without being told.
func ownWay(d *device.Device) string {
	t, err := trackers.Open(d.RealPath())
	if err != nil {
		return ""
	}
	defer t.Close()
	// The module dm-snapshot may be missing where dm-dsync is there.
	if _, err := devmapper.TargetVersion("snapshot"); err == nil {
		if _, ok := t.(*dm.Tracker); ok {
			return "dm"
		}
	}
	return "precopy"
}

func readRanges(path string, size int64) ([]kernel.Extent, error) {
	if path == "-" {
		return snapshot.ParseRanges(os.Stdin, size)
	}
	file, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("--changes: no such source, and no such file of ranges: %w", err)
	}
	defer file.Close()
	return snapshot.ParseRanges(file, size)
}
