// SPDX-License-Identifier: BSD-2-Clause

package dm

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/kernel/devmapper"
)

// uuidPrefix begins the device-mapper uuid of the devices that Start makes.
const uuidPrefix = "DSYNC-"

// Tracker is one tracked device. It implements [kernel.Tracker].
type Tracker struct {
	dir  string // in procRoot, where it was last
	dev  uint64 // the mapped device
	name string // as of when it was opened
	uuid kernel.UUID
	size int64
	back uint64 // number of the device beneath
}

var _ kernel.Tracker = (*Tracker)(nil)

func newTracker(r record) *Tracker {
	return &Tracker{dir: r.dir, dev: r.dev, name: r.name, uuid: r.uuid, size: r.size(), back: r.below}
}

// Open finds the tracker of a device, named by any path to the mapped device or
// to the device beneath it: [kernel.ErrNotTracked] if there is none.
func Open(path string) (*Tracker, error) {
	dev, err := blockDevice(path)
	if err != nil {
		return nil, err
	}
	all, err := begun()
	if err != nil {
		return nil, fmt.Errorf("open tracker of %s: %w", path, err)
	}
	var above []record
	for _, r := range all {
		if r.dev == dev {
			return newTracker(r), nil
		}
		if r.below == dev {
			above = append(above, r)
		}
	}
	switch len(above) {
	case 0:
		return nil, fmt.Errorf("open tracker of %s: %w", path, kernel.ErrNotTracked)
	case 1:
		return newTracker(above[0]), nil
	}
	return nil, fmt.Errorf("open tracker of %s: %s and %s both lie on it: name one of them",
		path, devmapper.Path(above[0].name), devmapper.Path(above[1].name))
}

// begun reads the status of every history but those of tables that never were
// live: of a start that is under way, or was killed.
func begun() ([]record, error) {
	all, err := records()
	return slices.DeleteFunc(all, func(r record) bool { return !r.live && r.invalid == "" }), err
}

// List opens every tracker of this machine.
func List() ([]*Tracker, error) {
	all, err := begun()
	if err != nil {
		return nil, err
	}
	var out []*Tracker
	for _, r := range all {
		out = append(out, newTracker(r))
	}
	return out, nil
}

// UUID names the tracker's history.
func (t *Tracker) UUID() kernel.UUID { return t.uuid }

// Device is the node of the mapped device, which is used in place of the one
// beneath.
func (t *Tracker) Device() string { return devmapper.Path(t.name) }

// Dev is the number of the mapped device, as stat returns it in st_rdev.
func (t *Tracker) Dev() uint64 { return t.dev }

// Below is the node of the device beneath.
func (t *Tracker) Below() string {
	if d, err := describe(t.back); err == nil {
		return d.path()
	}
	return devString(t.back)
}

// Size is the mapped device's size in bytes when the tracker was opened.
func (t *Tracker) Size() int64 { return t.size }

// Close lets go of the tracker; tracking goes on.
func (t *Tracker) Close() error { return nil }

// look reads the module's record of the history, if it is still this one.
func (t *Tracker) look(ctx context.Context) (record, error) {
	if err := ctx.Err(); err != nil {
		return record{}, err
	}
	r, err := find(t.dev, t.dir)
	if errors.Is(err, errNoHistory) {
		return record{}, fmt.Errorf("look for tracker %s of %s: %w", t.uuid, t.Device(), kernel.ErrNotTracked)
	}
	if err != nil {
		return record{}, err
	}
	t.dir, t.name = r.dir, r.name
	if r.uuid != t.uuid {
		return record{}, fmt.Errorf("look for tracker %s of %s: another history (%s) has its place: %w", t.uuid, t.Device(), r.uuid, kernel.ErrNotTracked)
	}
	return r, nil
}

// message sends a message to the target. Only a device whose live table is
// ours is told anything: the words could mean something to another target.
func (t *Tracker) message(r record, words ...string) error {
	table, err := devmapper.Table(r.name, devmapper.Query{})
	if err != nil {
		return err
	}
	if len(table) == 0 || table[0].Type != targetType {
		return fmt.Errorf("send message %q to %s: its table is no longer one of %s", words[0], t.Device(), targetType)
	}
	_, err = devmapper.Message(r.name, 0, strings.Join(words, " "))
	return err
}

// Stop ends the history and removes the mapped device; the device beneath is
// what it was. A mapped device that is in use is ErrInUse, and stays.
func (t *Tracker) Stop(ctx context.Context) error {
	unlock, err := lockAll(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	r, err := t.look(ctx)
	if err != nil {
		return err
	}
	info, err := devmapper.Stat(r.name)
	if err != nil {
		return err
	}
	if err := t.ours(info); err != nil {
		return err
	}
	return t.remove(ctx, r)
}

// StopQuiet is Stop, and makes sure that nothing was written in the running
// epoch: why says so if something was, or may have been.
func (t *Tracker) StopQuiet(ctx context.Context) (why string, err error) {
	unlock, err := lockAll(ctx)
	if err != nil {
		return "", err
	}
	defer unlock()
	r, err := t.look(ctx)
	if err != nil {
		return "", err
	}
	info, err := devmapper.Stat(r.name)
	if err != nil {
		return "", err
	}
	if err := t.ours(info); err != nil {
		return "", err
	}
	// Whoever has it open can write until it is gone. While it is suspended
	// nothing reaches the device beneath, and one that has it open is in the
	// way of the removal.
	if err := devmapper.Suspend(ctx, r.name, devmapper.SuspendOptions{SkipLockFS: true}); err != nil {
		return "", err
	}
	resume := func() error {
		return devmapper.Resume(context.WithoutCancel(ctx), r.name, devmapper.ResumeOptions{NoNode: true})
	}
	if r, err = t.look(ctx); err == nil {
		why, err = t.inspect(ctx, r)
	}
	if err != nil {
		return "", errors.Join(err, resume())
	}
	if why == "" && (r.dirty > 0 || r.pending) {
		why = fmt.Sprintf("%d blocks were written while tracking was stopped", r.dirty)
	}
	if err := t.remove(ctx, r); err != nil {
		return "", errors.Join(err, resume())
	}
	return why, nil
}

// ours refuses a device that Start did not make.
func (t *Tracker) ours(info devmapper.Info) error {
	if info.Dev != t.dev {
		return fmt.Errorf("stop tracking %s: it is another device by now", t.Device())
	}
	if !strings.HasPrefix(info.UUID, uuidPrefix) {
		return fmt.Errorf("stop tracking %s: it was not made by `track start`: remove it with dmsetup", t.Device())
	}
	return nil
}

func (t *Tracker) remove(ctx context.Context, r record) error {
	err := devmapper.Remove(ctx, r.name, devmapper.RemoveOptions{})
	if errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("stop tracking %s: it is %w: unmount it and stop what uses it first", t.Device(), ErrInUse)
	}
	return err
}
