// SPDX-License-Identifier: BSD-2-Clause

package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/kernel/bpf"
	"github.com/dsync-backup/dsync-backup/kernel/epochlog"
)

// history is a tracker with its epoch log.
type history struct {
	*epochlog.Session
	tracker kernel.Tracker
}

// Status implements snapshot.History.
func (h *history) Status(ctx context.Context) (kernel.Status, error) { return h.tracker.Status(ctx) }

// Peek implements snapshot.History.
func (h *history) Peek(ctx context.Context) (*kernel.Bitmap, error) { return h.tracker.Peek(ctx) }

// Close lets go of the tracker and its lock.
func (h *history) Close() error { return errors.Join(h.Unlock(), h.tracker.Close()) }

// openHistory finds the tracker of a device; nil if there is none. One that
// missed something is started afresh, so that only this backup has to compare,
// and the reason is returned. So is the reason why a tracker cannot be asked.
func openHistory(ctx context.Context, g *globals, path string) (*history, string, error) {
	t, err := bpf.Open(path)
	if err != nil && (errors.Is(err, kernel.ErrNotTracked) || bpf.Supported() != nil) {
		return nil, "", nil //nolint:nilerr // what does not run here watches nothing
	}
	if err != nil {
		return nil, fmt.Sprintf("the tracker cannot be asked: %v", err), nil
	}
	st, err := t.Status(ctx)
	if err != nil {
		return nil, "", errors.Join(err, t.Close())
	}
	reason := ""
	if !st.Reliable {
		reason = st.Reason
		if t, err = renew(ctx, t, path); err != nil {
			return nil, "", err
		}
	}
	s, err := epochlog.Open(ctx, t, g.stateDir)
	if err != nil {
		return nil, "", errors.Join(err, t.Close())
	}
	return &history{s, t}, reason, s.Unlock()
}

// renew ends a history that cannot be trusted and begins another.
func renew(ctx context.Context, old *bpf.Tracker, path string) (*bpf.Tracker, error) {
	if err := old.Stop(ctx); err != nil {
		return nil, fmt.Errorf("end the tracker that missed something: %w", err)
	}
	t, err := bpf.Start(ctx, path, bpf.Options{})
	if err != nil {
		return nil, fmt.Errorf("track %s afresh: %w", path, err)
	}
	return t, nil
}
