// SPDX-License-Identifier: BSD-2-Clause

package cow

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel/devmapper"
)

// Watch returns a context that ends when the snapshot has run out of space, with
// the reason as its cause. warn is called once, before that.
func (s *Snapshot) Watch(ctx context.Context, warn func(error)) context.Context {
	return Watch(ctx, s.space.What, s.used, warn)
}

// Check says whether all that was read so far is what the device held.
func (s *Snapshot) Check(context.Context) error {
	_, err := s.used()
	return err
}

// used is how full the space is, in percent.
func (s *Snapshot) used() (percent int, err error) {
	percent, err = Used(cowName(s.name))
	switch {
	case errors.Is(err, ErrFull):
		err = fmt.Errorf("back up %s: %w (%s, %d MiB): give it more with --cow, or say --snapshot precopy",
			s.tracker.Device(), err, s.space.What, s.space.Size>>20)
	case err != nil:
		err = fmt.Errorf("look at the snapshot of %s: %w", s.tracker.Device(), err)
	}
	return percent, err
}

// Watch asks every half second how full, in percent, the space of a snapshot is.
// It returns a context that ends with the first error as its cause. warn is called
// once, before the space, which what names, is full.
func Watch(ctx context.Context, what string, used func() (percent int, err error), warn func(error)) context.Context {
	ctx, cancel := context.WithCancelCause(ctx)
	go func() {
		warned := false
		for {
			select {
			case <-ctx.Done():
				return
			case <-time.After(pollInterval):
			}
			percent, err := used()
			if err != nil {
				cancel(err)
				return
			}
			if percent >= warnPercent && !warned {
				warned = true
				warn(fmt.Errorf("the %s is %d %% full; when it is full, the backup fails", what, percent))
			}
		}
	}()
	return ctx
}

// Used says how full, in percent, the space of a device with one snapshot target
// is. A snapshot that the kernel has given up, since nothing more fits, is ErrFull.
func Used(name string) (percent int, err error) {
	status, err := devmapper.Status(name, devmapper.Query{NoFlush: true})
	if errors.Is(err, unix.ENXIO) {
		return 0, errors.New("somebody removed it")
	}
	if err != nil {
		return 0, err
	}
	if len(status) != 1 || status[0].Type != "snapshot" {
		return 0, errors.New("somebody changed its table")
	}
	said := status[0].Params
	var used, total, meta int64
	if _, err := fmt.Sscanf(said, "%d/%d %d", &used, &total, &meta); err == nil && total > 0 {
		return int(used * 100 / total), nil
	}
	switch strings.TrimSpace(said) {
	case "Invalid", "Overflow", "Snapshot Overflow":
		return 0, ErrFull
	}
	return 0, fmt.Errorf("it says %q", said)
}
