// SPDX-License-Identifier: BSD-2-Clause

package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/repo/backend/location"
	"github.com/dsync-backup/dsync-backup/snapshot"
	"github.com/dsync-backup/dsync-backup/snapshot/device"
	"github.com/dsync-backup/dsync-backup/snapshot/freeze"
)

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

// newFrozen has the watchdog also resume the device-mapper devices named.
func newFrozen(ctx context.Context, g *globals, maxFreeze time.Duration, p *progress, path string, mounts []device.Mount, suspends ...string) (*frozen, error) {
	// A snapshot is read after the thaw: only what is written under the freeze
	// would wait.
	if len(suspends) == 0 {
		if err := checkRepository(g, mounts); err != nil {
			return nil, err
		}
	}
	freezer, err := freeze.Start(ctx, mounts, freeze.Options{
		MaxFreeze: maxFreeze, Outputs: []*freeze.HoldOutput{g.stdout, g.stderr}, Resume: suspends,
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

// close also ends the watchdog.
func (f *frozen) close() {
	if _, err := f.End(); err != nil {
		f.p.g.warn(err)
	}
	if err := f.freezer.Close(); err != nil {
		f.p.g.warn(err)
	}
}

// defaultMaxPause is how long the last copy of a device in use may take.
const defaultMaxPause = 10 * time.Second

// precopied is the Instant of file systems that are frozen for the last of
// several copies. What is mounted is looked up anew each time, since the
// copies before it may take hours.
type precopied struct {
	g         *globals
	p         *progress
	path      string
	maxFreeze time.Duration
	frozen    *frozen // from Begin on
}

// newPrecopied fails at once for what would otherwise fail after hours.
func newPrecopied(ctx context.Context, g *globals, maxFreeze time.Duration, p *progress, path string, mounts []device.Mount) (*precopied, error) {
	fr, err := newFrozen(ctx, g, maxFreeze, p, path, mounts)
	if err != nil {
		return nil, err
	}
	fr.close()
	return &precopied{g: g, p: p, path: path, maxFreeze: maxFreeze}, nil
}

// Kind implements snapshot.Instant.
func (f *precopied) Kind() snapshot.PointInTime { return snapshot.PointInTimePrecopy }

// Settle implements snapshot.Settler.
func (f *precopied) Settle(ctx context.Context) error {
	use, err := device.InUse(f.path)
	if err != nil {
		return err
	}
	// The topmost first: what it writes goes to those below.
	for _, m := range slices.Backward(use.Mounts) {
		if m.ReadOnly {
			continue
		}
		if err := syncMount(ctx, m); err != nil {
			return err
		}
	}
	return nil
}

// syncMount writes out what a file system holds in memory. A kernel that is
// writing cannot be interrupted; it is left to it when ctx is done.
func syncMount(ctx context.Context, m device.Mount) error {
	file, err := m.Open()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, freeze.DefaultMaxSync)
	defer cancel()
	done := make(chan error, 1)
	go func() {
		defer file.Close()
		done <- unix.Syncfs(int(file.Fd()))
	}()
	select {
	case err = <-done:
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	if err != nil {
		return fmt.Errorf("write out what %s holds in memory: %w", m.Path, err)
	}
	return nil
}

// Begin implements snapshot.Instant.
func (f *precopied) Begin(ctx context.Context) (context.Context, error) {
	use, err := device.InUse(f.path)
	if err != nil {
		return nil, err
	}
	if len(use.Mounts) == 0 {
		return nil, fmt.Errorf("%s was unmounted while it was copied: back it up again", f.path)
	}
	if err := use.CheckFreezable(); err != nil {
		return nil, err
	}
	if f.frozen, err = newFrozen(ctx, f.g, f.maxFreeze, f.p, f.path, use.Mounts); err != nil {
		return nil, err
	}
	return f.frozen.Begin(ctx)
}

// End implements snapshot.Instant.
func (f *precopied) End() (time.Duration, error) {
	if f.frozen == nil {
		return 0, nil
	}
	return f.frozen.End()
}

func (f *precopied) close() {
	if f.frozen != nil {
		f.frozen.close()
	}
}
