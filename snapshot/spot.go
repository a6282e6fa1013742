// SPDX-License-Identifier: BSD-2-Clause

package snapshot

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/snapshot/blocksum"
	"github.com/dsync-backup/dsync-backup/snapshot/device"
	"github.com/dsync-backup/dsync-backup/snapshot/layer"
)

// DefaultSpotCheck is the least number of blocks that a spot check reads.
const DefaultSpotCheck = 16

// spotBatch is how many blocks of a spot check are read together: 4 MiB.
const spotBatch = 1024

// maxSpotCheck bounds the time of one, and with it that of a freeze.
const maxSpotCheck = 2048

// spotBlocks picks blocks that are clean in the bitmap, sorted: n of them, or 1 %
// of the dirty ones if that is more. Half are next to a dirty range, where a
// tracker that gets ranges wrong would err; the others are anywhere.
func spotBlocks(r *rand.Rand, dirty *kernel.Bitmap, n int) []int64 {
	if n <= 0 || dirty.Blocks() == 0 {
		return nil
	}
	n = max(n, int(min(dirty.Count()/100, maxSpotCheck)))
	picked := map[int64]bool{}
	// A device that is dirty nearly everywhere may have fewer to offer.
	for tries := 0; len(picked) < n && tries < 8*n; tries++ {
		b := r.Int64N(dirty.Blocks())
		if tries%2 == 0 {
			if b = dirty.NextSet(b); b == dirty.Blocks() {
				continue
			}
			if b--; r.IntN(2) == 0 {
				b = dirty.NextClear(b + 1)
			}
		}
		if b >= 0 && b < dirty.Blocks() && !dirty.Get(b) {
			picked[b] = true
		}
	}
	out := make([]int64, 0, len(picked))
	for b := range picked {
		out = append(out, b)
	}
	slices.Sort(out)
	return out
}

// besides is how many of the reads in flight a check has that is made beside a copy.
func (b *backup) besides() int { return max(1, b.Parallel/4) }

// toBeChecked reports whether what the tracker says is used, and is to be checked.
func (b *backup) toBeChecked() bool { return b.sum.Changes == ChangesTracker && b.SpotCheck > 0 }

// trust makes sure, as far as a few blocks tell, that the tracker did not miss
// what it says that it did not see.
func (b *backup) trust(ctx context.Context, from *device.Device) error {
	if !b.toBeChecked() {
		return nil
	}
	lie, err := b.check(ctx, from, b.Parallel)
	if err != nil || lie == nil {
		return err
	}
	return b.distrust(lie)
}

// check makes a spot check, and has a tracker that missed something never trusted again: at once,
// since the next check would look elsewhere.
func (b *backup) check(ctx context.Context, from *device.Device, most int) (lie, err error) {
	if lie, err = b.spotCheck(ctx, from, most); lie == nil {
		return nil, err
	}
	if err := b.History.Invalidate(context.WithoutCancel(ctx), lie.Error()); err != nil {
		return lie, fmt.Errorf("%w; and the tracker cannot be told: %w", lie, err)
	}
	return lie, nil
}

// distrust has the device compared.
func (b *backup) distrust(lie error) error {
	b.Warn(lie)
	if b.Precopy != nil {
		// What is written while it is copied could not be told.
		return fmt.Errorf("%w; back it up again: tracking is begun anew, and the device compared", lie)
	}
	b.epoch, b.dirty, b.done = nil, nil, 0
	b.sum.FallbackReason = lie.Error()
	b.compare()
	return nil
}

// spotCheck reads a few blocks that the tracker says are as in the parent, and
// compares them with the parent's sums. One that differs, and that the tracker
// has not marked by then either, is a write that it missed: the error names it.
// A check that could not be made proves nothing and is no error. Up to most reads are in
// flight at once.
func (b *backup) spotCheck(ctx context.Context, from *device.Device, most int) (lie, err error) {
	size := b.Device.Size()
	seed := b.SpotSeed
	if seed == 0 {
		seed = rand.Uint64()
	}
	blocks := spotBlocks(rand.New(rand.NewPCG(seed, b.epoch.Position.Epoch)), b.dirty, b.SpotCheck)
	if len(blocks) == 0 {
		return nil, nil
	}
	layers, err := layer.Open(ctx, b.store, b.parent.Manifest.Layers)
	if err != nil {
		return nil, fmt.Errorf("check blocks against snapshot %s: %w", b.parent.Snapshot.Str(), err)
	}
	sums := layer.NewSums(ctx, b.store, layers, b.parent.Manifest.Size, size)
	key := blocksum.Key(b.parent.Manifest.SumKey)
	buf := device.AlignedBuffer(min(len(blocks), spotBatch) * kernel.BlockSize)
	var differ []int64
	for batch := range slices.Chunk(blocks, spotBatch) {
		reads := make([]device.Read, len(batch))
		for n, i := range batch {
			off := i * kernel.BlockSize
			reads[n] = device.Read{Offset: off, Into: buf[n*kernel.BlockSize:][:min(kernel.BlockSize, size-off)]}
		}
		if err := from.ReadExtents(ctx, reads, most); err != nil {
			return nil, fmt.Errorf("check blocks: %w", err)
		}
		for n, i := range batch {
			block := reads[n].Into
			b.sum.SpotCheckedBytes += int64(len(block))
			zero := blocksum.IsZero(block)
			same, err := sums.Same(reads[n].Offset, zero, key.Sum(block))
			if err != nil {
				return nil, fmt.Errorf("check blocks against snapshot %s: %w", b.parent.Snapshot.Str(), err)
			}
			if !same {
				differ = append(differ, i)
			}
		}
	}
	if len(differ) == 0 {
		return nil, nil
	}
	// A write is marked before it reaches the device: what was written since
	// the rotation is marked by now, in the running epoch or, where this backup
	// has rotated again, in one that ended. What another backup's rotation has
	// taken away is not known here: then nothing is proven.
	running, err := b.History.Peek(ctx)
	if err != nil {
		return nil, fmt.Errorf("check blocks: %w", err)
	}
	ended, err := b.History.Since(ctx, b.epoch.Position)
	if err != nil {
		return nil, nil //nolint:nilerr // see above
	}
	if st, err := b.History.Status(ctx); err != nil || st.Epoch != b.rotated+1 {
		return nil, nil //nolint:nilerr // see above
	}
	for _, i := range differ {
		if !running.Get(i) && !ended.Get(i) {
			return fmt.Errorf("block %d (byte %d) differs from snapshot %s, but the tracker says that it was not written: "+
				"tracking of %s cannot be trusted", i, i*kernel.BlockSize, b.parent.Snapshot.Str(), b.Device.Path()), nil
		}
	}
	return nil, nil
}
