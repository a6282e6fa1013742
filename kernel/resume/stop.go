// SPDX-License-Identifier: BSD-2-Clause

package resume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/kernel/dm"
	"github.com/dsync-backup/dsync-backup/kernel/epochlog"
	"github.com/dsync-backup/dsync-backup/kernel/fingerprint"
	"github.com/dsync-backup/dsync-backup/kernel/trackers"
)

// Stop takes a tracker off its device and saves its history. With a doubt the
// history ends, and why says what the doubt is. On an error, that the device is
// in use for one, it is tracked as before. The tracker is closed in any case.
func Stop(ctx context.Context, t trackers.Tracker, stateDir string, devices Devices) (why, err error) {
	return stop(ctx, t, stateDir, devices, func(string) {})
}

func stop(ctx context.Context, t trackers.Tracker, stateDir string, devices Devices, hook func(point string)) (why, err error) {
	closed := false
	defer func() {
		if !closed {
			err = errors.Join(err, t.Close())
		}
	}()
	unlock, err := lockAll(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	d, err := devices.Open(t.Device(), true)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	saved, err := describe(ctx, t, d, devices)
	if err != nil {
		return nil, err
	}
	log, err := epochlog.Open(ctx, t, stateDir) // holds the tracker's lock
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, log.Unlock()) }()
	hook("claimed")
	if why, err = witness(ctx, t, log, d, &saved, hook); err != nil {
		return nil, err
	}
	if _, ok := t.(*dm.Tracker); ok {
		// What is open cannot be removed. What is written from here on is
		// marked, and StopQuiet says so.
		if err := d.Close(); err != nil {
			return nil, err
		}
	}
	late, err := t.StopQuiet(ctx)
	if err != nil {
		return nil, err
	}
	closed = true
	hook("stopped")
	if why == nil && late != "" {
		why = errors.New(late)
	}
	if why != nil {
		return why, nil
	}
	saved.Time = time.Now().UTC()
	why = fingerprint.Save(stateDir, saved)
	hook("saved")
	return why, nil
}

// describe tells what a saved state says of a device beside its fingerprint.
func describe(ctx context.Context, t trackers.Tracker, d Device, devices Devices) (s fingerprint.Saved, err error) {
	s.Device = t.Device()
	if s.Identity, err = devices.Identify(ctx, beneath(t)); err != nil {
		return s, err
	}
	s.Tracker = string(kindOf(t))
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return s, fmt.Errorf("save tracking: %w", err)
	}
	s.BootID = strings.TrimSpace(string(boot))
	return s, nil
}

// beneath is the device that is there without the tracker, too.
func beneath(t trackers.Tracker) string {
	if d, ok := t.(*dm.Tracker); ok {
		return d.Below()
	}
	return t.Device()
}

func kindOf(t trackers.Tracker) trackers.Kind {
	if _, ok := t.(*dm.Tracker); ok {
		return trackers.DM
	}
	return trackers.BPF
}

// witness ends and logs an epoch, takes the fingerprint, and ends another epoch,
// in which nothing may have been written. Why says what cannot be vouched for.
func witness(ctx context.Context, t trackers.Tracker, log *epochlog.Session, d Device, s *fingerprint.Saved, hook func(string)) (why, err error) {
	end := func() (kernel.Epoch, error) {
		e, err := log.Rotate(ctx) // writes out the page cache first
		if err != nil {
			return e, err
		}
		if err := log.Commit(ctx); err != nil {
			return e, err
		}
		st, err := t.Status(ctx)
		if err == nil && !st.Reliable {
			why = errors.New(st.Reason)
		}
		return e, err
	}
	if _, err := end(); err != nil || why != nil {
		return why, err
	}
	hook("logged")
	if t.Size() != d.Size() {
		return fmt.Errorf("the tracker watches %d bytes of %s, which has %d", t.Size(), d.Path(), d.Size()), nil
	}
	if s.Fingerprint, err = fingerprint.Take(ctx, d, d.Size(), fingerprint.NewKey()); err != nil {
		return nil, err
	}
	if why := s.Fingerprint.Proof(); why != nil {
		return why, nil
	}
	hook("witnessed")
	last, err := end()
	if err != nil || why != nil {
		return why, err
	}
	if n := last.Bitmap.Count(); n > 0 {
		return fmt.Errorf("somebody who has not claimed the device is writing to it (%d blocks just now)", n), nil
	}
	s.Last = last.Position
	return nil, nil
}
