// SPDX-License-Identifier: BSD-2-Clause

package main

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/kernel/epochlog"
	"github.com/dsync-backup/dsync-backup/kernel/trackers"
	"github.com/dsync-backup/dsync-backup/snapshot/device"
)

// history is a tracker with its epoch log.
type history struct {
	*epochlog.Session
	tracker trackers.Tracker
}

// Status implements snapshot.History.
func (h *history) Status(ctx context.Context) (kernel.Status, error) { return h.tracker.Status(ctx) }

// Peek implements snapshot.History.
func (h *history) Peek(ctx context.Context) (*kernel.Bitmap, error) { return h.tracker.Peek(ctx) }

// Close lets go of the tracker and its lock.
func (h *history) Close() error { return errors.Join(h.Unlock(), h.tracker.Close()) }

// Size implements snapshot.History.
func (h *history) Size() int64 { return h.tracker.Size() }

// openHistory finds the tracker of an open device; nil if there is none. One
// that missed something is started afresh, so that only this backup has to
// compare, and the reason is returned. So is the reason why a tracker cannot be
// used: a backup does without it then.
func openHistory(ctx context.Context, g *globals, d *device.Device) (*history, string, error) {
	path := d.RealPath()
	// The path may lead elsewhere by now; what was opened counts.
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil || device.Number(st.Rdev) != d.Dev() {
		return nil, path + " is another device than the one that was opened", nil //nolint:nilerr // the reason says it
	}
	if err := checkBeneath(path); err != nil {
		return nil, "", err
	}
	t, err := trackers.Open(path)
	if errors.Is(err, kernel.ErrNotTracked) {
		return nil, "", nil
	}
	if err != nil {
		return nil, fmt.Sprintf("the tracker cannot be asked: %v", err), nil
	}
	status, err := t.Status(ctx)
	if err != nil {
		return nil, fmt.Sprintf("the tracker cannot be asked: %v", err), t.Close()
	}
	reason := ""
	if !status.Reliable {
		reason = status.Reason
		if t, err = trackers.Renew(ctx, t, path); err != nil {
			return nil, fmt.Sprintf("%s; and it cannot be started afresh: %v", reason, err), nil
		}
	}
	s, err := epochlog.Open(ctx, t, g.stateDir)
	if err != nil {
		return nil, "", errors.Join(err, t.Close())
	}
	return &history{s, t}, reason, s.Unlock()
}

// checkBeneath refuses the device beneath a tracked mapped device: what is
// written to the one is read from the other by another way, and under another
// name it would be another device's snapshot.
func checkBeneath(path string) error {
	if above := trackers.Instead(path); above != "" {
		return fmt.Errorf("%s is tracked as %s: back that up", path, above)
	}
	return nil
}
