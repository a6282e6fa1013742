// SPDX-License-Identifier: BSD-2-Clause

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/kernel/epochlog"
	"github.com/dsync-backup/dsync-backup/kernel/trackers"
)

// trackerStatus is what `track status --json` says of a tracker.
type trackerStatus struct {
	kernel.Status
	Repositories []holderStatus `json:"repositories"`
}

// holderStatus is what a repository has of a tracked device, and what its next
// backup has to read.
type holderStatus struct {
	Repository  string    `json:"repository"`
	Location    string    `json:"location"`
	Name        string    `json:"name"`
	Snapshot    string    `json:"snapshot"`
	Time        time.Time `json:"time"`
	Epoch       uint64    `json:"epoch"`
	DirtyBlocks int64     `json:"dirty_blocks"`
	Reason      string    `json:"reason,omitempty"` // why all will be compared instead
}

// statusPatience is how long a backup that ends an epoch is waited for.
const statusPatience = 5 * time.Second

// describeTracker asks a tracker, and the epoch log for what repositories have.
func describeTracker(ctx context.Context, g *globals, t trackers.Tracker) (trackerStatus, error) {
	s := trackerStatus{Repositories: []holderStatus{}}
	var err error
	if s.Status, err = counted(ctx, t); err != nil {
		return s, err
	}
	holders, err := epochlog.Holders(g.stateDir, s.UUID)
	if err != nil || len(holders) == 0 {
		return s, err
	}
	wait, cancel := context.WithTimeout(ctx, statusPatience)
	defer cancel()
	log, err := epochlog.Open(wait, t, g.stateDir)
	if err == nil {
		err = log.Unlock()
	}
	if err != nil {
		return s, err
	}
	late, err := t.Peek(ctx)
	if err != nil {
		return s, err
	}
	for _, h := range holders {
		line := holderStatus{
			Repository: h.Repository, Location: h.Location, Name: h.Name, Snapshot: h.Snapshot,
			Time: h.Time, Epoch: h.Position.Epoch,
		}
		dirty, err := log.Since(ctx, h.Position)
		if err == nil {
			err = dirty.Or(late)
		}
		switch {
		case ctx.Err() != nil:
			return s, ctx.Err()
		case errors.Is(err, epochlog.ErrBroken) || err != nil:
			line.Reason = err.Error()
		default:
			line.DirtyBlocks = dirty.Count()
		}
		s.Repositories = append(s.Repositories, line)
	}
	return s, nil
}

// counted is a tracker's status with its dirty blocks.
func counted(ctx context.Context, t kernel.Tracker) (kernel.Status, error) {
	st, err := t.Status(ctx)
	if err == nil {
		st.DirtyBlocks, err = t.Dirty(ctx)
	}
	return st, err
}

// print writes a line for the tracker and one for each repository.
func (s trackerStatus) print(w io.Writer) {
	state := "reliable"
	if !s.Reliable {
		state = "NOT RELIABLE: " + s.Reason
	}
	if s.Below != "" {
		state += ", on " + s.Below
	}
	fmt.Fprintf(w, "%-24s%-9s%-34s%7d%12s  %s\n", s.Device, s.Tracker, s.UUID, s.Epoch, size(s.DirtyBlocks*int64(s.BlockSize)), state)
	for _, h := range s.Repositories {
		next := size(h.DirtyBlocks*kernel.BlockSize) + " to back up"
		if h.Reason != "" {
			next = "to be compared: " + h.Reason
		}
		name := ""
		if h.Name != s.Device {
			name = " as " + h.Name
		}
		fmt.Fprintf(w, "  in %s%s: snapshot %.8s of %s, %s\n", h.Location, name, h.Snapshot, h.Time.Local().Format("2006-01-02 15:04"), next)
	}
}
