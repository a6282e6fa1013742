// SPDX-License-Identifier: BSD-2-Clause

package main

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/kernel/bpf"
	"github.com/dsync-backup/dsync-backup/kernel/epochlog"
	"github.com/dsync-backup/dsync-backup/snapshot/device"
)

// history is a tracker with its epoch log.
type history struct {
	*epochlog.Session
	tracker *bpf.Tracker
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
	t, err := bpf.Open(path)
	if err != nil && (errors.Is(err, kernel.ErrNotTracked) || bpf.Supported() != nil) {
		return nil, "", nil //nolint:nilerr // what does not run here watches nothing
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
		if t, err = renew(ctx, t, path); err != nil {
			return nil, fmt.Sprintf("%s; and it cannot be started afresh: %v", reason, err), nil
		}
	}
	s, err := epochlog.Open(ctx, t, g.stateDir)
	if err != nil {
		return nil, "", errors.Join(err, t.Close())
	}
	return &history{s, t}, reason, s.Unlock()
}

// renew ends a history that cannot be trusted and begins another. Another
// backup may do the same at the same time.
func renew(ctx context.Context, old *bpf.Tracker, path string) (*bpf.Tracker, error) {
	if err := old.Stop(ctx); err != nil && !errors.Is(err, kernel.ErrNotTracked) {
		return nil, fmt.Errorf("end the tracker that missed something: %w", err)
	}
	t, err := bpf.Start(ctx, path, bpf.Options{})
	if err != nil {
		if other, openErr := bpf.Open(path); openErr == nil {
			return other, nil
		}
		return nil, fmt.Errorf("track %s afresh: %w", path, err)
	}
	return t, nil
}
