// SPDX-License-Identifier: BSD-2-Clause

package extract

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/snapshot"
	"github.com/dsync-backup/dsync-backup/snapshot/device"
)

const (
	// holdBytes is how much the last copy keeps in memory, so that the device
	// stands still while it is read, and not while it is sent.
	holdBytes = 32 << 20
	maxRounds = 12 // copies at most
)

// precopy sends the device in use, over and over, until what is left is little,
// and reads that while the device stands still.
func (s *send) precopy(ctx context.Context) error {
	if s.History == nil {
		return fmt.Errorf("%s is not tracked, so that what is written while it is copied would be missed", s.Device.Path())
	}
	for n := 1; ; n++ {
		if err := s.live(ctx, n == 1); err != nil {
			return err
		}
		if err := s.settle(ctx); err != nil {
			return err
		}
		late, err := s.History.Peek(ctx)
		if err != nil {
			return err
		}
		took, fits := s.pause(late)
		if fits && took <= s.Precopy.MaxFreeze/4 {
			done, err := s.last(ctx)
			if done || err != nil {
				return err
			}
		}
		if n >= s.rounds {
			return fmt.Errorf("%s %w: after %d copies %d MiB are left, which would take about %v of at most %v standing still: try when less is written, or with a greater --max-freeze",
				s.Device.Path(), snapshot.ErrTooBusy, n, late.Count()*kernel.BlockSize>>20, took.Round(time.Millisecond), s.Precopy.MaxFreeze)
		}
	}
}

// pause is about how long reading the marked blocks takes, and whether they fit
// memory.
func (s *send) pause(b *kernel.Bitmap) (took time.Duration, fits bool) {
	bytes := b.Count() * kernel.BlockSize
	return s.meter.Estimate(bytes, b.Runs()), bytes <= s.hold
}

// settle writes out beforehand what the Instant would have to write out first.
func (s *send) settle(ctx context.Context) error {
	if st, ok := s.Instant.(snapshot.Settler); ok {
		return st.Settle(ctx)
	}
	return nil
}

// live makes one copy in use.
func (s *send) live(ctx context.Context, first bool) error {
	since := s.sent
	if err := s.Device.Sync(ctx); err != nil {
		return err
	}
	if err := s.endEpoch(ctx); err != nil {
		return err
	}
	if s.epoch == nil {
		return s.blind()
	}
	s.sent = s.epoch.Position
	s.meter.Restart()
	from := s.meter.Of(device.Standing{Device: s.Device, Until: ctx})
	if first {
		spans, err := s.begin(ctx, s.Device)
		if err != nil {
			return err
		}
		return s.round(ctx, from, spans, nil)
	}
	dirty, err := s.more(ctx, since)
	if err != nil {
		return err
	}
	if err := s.w.Round(s.sent); err != nil {
		return err
	}
	return s.round(ctx, from, ofBitmap(dirty, s.Device.Size()), nil)
}

func (s *send) blind() error {
	return fmt.Errorf("the tracker of %s cannot tell what is written while it is copied: %s", s.Device.Path(), s.doubt)
}

// more finds what was written since the last copy.
func (s *send) more(ctx context.Context, since kernel.Position) (*kernel.Bitmap, error) {
	dirty, err := s.History.Since(ctx, since)
	if err == nil && dirty.Blocks() != kernel.BlocksOf(s.Device.Size()) {
		err = errors.New("the device changed its size")
	}
	if err != nil {
		return nil, fmt.Errorf("find what was written to %s while it was copied: %w", s.Device.Path(), err)
	}
	s.total, s.done = dirtyBytes(dirty, s.Device.Size()), 0
	return dirty, nil
}

// last reads the rest while the device stands still, and then sends it. It is
// not done if more was left than fits memory: then another copy in use is due.
func (s *send) last(ctx context.Context) (done bool, err error) {
	since := s.sent
	var rest *device.Held
	var dirty *kernel.Bitmap
	err = s.still(ctx, func(ctx, standing context.Context, release func() error) (err error) {
		if s.epoch == nil {
			return s.blind()
		}
		if dirty, err = s.more(ctx, since); err != nil {
			return err
		}
		if s.total <= s.hold {
			from := device.Standing{Device: s.Device, Until: standing}
			most := dirty.Count() * kernel.BlockSize
			if rest, err = device.Hold(ctx, from, slices.Values(dirty.Extents(s.Device.Size())), most, s.Parallel); err != nil {
				return err
			}
		}
		return release()
	})
	if err != nil || rest == nil {
		return false, err
	}
	s.sent = s.epoch.Position
	if err := s.w.Round(s.sent); err != nil {
		return false, err
	}
	return true, s.round(ctx, rest, ofBitmap(dirty, s.Device.Size()), nil)
}
