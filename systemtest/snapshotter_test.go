// SPDX-License-Identifier: BSD-2-Clause

package systemtest

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/snapshot"
	"github.com/dsync-backup/dsync-backup/snapshot/device"
)

// cloned is the Instant of a loop device whose file is cloned, as XFS and btrfs
// can: a real snapshot, which is read while the device goes on.
type cloned struct {
	*moment
	d      *disk
	atomic bool
	truth  string
	before func() // called right before the clone is made, and right after
	after  func()
	lost   error // what Watch ends with
	check  error

	path, loop string
	dev        *device.Device
}

// Atomic implements snapshot.Snapshotter.
func (c *cloned) Atomic() bool { return c.atomic }

// Settle is not asked for.
func (c *cloned) Settle(context.Context) error { return errors.New("a snapshot has nothing to settle") }

// Take implements snapshot.Snapshotter.
func (c *cloned) Take(context.Context) (*device.Device, error) {
	if !c.atomic {
		c.before()
		run(c.d.t, "fsfreeze", "-f", c.d.mnt)
	}
	c.path = filepath.Join(filepath.Dir(c.d.file), "clone")
	run(c.d.t, "cp", "--reflink=always", c.d.file, c.path)
	c.d.image(c.truth)
	if !c.atomic {
		run(c.d.t, "fsfreeze", "-u", c.d.mnt)
		c.after()
	}
	c.loop = run(c.d.t, "losetup", "--find", "--show", "--read-only", c.path)
	var err error
	c.dev, err = device.Open(c.loop, device.Options{})
	return c.dev, err
}

// Watch implements snapshot.Snapshotter.
func (c *cloned) Watch(ctx context.Context) context.Context {
	if c.lost == nil {
		return ctx
	}
	ctx, cancel := context.WithCancelCause(ctx)
	time.AfterFunc(20*time.Millisecond, func() { cancel(c.lost) })
	return ctx
}

// Check implements snapshot.Snapshotter.
func (c *cloned) Check(context.Context) error { return c.check }

// Drop implements snapshot.Snapshotter.
func (c *cloned) Drop() error {
	if c.dev != nil {
		c.dev.Close()
	}
	if c.loop != "" {
		run(c.d.t, "losetup", "-d", c.loop)
	}
	if c.path != "" {
		return os.Remove(c.path)
	}
	return nil
}

// newClonable makes a disk with a mounted ext4, whose file can be cloned.
func newClonable(t testing.TB) *disk {
	t.Helper()
	below := newDisk(t, 2<<30)
	below.mkfs("xfs")
	d := &disk{t: t, file: filepath.Join(below.mnt, "disk.img")}
	if err := os.WriteFile(d.file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(d.file, 512<<20); err != nil {
		t.Fatal(err)
	}
	d.path = run(t, "losetup", "--find", "--show", d.file)
	t.Cleanup(func() { run(t, "losetup", "-d", d.path) })
	d.mkfs("ext4")
	return d
}

// cloning is an Instant whose clone is made of the frozen device, or between
// two writes that must both be in a later epoch.
func (d *disk) cloning(atomic bool, truth string) *cloned {
	freezes := d.freezing(truth)
	kind := snapshot.PointInTimeLVM
	if atomic {
		kind = snapshot.PointInTimeDM
	}
	return &cloned{
		moment: &moment{kind: kind, begins: func() error {
			if !atomic {
				d.t.Error("Begin of what is not atomic")
			}
			return freezes.begins()
		}, ends: freezes.ends},
		d: d, atomic: atomic, truth: truth, before: func() {}, after: func() {},
	}
}

func TestASnapshotIsReadWhileTheDeviceGoesOn(t *testing.T) {
	for name, atomic := range map[string]bool{"Atomic": true, "BetweenTwoEpochs": false} {
		t.Run(name, func(t *testing.T) {
			r := random(t)
			c := newContent(r, true)
			d := newClonable(t)
			w := newWatched(t, d)
			fillFile(t, filepath.Join(d.mnt, "old"), c, 60<<20)
			stop := d.writers(r)
			truth := truthFile(t)
			for range count(10, 3) {
				at := d.cloning(atomic, truth)
				s := w.mustBackup(at, nil)
				if s.PointInTime != string(at.kind) || s.Rounds != 1 || atomic != (s.FreezeSeconds > 0) {
					t.Errorf("%+v", s)
				}
				w.holdsTruth(s, truth)
				run(t, "e2fsck", "-fn", truth)
			}
			stop()

			// What is written right before the snapshot is in it, and is
			// copied; what is written right after it is not; a snapshot that
			// is not atomic has both copied once more by the next backup.
			at := d.cloning(atomic, truth)
			at.before = func() { fillFile(t, filepath.Join(d.mnt, "before"), c, 1<<20) }
			at.after = func() { fillFile(t, filepath.Join(d.mnt, "after"), c, 1<<20) }
			w.holdsTruth(w.mustBackup(at, nil), truth)
			s := w.mustBackup(d.cloning(atomic, truth), nil)
			if s.Changes != snapshot.ChangesTracker || !atomic && s.DirtyBytes < 2<<20 {
				t.Errorf("%+v", s)
			}
			w.holdsTruth(s, truth)
			w.check()
		})
	}
}

func TestASnapshotThatIsLostFailsAndLosesNothing(t *testing.T) {
	r := random(t)
	c := newContent(r, true)
	d := newClonable(t)
	w := newWatched(t, d)
	truth := truthFile(t)
	w.mustBackup(d.cloning(true, truth), nil)
	snapshots := len(w.files("snapshots"))
	full := errors.New("the snapshot's space is used up")
	for name, spoil := range map[string]func(*cloned){
		"Watch": func(at *cloned) { at.lost = full },
		"Check": func(at *cloned) { at.check = full },
	} {
		fillFile(t, filepath.Join(d.mnt, "new"), c, 100<<20)
		at := d.cloning(true, truth)
		spoil(at)
		if _, err := w.backup(at, nil); !errors.Is(err, full) {
			t.Errorf("%s: %v", name, err)
		}
		if n := len(w.files("snapshots")); n != snapshots {
			t.Errorf("%s: a snapshot was saved", name)
		}
		if _, err := os.Stat(at.path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: the clone is left", name)
		}
		if err := unix.Access(d.mnt, unix.W_OK); err != nil {
			t.Error(err)
		}
	}
	s := w.mustBackup(d.cloning(true, truth), nil)
	if s.Changes != snapshot.ChangesTracker || s.DirtyBytes < 100<<20 {
		t.Errorf("the next backup: %+v", s)
	}
	w.holdsTruth(s, truth)
	w.check()
}
