// SPDX-License-Identifier: BSD-2-Clause

package resume

import (
	"context"
	"errors"
	"fmt"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/kernel/epochlog"
	"github.com/dsync-backup/dsync-backup/kernel/fingerprint"
	"github.com/dsync-backup/dsync-backup/kernel/trackers"
)

// Options tune Start.
type Options struct {
	trackers.Options
	StateDir string
	Fresh    bool // begin a new history, whatever was saved

	hook func(point string) // tests crash here
}

// Started is a tracker that watches its device.
type Started struct {
	trackers.Tracker
	// Resumed says that its history goes on.
	Resumed bool
	// Saved says that a state was there that may have been the device's.
	Saved bool
	// Why is the reason for a new history.
	Why error
}

// Start tracks a device. Its history goes on if one was saved and nothing can have
// been written since; otherwise a new one begins.
func Start(ctx context.Context, path string, o Options, devices Devices) (*Started, error) {
	if o.hook == nil {
		o.hook = func(string) {}
	}
	unlock, err := lockAll(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	// Before anything is taken away.
	if err := trackers.CheckUntracked(path); err != nil {
		return nil, err
	}
	w, err := withdraw(ctx, path, o.StateDir, devices)
	if err != nil {
		return nil, err
	}
	o.hook("withdrawn")
	t, err := trackers.Start(ctx, path, o.Options)
	if err != nil {
		return nil, errors.Join(err, w.PutBack())
	}
	o.hook("attached")
	s := &Started{Tracker: t, Saved: !w.None()}
	if o.Fresh {
		s.Why = errors.New("as was asked for (--fresh)")
	} else {
		s.Why = takeUp(ctx, t, w, devices, o)
	}
	if s.Resumed = s.Why == nil; s.Resumed {
		err = w.PutBack() // what is another device's
	} else {
		err = w.Drop()
	}
	o.hook("started")
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%s is tracked, but: %w", path, err), t.Close())
	}
	return s, nil
}

// lockAll has one process at a time begin or save a history: while a device has a
// tracker, no state of it must lie there, which another start would have put
// back, or another stop saved, behind this one's back.
func lockAll(ctx context.Context) (unlock func(), err error) {
	return epochlog.Lock(ctx, kernel.UUID{}) // no tracker's
}

func withdraw(ctx context.Context, path, stateDir string, devices Devices) (*fingerprint.Withdrawn, error) {
	d, err := devices.Open(path, false)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	id, err := devices.Identify(ctx, path)
	if err != nil {
		return nil, err
	}
	return fingerprint.Withdraw(ctx, stateDir, d, d.Size(), id)
}

// takeUp has the new tracker go on with the history that was saved. The device is
// claimed only now: what was written before the tracker was attached, the
// fingerprint has to tell, and what was written since is marked.
func takeUp(ctx context.Context, t trackers.Tracker, w *fingerprint.Withdrawn, devices Devices, o Options) error {
	if w.None() {
		_, err := w.Match(ctx, nil, 0) // says so
		return err
	}
	d, err := devices.Open(t.Device(), true)
	if err != nil {
		return err
	}
	defer d.Close()
	o.hook("claimed")
	saved, err := w.Match(ctx, d, d.Size())
	if err != nil {
		return err
	}
	for _, u := range []kernel.UUID{saved.Last.Tracker, t.UUID()} {
		unlock, err := epochlog.Lock(ctx, u)
		if err != nil {
			return err
		}
		defer unlock()
	}
	if err := w.Use(); err != nil {
		return err
	}
	o.hook("used")
	return t.Continue(ctx, saved.Last.Tracker, saved.Last.Epoch+1)
}
