// SPDX-License-Identifier: BSD-2-Clause

package snapshot

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/snapshot/device"
	"github.com/dsync-backup/dsync-backup/snapshot/layer"
)

// ErrTooBusy says that a device is written to so fast that copies of it do not
// catch up.
var ErrTooBusy = errors.New("is written to faster than it is copied")

const (
	// holdBytes is how much of the device the last copy keeps in memory, so
	// that the device stands still while it is read, and not while that is
	// compressed and stored.
	holdBytes = 32 << 20
	// maxRounds bounds the copies that are made in use.
	maxRounds = 12
)

// Precopy says how a device is copied while it is in use (docs/points-in-time.md).
type Precopy struct {
	// MaxFreeze is how long the Instant may last: what is left to be read in
	// it is brought well below that first. It must be set.
	MaxFreeze time.Duration

	// Tests set these; 0 means holdBytes and maxRounds.
	hold   int64
	rounds int
}

// precopy is a backup in rounds.
type precopy struct {
	*backup
	Precopy
	meter *device.Meter
	trees []repo.ID // the rounds' layers, oldest first
	res   layer.Result

	// copied is the position up to which every block is copied: what changed
	// since is marked in a later epoch.
	copied kernel.Position
	// pace is how long a byte took in the last round, the upload included.
	pace float64 // seconds
}

// precopy copies the device in use until little is left, lets it stand still,
// copies the rest, and makes one layer of all.
func (b *backup) precopy(ctx context.Context) (layer.Result, error) {
	if b.History == nil {
		return layer.Result{}, fmt.Errorf("%s is not tracked, so that what is written while it is copied would be missed", b.Device.Path())
	}
	p := &precopy{backup: b, Precopy: *b.Precopy, meter: &device.Meter{}}
	if p.hold == 0 {
		p.hold = holdBytes
	}
	if p.rounds == 0 {
		p.rounds = maxRounds
	}
	first, err := p.atOnce(ctx)
	if err != nil {
		return layer.Result{}, err
	}
	if !first {
		if err := p.live(ctx); err != nil {
			return layer.Result{}, err
		}
	}
	if err := p.last(ctx); err != nil {
		return layer.Result{}, err
	}
	return p.join(ctx)
}

// atOnce reports whether so little changed since the parent that no copy in
// use is worth its while.
func (p *precopy) atOnce(ctx context.Context) (bool, error) {
	if p.Changes != "" && p.Changes != ChangesTracker {
		return false, nil
	}
	if err := p.settle(ctx); err != nil {
		return false, err
	}
	st, err := p.History.Status(ctx)
	if err != nil || !st.Reliable {
		return false, err
	}
	parent, dirty, _ := bridge(ctx, p.cands, p.History, kernel.Position{Tracker: st.UUID}, p.Device.Size())
	if parent == nil {
		return false, nil
	}
	late, err := p.History.Peek(ctx)
	if err != nil || dirty.Or(late) != nil {
		return false, err
	}
	return p.little(amountOf(dirty)), nil
}

// live copies the device in use, over and over, until what is left is little.
func (p *precopy) live(ctx context.Context) error {
	var before amount
	for n := 1; ; n++ {
		if err := p.round(ctx, n == 1); err != nil {
			return err
		}
		if err := p.settle(ctx); err != nil {
			return err
		}
		late, err := p.History.Peek(ctx)
		if err != nil {
			return err
		}
		left := amountOf(late)
		if p.little(left) {
			return nil
		}
		// Each round should leave a good deal less than the one before.
		stuck := n > 2 && left.bytes > before.bytes/4*3
		if before = left; !stuck && n < p.rounds {
			continue
		}
		if took := p.standstill(left); took > p.MaxFreeze/2 {
			return fmt.Errorf("%s %w: after %d copies %d MiB are left, which would take about %v of at most %v standing still: try when less is written, or with a greater --max-freeze",
				p.Device.Path(), ErrTooBusy, n, left.bytes>>20, took.Round(time.Millisecond), p.MaxFreeze)
		}
		return nil
	}
}

// round makes one copy in use.
func (p *precopy) round(ctx context.Context, first bool) error {
	if err := p.Device.Sync(ctx); err != nil {
		return err
	}
	if err := p.endEpoch(ctx); err != nil {
		return err
	}
	ranges, expected, err := p.ranges(ctx, first)
	if err != nil {
		return err
	}
	if first {
		if err := p.trust(ctx, p.Device); err != nil {
			return err
		}
	}
	began := time.Now()
	p.meter.Restart()
	o := p.layerOptions(p.meter.Of(device.Standing{Device: p.Device, Until: ctx}), ranges)
	o.Expected = expected
	res, err := p.write(ctx, p.stage, o)
	if err != nil {
		return err
	}
	p.add(res)
	if res.BytesRead > 0 {
		p.pace = time.Since(began).Seconds() / float64(res.BytesRead)
	}
	return nil
}

