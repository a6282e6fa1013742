// SPDX-License-Identifier: BSD-2-Clause

package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/kernel/epochlog"
	"github.com/dsync-backup/dsync-backup/kernel/trackers"
	"github.com/dsync-backup/dsync-backup/snapshot"
	"github.com/dsync-backup/dsync-backup/snapshot/device"
)

// history is a tracker with its epoch log.
type history struct {
	*epochlog.Session
	tracker  trackers.Tracker
	stateDir string
}

// Status implements snapshot.History.
func (h *history) Status(ctx context.Context) (kernel.Status, error) { return h.tracker.Status(ctx) }

// Peek implements snapshot.History.
func (h *history) Peek(ctx context.Context) (*kernel.Bitmap, error) { return h.tracker.Peek(ctx) }

// Invalidate implements snapshot.History.
func (h *history) Invalidate(ctx context.Context, reason string) error {
	return h.tracker.Invalidate(ctx, reason)
}

// Restart implements snapshot.History.
func (h *history) Restart(ctx context.Context, reason string) error {
	path := h.tracker.Device()
	if err := errors.Join(h.Unlock(), h.tracker.Invalidate(ctx, reason)); err != nil {
		return err
	}
	t, err := trackers.Renew(ctx, h.tracker, path)
	if err != nil {
		return err
	}
	s, err := epochlog.Open(ctx, t, h.stateDir)
	if err != nil {
		return errors.Join(err, t.Close())
	}
	h.Session, h.tracker = s, t
	return s.Unlock()
}

// hold records that a repository has a snapshot, so that the log keeps what its
// next backup needs, and lets go of what nobody does.
func (h *history) hold(ctx context.Context, g *globals, repository string, s *snapshot.Summary) error {
	if s.Position == nil || s.Position.Tracker != h.tracker.UUID() {
		return nil
	}
	where, err := g.location()
	if err != nil {
		return err
	}
	if err := h.Relock(ctx); err != nil {
		return err
	}
	now := time.Now()
	err = h.Hold(epochlog.Holder{
		Repository: repository, Location: where, Name: s.Device, Snapshot: s.SnapshotID.String(), Position: *s.Position, Time: now,
	})
	if err == nil {
		_, err = h.Prune(epochlog.DefaultLimits(), now)
	}
	if err := errors.Join(err, h.Unlock()); err != nil {
		return err
	}
	all, err := trackers.List()
	if err != nil {
		return err
	}
	var alive []kernel.UUID
	for _, t := range all {
		alive = append(alive, t.UUID())
		t.Close()
	}
	_, err = epochlog.PruneDead(g.stateDir, alive, epochlog.DefaultLimits(), now)
	return err
}

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
	return &history{s, t, g.stateDir}, reason, s.Unlock()
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
