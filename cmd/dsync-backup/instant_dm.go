// SPDX-License-Identifier: BSD-2-Clause

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/dsync-backup/dsync-backup/kernel/devmapper"
	"github.com/dsync-backup/dsync-backup/kernel/dm"
	"github.com/dsync-backup/dsync-backup/snapshot"
	"github.com/dsync-backup/dsync-backup/snapshot/cow"
	"github.com/dsync-backup/dsync-backup/snapshot/device"
)

// dmSnapshot is the Instant of a device that the kernel module tracks: its file
// systems are frozen, it is suspended, and a device-mapper snapshot is made; all
// of which takes milliseconds.
type dmSnapshot struct {
	*frozen
	g       *globals
	cow     *cow.Snapshot
	mounted bool
	device  *device.Device // the snapshot
}

// newDMSnapshot prepares a snapshot of the tracked device at path.
func newDMSnapshot(ctx context.Context, g *globals, f *backupFlags, p *progress, path string, use device.Use) (*dmSnapshot, error) {
	t, err := dm.Open(path)
	if err != nil {
		return nil, fmt.Errorf("--snapshot dm is for what `dsync-backup track start --tracker dm` tracks: %w", err)
	}
	folder, err := cowFolder(g, use.Mounts)
	if err != nil {
		return nil, err
	}
	if err := checkSpace(f.cow, use.Mounts); err != nil {
		return nil, err
	}
	space, err := cow.OpenSpace(f.cow, folder, t.Size())
	if err != nil {
		return nil, err
	}
	c, err := cow.New(ctx, t, space)
	if err != nil {
		return nil, err
	}
	maxFreeze := f.maxFreeze
	if maxFreeze == 0 {
		maxFreeze = defaultMaxPause
	}
	fr, err := newFrozen(ctx, g, maxFreeze, p, path, use.Mounts, filepath.Base(t.Device()))
	if err != nil {
		return nil, errors.Join(err, c.Drop())
	}
	return &dmSnapshot{frozen: fr, g: g, cow: c, mounted: len(use.Mounts) > 0}, nil
}

// cowFolder is where copy-on-write space may be a file: the state directory,
// unless that lies on what the snapshot is of, whose writes would go in circles.
func cowFolder(g *globals, mounts []device.Mount) (string, error) {
	if err := os.MkdirAll(g.stateDir, 0o700); err != nil {
		return "", fmt.Errorf("make the state directory: %w", err)
	}
	_, lies, err := device.LiesOn(g.stateDir, mounts)
	if err != nil || lies {
		return "", err
	}
	return g.stateDir, nil
}

// checkSpace refuses a file on what the snapshot is of.
func checkSpace(spec string, mounts []device.Mount) error {
	if spec == "" || strings.HasPrefix(spec, "memory:") || strings.HasPrefix(spec, "/dev/") {
		return nil
	}
	on, lies, err := device.LiesOn(filepath.Dir(spec), mounts)
	if err == nil && lies {
		err = fmt.Errorf("--cow %s lies on %s, of which the snapshot is: keep it elsewhere, or say --cow memory:SIZE", spec, on.Path)
	}
	return err
}

// Kind implements snapshot.Instant.
func (*dmSnapshot) Kind() snapshot.PointInTime { return snapshot.PointInTimeDM }

// Atomic implements snapshot.Snapshotter.
func (*dmSnapshot) Atomic() bool { return true }

// Begin implements snapshot.Instant.
func (s *dmSnapshot) Begin(ctx context.Context) (context.Context, error) {
	standing, err := s.frozen.Begin(ctx)
	if err != nil {
		return nil, err
	}
	if err := s.cow.Suspend(ctx, s.mounted); err != nil {
		_, _ = s.End() // the reason to stop says more
		return nil, err
	}
	return standing, nil
}

// End implements snapshot.Instant.
func (s *dmSnapshot) End() (time.Duration, error) {
	err := s.cow.Resume(context.Background())
	t, endErr := s.frozen.End()
	return t, errors.Join(err, endErr)
}

// Take implements snapshot.Snapshotter.
func (s *dmSnapshot) Take(ctx context.Context) (*device.Device, error) {
	path, err := s.cow.Take(ctx)
	if err == nil {
		s.device, err = device.Open(path, device.Options{})
	}
	return s.device, err
}

// Watch implements snapshot.Snapshotter.
func (s *dmSnapshot) Watch(ctx context.Context) context.Context { return s.cow.Watch(ctx, s.g.warn) }

// Check implements snapshot.Snapshotter.
func (s *dmSnapshot) Check(ctx context.Context) error { return s.cow.Check(ctx) }

// Drop implements snapshot.Snapshotter.
func (s *dmSnapshot) Drop() error {
	var err error
	if s.device != nil {
		err = s.device.Close()
		s.device = nil
	}
	return errors.Join(err, s.cow.Drop())
}

func (s *dmSnapshot) close() {
	s.frozen.close()
	if err := s.Drop(); err != nil {
		s.g.warn(err)
	}
}

// opens is how often the mapped device of a tracker is open; 0 if the device at
// path is none.
func opens(path string) int {
	t, err := dm.Open(path)
	if err != nil {
		return 0
	}
	i, err := devmapper.Stat(filepath.Base(t.Device()))
	if err != nil {
		return 0
	}
	return i.Opens
}
