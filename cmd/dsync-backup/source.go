// SPDX-License-Identifier: BSD-2-Clause

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/repo/backend/location"
	"github.com/dsync-backup/dsync-backup/snapshot"
	"github.com/dsync-backup/dsync-backup/snapshot/device"
	"github.com/dsync-backup/dsync-backup/snapshot/freeze"
)

// source is a device that is open, and the way to its point in time.
type source struct {
	device  *device.Device
	instant snapshot.Instant
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
	if f.snapshot != "auto" && f.snapshot != "none" && f.snapshot != "freeze" {
		return nil, fmt.Errorf("--snapshot %q is not one of auto, none, freeze", f.snapshot)
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
	switch {
	case f.snapshot == "none":
		s.instant = snapshot.Still(snapshot.PointInTimeNone)
	case use.Empty():
		// Claimed, so that it stays that way.
		d.Close()
		s.device, err = device.Open(path, device.Options{Exclusive: true})
		s.instant = snapshot.Still(snapshot.PointInTimeUnmounted)
	case len(use.Mounts) == 0 || use.CheckFreezable() != nil:
		err = fmt.Errorf("%s is in use by what cannot be frozen (%v): stop that, or say --snapshot none for a copy that is no point in time", path, use)
	case !use.ReadWrite() && len(use.Swaps) == 0:
		s.instant = readOnly(path)
	case f.snapshot == "auto":
		err = fmt.Errorf("%s is mounted read-write (%v): say --snapshot freeze for a point in time, or --snapshot none", path, use)
	default:
		s.instant, err = newFrozen(ctx, g, f, p, path, use.Mounts)
	}
	if err != nil {
		s.device.Close()
		return nil, err
	}
	if fr, ok := s.instant.(*frozen); ok {
		s.close = fr.close
	}
	return s, nil
}

// readOnly is the Instant of a device whose file systems are all mounted
// read-only.
type readOnly string

// Kind implements snapshot.Instant.
func (readOnly) Kind() snapshot.PointInTime { return snapshot.PointInTimeReadOnly }

// Begin implements snapshot.Instant.
func (readOnly) Begin(ctx context.Context) (context.Context, error) { return ctx, nil }

// End implements snapshot.Instant: it looks whether they still are.
func (r readOnly) End() (time.Duration, error) {
	use, err := device.InUse(string(r))
	if err == nil && use.ReadWrite() {
		err = fmt.Errorf("%s was remounted read-write while it was read (%v): back it up again with --snapshot freeze", string(r), use)
	}
	return 0, err
}

// frozen is the Instant of frozen file systems.
type frozen struct {
	freezer *freeze.Freezer
	path    string
	p       *progress
	cancel  context.CancelFunc
	begun   bool
	took    time.Duration
}

func newFrozen(ctx context.Context, g *globals, f *backupFlags, p *progress, path string, mounts []device.Mount) (*frozen, error) {
	if err := checkRepository(g, mounts); err != nil {
		return nil, err
	}
	freezer, err := freeze.Start(ctx, mounts, freeze.Options{
		MaxFreeze: f.maxFreeze, Outputs: []*freeze.HoldOutput{g.stdout, g.stderr},
	})
	if err != nil {
		return nil, err
	}
	return &frozen{freezer: freezer, path: path, p: p}, nil
}

// checkRepository refuses a repository on a file system that will be frozen:
// the backup would wait for itself.
func checkRepository(g *globals, mounts []device.Mount) error {
	name, err := g.location()
	if err != nil {
		return err
	}
	l, err := location.Parse(name)
	if err != nil || l.Path == "" {
		return err
	}
	on, lies, err := device.LiesOn(l.Path, mounts)
	if err != nil {
		return err
	}
	if lies {
		return fmt.Errorf("the repository %s lies on %s, which would be frozen: keep it elsewhere, or say --snapshot none", l.Path, on.Path)
	}
	return nil
}

// Kind implements snapshot.Instant.
func (f *frozen) Kind() snapshot.PointInTime { return snapshot.PointInTimeFreeze }

// Begin implements snapshot.Instant. From here on nothing is printed: whoever
// reads our output may have to wait for the frozen file system.
func (f *frozen) Begin(ctx context.Context) (context.Context, error) {
	f.p.hold(true)
	if err := f.freezer.Freeze(ctx); err != nil {
		f.p.hold(false)
		return nil, err // nothing is frozen
	}
	f.begun = true
	now, err := device.InUse(f.path)
	if err == nil {
		err = errors.Join(now.CheckFreezable(), f.freezer.Covers(now.Mounts))
	}
	if err != nil {
		_, _ = f.End() // the reason to stop says more
		return nil, err
	}
	ctx, f.cancel = f.freezer.WithContext(ctx)
	return ctx, nil
}

// End implements snapshot.Instant.
func (f *frozen) End() (time.Duration, error) {
	if !f.begun {
		return f.took, nil
	}
	f.begun = false
	if f.cancel != nil {
		defer f.cancel()
	}
	var err error
	f.took, err = f.freezer.Thaw()
	f.p.hold(false)
	return f.took, err
}

func (f *frozen) close() {
	if _, err := f.End(); err != nil {
		f.p.g.warn(err)
	}
	if err := f.freezer.Close(); err != nil {
		f.p.g.warn(err)
	}
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
