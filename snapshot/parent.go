// SPDX-License-Identifier: BSD-2-Clause

package snapshot

import (
	"context"
	"errors"
	"fmt"
	"sort"
	"strings"
	"time"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/kernel/epochlog"
	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/snapshot/layer"
)

// candidate is a device in an older snapshot, from which a backup might go on.
type candidate struct {
	Device
	sn *repo.Snapshot
}

// candidates finds the snapshots of a device by its name, newest first. One
// that is damaged is reported and left out: to go on from another is safe. A
// store that does not answer says nothing of a snapshot, and fails the backup:
// else it would find no parent, and store all of the device again.
func candidates(ctx context.Context, from Store, name string, warn func(error)) ([]candidate, error) {
	var out []candidate
	err := from.ListSnapshots(ctx, func(id repo.ID, sn *repo.Snapshot, err error) error {
		if err != nil {
			return passOver(id, err, warn)
		}
		for _, path := range sn.Paths {
			if path != name {
				continue
			}
			m, err := manifestAt(ctx, from, sn, path)
			switch {
			case errors.Is(err, ErrNoDevice):
			case ctx.Err() != nil:
				return context.Cause(ctx)
			case err != nil:
				if err := passOver(id, err, warn); err != nil {
					return err
				}
			default:
				out = append(out, candidate{Device{id, path, m}, sn})
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	sort.Slice(out, func(i, j int) bool { return out[i].sn.Time.After(out[j].sn.Time) })
	return out, nil
}

// passOver reports a snapshot that is damaged, and returns any other error.
func passOver(id repo.ID, err error, warn func(error)) error {
	if layer.IsDamage(err) {
		warn(fmt.Errorf("snapshot %s is passed over: %w", id.Str(), err))
		return nil
	}
	return fmt.Errorf("look for a snapshot to go on from: snapshot %s: %w", id.Str(), err)
}

// leaveReverted begins a new history if a snapshot has a position of the running one
// that the log knows to be none: the machine, or its state directory, was reverted
// to an older state. What was written in the epochs that were lost may still be on
// the device, so that no older position can be trusted either.
func (b *backup) leaveReverted(ctx context.Context) error {
	if b.History == nil {
		return nil
	}
	for _, c := range b.cands {
		if c.Manifest.Position == nil {
			continue
		}
		err := b.History.Reverted(ctx, *c.Manifest.Position)
		if err == nil {
			continue
		}
		if !errors.Is(err, epochlog.ErrReverted) {
			return err
		}
		b.Broken = fmt.Sprintf("snapshot %s: %v", c.Snapshot.Str(), err)
		if err := b.History.Restart(ctx, b.Broken); err != nil {
			return fmt.Errorf("%s; and tracking cannot be begun anew: %w", b.Broken, err)
		}
		return nil
	}
	return nil
}

// bridge picks the candidate with the highest position of this tracker that
// can be bridged, and the blocks written since. Without one, the reason says
// why the best of them is not usable; it is empty where there is none at all.
func bridge(ctx context.Context, cands []candidate, h History, now kernel.Position, size int64) (*candidate, *kernel.Bitmap, string) {
	var ours []*candidate
	reason := ""
	for i := range cands {
		switch p := cands[i].Manifest.Position; {
		case p != nil && p.Tracker == now.Tracker && cands[i].Manifest.Size > size:
			reason = fmt.Sprintf("snapshot %s is of a device of %d bytes, which has only %d now", cands[i].Snapshot.Str(), cands[i].Manifest.Size, size)
		case p != nil && p.Tracker == now.Tracker:
			ours = append(ours, &cands[i])
		case reason != "":
		case p == nil:
			reason = fmt.Sprintf("snapshot %s was made without a reliable tracker", cands[i].Snapshot.Str())
		default:
			reason = fmt.Sprintf("snapshot %s belongs to tracker %s, but tracker %s watches now: tracking started afresh in between", cands[i].Snapshot.Str(), p.Tracker, now.Tracker)
		}
	}
	sort.SliceStable(ours, func(i, j int) bool { return ours[i].Manifest.Position.Epoch > ours[j].Manifest.Position.Epoch })
	for i, c := range ours {
		dirty, err := h.Since(ctx, *c.Manifest.Position)
		if before := c.Manifest.Size; err == nil && before != size {
			// It grew, and its tracker kept its history over that.
			if dirty.Blocks() != kernel.BlocksOf(size) {
				err = fmt.Errorf("it is of a device of %d bytes, which has %d now", before, size)
			} else {
				dirty.SetRange(before/kernel.BlockSize, dirty.Blocks()-1)
			}
		}
		if err == nil {
			return c, dirty, ""
		}
		if i == 0 {
			reason = fmt.Sprintf("snapshot %s: %v", c.Snapshot.Str(), err)
		}
	}
	return nil, nil, reason
}

// latest is the newest candidate of a host: what a compare scan or a list of
// ranges goes on from.
func latest(cands []candidate, host string) *candidate {
	for i := range cands {
		if cands[i].sn.Hostname == host {
			return &cands[i]
		}
	}
	return nil
}

// named is the candidate whose ID begins so.
func named(cands []candidate, id string) (*candidate, error) {
	var found *candidate
	for i := range cands {
		if !strings.HasPrefix(cands[i].Snapshot.String(), id) {
			continue
		}
		if found != nil {
			return nil, fmt.Errorf("--parent %s: the IDs of several snapshots begin so, give more of it", id)
		}
		found = &cands[i]
	}
	if found == nil {
		return nil, fmt.Errorf("--parent %s: there is no such snapshot of the device, or it cannot be read: use --changes compare without it", id)
	}
	return found, nil
}

// rangesParent is what a list of ranges goes on from. With another snapshot than the one that
// the list was made against what was written in between would be missed, and nothing would
// show it: so where it is not certain which one is the last, none is taken.
func (b *backup) rangesParent() (*candidate, error) {
	const way = "name the one that the list was made against with --parent, or use --changes compare"
	if b.Parent != "" {
		return named(b.cands, b.Parent)
	}
	last := latest(b.cands, b.Host)
	switch {
	case last == nil && b.unread == nil:
		return nil, fmt.Errorf("no snapshot of %s on host %s to apply changed ranges to: make one with --changes full first", b.Name, b.Host)
	case b.unread != nil:
		return nil, fmt.Errorf("it is not certain which snapshot of %s is the last, since one cannot be read: %s (%w)", b.Name, way, b.unread)
	case !last.sn.Time.Before(b.Time):
		return nil, fmt.Errorf("it is not certain which snapshot of %s is the last, since %s is of %s, and this one of %s: %s",
			b.Name, last.Snapshot.Str(), last.sn.Time.Local().Format(time.DateTime), b.Time.Local().Format(time.DateTime), way)
	}
	for i := range b.cands {
		if other := &b.cands[i]; other != last && other.sn.Hostname == b.Host && other.sn.Time.Equal(last.sn.Time) {
			return nil, fmt.Errorf("it is not certain which snapshot of %s is the last, since %s and %s are of the same time: %s",
				b.Name, last.Snapshot.Str(), other.Snapshot.Str(), way)
		}
	}
	return last, nil
}
