// SPDX-License-Identifier: BSD-2-Clause

package cow

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/dsync-backup/dsync-backup/kernel/devmapper"
)

// Watch returns a context that ends when the snapshot has run out of space, with
// the reason as its cause. warn is called once, before that.
func (s *Snapshot) Watch(ctx context.Context, warn func(error)) context.Context {
	ctx, cancel := context.WithCancelCause(ctx)
	go func() {
		warned := false
		for {
			select {
			case <-ctx.Done():
				return
			case <-time.After(pollInterval):
			}
			percent, err := s.used()
			if err != nil {
				cancel(err)
				return
			}
			if percent >= warnPercent && !warned {
				warned = true
				warn(fmt.Errorf("the %s is %d %% full; when it is full, the backup fails", s.space.What, percent))
			}
		}
	}()
	return ctx
}

// Check says whether all that was read so far is what the device held.
func (s *Snapshot) Check(context.Context) error {
	_, err := s.used()
	return err
}

// used is how full the space is, in percent.
func (s *Snapshot) used() (percent int, err error) {
	status, err := devmapper.Status(cowName(s.name), devmapper.Query{NoFlush: true})
	if err != nil {
		return 0, fmt.Errorf("look at the snapshot of %s: %w", s.tracker.Device(), err)
	}
	if len(status) != 1 || status[0].Type != "snapshot" {
		return 0, fmt.Errorf("look at the snapshot of %s: somebody changed its table", s.tracker.Device())
	}
	said := status[0].Params
	var used, total, meta int64
	if _, err := fmt.Sscanf(said, "%d/%d %d", &used, &total, &meta); err == nil && total > 0 {
		return int(used * 100 / total), nil
	}
	switch strings.TrimSpace(said) {
	case "Invalid", "Overflow", "Snapshot Overflow":
		return 0, fmt.Errorf("back up %s: %w (%s, %d MiB): give it more with --cow, or say --snapshot precopy",
			s.tracker.Device(), ErrFull, s.space.What, s.space.Size>>20)
	}
	return 0, fmt.Errorf("look at the snapshot of %s: it says %q", s.tracker.Device(), said)
}
