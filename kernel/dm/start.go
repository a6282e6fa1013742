// SPDX-License-Identifier: BSD-2-Clause

package dm

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/kernel/devmapper"
)

// Options tune Start.
type Options struct {
	// Name of the mapped device; default: the last part of the path, and
	// "-dsync".
	Name string

	hook func(point string) error // tests fail or crash here
}

// Start claims a device, which may be named by a symbolic link, and begins its
// history: /dev/mapper/NAME is the device from now on. A device that is used,
// by a mount say, is ErrInUse. Nothing is left of a start that fails, and what
// one that was killed has left is cleared away by the next.
func Start(ctx context.Context, path string, o Options) (*Tracker, error) {
	if o.Name == "" {
		o.Name = DefaultName(path)
	}
	if o.hook == nil {
		o.hook = func(string) error { return nil }
	}
	if err := devmapper.CheckName(o.Name); err != nil {
		return nil, fmt.Errorf("track %s: %w", path, err)
	}
	if err := Supported(); err != nil {
		return nil, fmt.Errorf("track %s: %w", path, err)
	}
	dev, err := blockDevice(path)
	if err != nil {
		return nil, err
	}
	unlock, err := lockAll(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if old, err := Open(path); err == nil {
		return nil, fmt.Errorf("track %s: it is tracked already, as %s", path, old.Device())
	} else if !errors.Is(err, kernel.ErrNotTracked) {
		return nil, err
	}
	d, err := describe(dev)
	if err != nil {
		return nil, err
	}
	if err := d.refuse(); err != nil {
		return nil, err
	}
	sweep(ctx)
	if err := d.claim(o.Name); err != nil {
		return nil, err
	}
	return d.build(ctx, o)
}

// DefaultName is the name that Start gives to the mapped device of the device
// at a path.
func DefaultName(path string) string { return filepath.Base(path) + "-dsync" }

// build makes the mapped device step by step, and removes it if a step fails.
func (d disk) build(ctx context.Context, o Options) (tr *Tracker, err error) {
	info, err := devmapper.Create(o.Name, uuidPrefix+kernel.NewUUID().String())
	if errors.Is(err, unix.EBUSY) {
		return nil, fmt.Errorf("track %s: there is a device-mapper device %s already: give another name (--as)", d.path(), o.Name)
	}
	if err != nil {
		return nil, fmt.Errorf("track %s: %w", d.path(), err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, undo(o.Name))
		}
	}()
	if err := o.hook("created"); err != nil {
		return nil, err
	}
	if err := d.load(o.Name, info); err != nil {
		return nil, err
	}
	if err := o.hook("loaded"); err != nil {
		return nil, err
	}
	// Dirty pages of the device's own caches would be written out later, past
	// the mapped device.
	relatives, err := d.relatives()
	if err != nil {
		return nil, err
	}
	for _, r := range relatives {
		if err := r.sync(); err != nil {
			return nil, fmt.Errorf("track %s: %w", d.path(), err)
		}
	}
	// From the claim on nobody can come to use it, but by opening it.
	if who, err := d.writers(); err != nil {
		return nil, err
	} else if who != "" {
		return nil, fmt.Errorf("track %s: it is %w: %s has opened it for writing meanwhile", d.path(), ErrInUse, who)
	}
	if now, err := describe(d.dev); err != nil || now != d {
		return nil, fmt.Errorf("track %s: the device changed meanwhile: try again", d.path())
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := devmapper.Resume(ctx, o.Name, devmapper.ResumeOptions{}); err != nil {
		return nil, fmt.Errorf("track %s: %w", d.path(), err)
	}
	if err := o.hook("resumed"); err != nil {
		return nil, err
	}
	r, err := find(info.Dev, filepath.Join(procRoot, o.Name))
	if err != nil {
		return nil, fmt.Errorf("track %s: %w", d.path(), err)
	}
	if !r.live || r.below != d.dev || r.sectors != d.sectors {
		return nil, fmt.Errorf("track %s: the module says that it tracks %d sectors of %s", d.path(), r.sectors, devString(r.below))
	}
	return newTracker(r), nil
}

// load loads the table, by which device-mapper claims the device.
func (d disk) load(name string, info devmapper.Info) error {
	err := devmapper.Load(name, devmapper.LoadOptions{}, devmapper.Target{
		Length: d.sectors, Type: targetType, Params: devString(d.dev) + " 0",
	})
	if errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("track %s: it is %w: somebody has claimed it meanwhile", d.path(), ErrInUse)
	}
	if err != nil {
		return fmt.Errorf("track %s: %w (the kernel log may say more)", d.path(), err)
	}
	// Device-mapper lets its devices share what one of them has claimed.
	holders, err := d.holders()
	if err != nil {
		return err
	}
	for _, h := range holders {
		if h != fmt.Sprintf("dm-%d", info.Minor()) {
			return fmt.Errorf("track %s: it is %w: %s was built on it meanwhile", d.path(), ErrInUse, h)
		}
	}
	return nil
}

// undo removes a device that did not come to be, whatever ended the start.
func undo(name string) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	return devmapper.Remove(ctx, name, devmapper.RemoveOptions{})
}

// sweep removes devices that a killed start left without a live table. The
// caller holds the lock, so that no start is under way.
func sweep(ctx context.Context) {
	list, err := devmapper.List()
	if err != nil {
		return
	}
	for _, e := range list {
		info, err := devmapper.Stat(e.Name)
		if err == nil && strings.HasPrefix(info.UUID, uuidPrefix) && !info.Live && info.Opens == 0 {
			_ = devmapper.Remove(ctx, e.Name, devmapper.RemoveOptions{})
		}
	}
}