// ranges is what the round has to copy, now that an epoch has ended. From here
// on what changes is marked in a later epoch.
func (p *precopy) ranges(ctx context.Context, first bool) (iter.Seq[layer.Range], layer.Expected, error) {
	if p.epoch == nil {
		return nil, nil, fmt.Errorf("the tracker of %s cannot tell what is written while it is copied: %s", p.Device.Path(), p.doubt)
	}
	since := p.copied
	p.copied, p.done = p.epoch.Position, 0
	if first {
		if err := p.choose(ctx); err != nil {
			return nil, nil, err
		}
		return p.plan(ctx, p.Device)
	}
	dirty, err := p.History.Since(ctx, since)
	if err != nil {
		return nil, nil, fmt.Errorf("find what was written to %s while it was copied: %w", p.Device.Path(), err)
	}
	p.dirty, p.total = dirty, amountOf(dirty).bytes
	return toRead(bitmapRanges(dirty, p.Device.Size())), nil, nil
}

// last copies what is left while the device stands still.
func (p *precopy) last(ctx context.Context) error {
	first := p.sum.Rounds == 0
	var rest *device.Held
	var o layer.Options
	err := p.still(ctx, func(ctx, standing context.Context, release func() error) error {
		ranges, expected, err := p.ranges(ctx, first)
		if err != nil {
			return err
		}
		if first && p.sum.Changes != ChangesTracker {
			return fmt.Errorf("what changed on %s can no longer be told: %s: back it up again", p.Device.Path(), p.sum.FallbackReason)
		}
		from := device.Standing{Device: p.Device, Until: standing}
		o = p.layerOptions(from, ranges)
		if p.total <= p.hold {
			if rest, err = p.held(ctx, from, first); err != nil {
				return err
			}
			return release()
		}
		if first {
			if err := p.trust(ctx, p.Device); err != nil {
				return err
			}
		}
		o.Expected, o.AfterRead = expected, release
		res, err := p.write(ctx, p.stage, o)
		p.add(res)
		return err
	})
	if err != nil || rest == nil {
		return err
	}
	o.Source = rest
	res, err := p.write(ctx, p.stage, o)
	if err != nil {
		return err
	}
	p.add(res)
	return nil
}

// held reads what is dirty into memory, and checks the tracker beside it if no round has.
func (p *precopy) held(ctx context.Context, from device.Source, check bool) (rest *device.Held, err error) {
	g, ctx := errgroup.WithContext(ctx)
	parallel := p.Parallel
	switch {
	case !check || !p.toBeChecked():
	case parallel == 1:
		if err := p.trust(ctx, p.Device); err != nil {
			return nil, err
		}
	default:
		parallel -= p.besides()
		g.Go(func() error {
			lie, err := p.check(ctx, p.Device, p.besides())
			if err == nil && lie != nil {
				err = p.distrust(lie)
			}
			return err
		})
	}
	g.Go(func() error {
		held, err := device.Hold(ctx, from, bitmapRanges(p.dirty, p.Device.Size()), p.total, parallel)
		rest = held
		return err
	})
	err = g.Wait()
	return rest, err
}

// add notes what a round stored.
func (p *precopy) add(res layer.Result) {
	p.sum.Rounds++
	p.res.BytesRead += res.BytesRead
	if res.Tree != nil {
		p.trees = append(p.trees, *res.Tree)
		p.res.DirtyBytes = res.DirtyBytes // of the only layer, if it stays the only one
	}
}

// join makes one layer of those of the rounds. It is staged as they are.
func (p *precopy) join(ctx context.Context) (layer.Result, error) {
	if p.Changes == ChangesRanges {
		p.epoch = nil // that the list was complete is the user's word
	}
	switch len(p.trees) {
	case 0:
		return p.res, nil
	case 1:
		p.res.Tree = &p.trees[0]
		return p.res, nil
	}
	if err := p.stage.loadable(ctx); err != nil {
		return p.res, err
	}
	var layers []*layer.Layer
	for i, id := range p.trees {
		l, err := layer.OpenTree(ctx, p.stage, uint64(i), id)
		if err != nil {
			return p.res, err
		}
		layers = append(layers, l)
	}
	merged, err := layer.Merge(ctx, p.stage, p.stage, layers, layer.MergeOptions{Size: p.Device.Size(), Time: p.Time})
	if err != nil {
		return p.res, err
	}
	p.res.Tree, p.res.DirtyBytes = merged.Tree, merged.DirtyBytes
	return p.res, nil
}

// settle has written out what would otherwise be written out by Begin.
func (p *precopy) settle(ctx context.Context) error {
	if s, ok := p.Instant.(Settler); ok {
		return s.Settle(ctx)
	}
	return nil
}

// amount is how much there is to read.
type amount struct{ bytes, extents int64 }

func amountOf(b *kernel.Bitmap) amount { return amount{b.Count() * kernel.BlockSize, b.Runs()} }

// little reports whether the rest can be read while the device stands still:
// it fits memory, and takes a small part of the time that there is.
func (p *precopy) little(left amount) bool {
	return left.bytes <= p.hold && p.meter.Estimate(left.bytes, left.extents) <= p.MaxFreeze/4
}

// standstill is about how long the device has to stand still for the rest.
// What does not fit memory has to be stored meanwhile, too.
func (p *precopy) standstill(left amount) time.Duration {
	t := p.meter.Estimate(left.bytes, left.extents)
	if left.bytes > p.hold {
		t = max(t, time.Duration(float64(left.bytes)*p.pace*float64(time.Second)))
	}
	return t
}
