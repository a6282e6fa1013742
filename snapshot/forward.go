// SPDX-License-Identifier: BSD-2-Clause

package snapshot

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/snapshot/device"
	"github.com/dsync-backup/dsync-backup/snapshot/layer"
)

const (
	// forwardShare bounds what is copied forward, in percent of what the
	// backup itself found changed.
	forwardShare = 25
	// wornPercent is what is live, at most, of a blob that is copied forward.
	wornPercent = 25
)

// forward stores the live blocks of worn blobs of the newest layers anew, as a
// layer on top of them that changes nothing. It is nil if there is none.
//
// They are read from the device, which may be in use by now, long after the
// instant of the snapshot: a block counts only if its sum is the one that the
// layers have for it. Whatever it holds otherwise, torn by a write or written
// since, stays where it is.
func (b *backup) forward(ctx context.Context, links []link) (*repo.ID, error) {
	budget := b.changed * forwardShare / 100
	if budget < kernel.BlockSize {
		return nil, nil
	}
	layers, err := b.openLinks(ctx, links)
	if err != nil {
		return nil, err
	}
	size := b.Device.Size()
	ranges, err := layer.Worn(ctx, b.stage, layers, layer.WornOptions{
		Size: size, Budget: budget, Percent: wornPercent, Settled: b.settled(links),
	})
	if err != nil {
		return nil, fmt.Errorf("look for worn blobs: %w", err)
	}
	if len(ranges) == 0 {
		return nil, nil
	}
	counted := &countingSaver{Saver: b.stage}
	o := b.layerOptions(device.Standing{Device: b.Device, Until: ctx}, toRead(seq(ranges)))
	o.Expected, o.Progress = opposite{layer.NewSums(ctx, b.stage, layers, size, size)}, nil
	o.Ages = b.ages(links, layers, kernel.TotalLength(ranges))
	res, err := layer.Write(ctx, counted, o)
	b.sum.CopiedForwardPacked += counted.stored.Load()
	b.forwarded += counted.plain.Load()
	if bad := (*device.ReadError)(nil); errors.As(err, &bad) {
		// The snapshot is complete without.
		b.Warn(fmt.Errorf("space in worn blobs is not freed: %w", err))
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("copy worn blobs forward: %w", err)
	}
	b.sum.CopiedForwardBytes += res.DirtyBytes
	return res.Tree, b.stage.loadable(ctx)
}

// opposite expects what is not expected: of what is read, it lets through what
// the layers hold already.
type opposite struct{ *layer.Sums }

// Same implements [layer.Expected].
func (o opposite) Same(off int64, zero bool, sum uint64) (bool, error) {
	same, err := o.Sums.Same(off, zero, sum)
	return !same, err
}

// countingSaver adds up what data take in their packs.
type countingSaver struct {
	layer.Saver
	plain, stored atomic.Int64 // of new blobs, before and after compression
}

// SaveBlob implements [layer.Saver].
func (c *countingSaver) SaveBlob(ctx context.Context, kind repo.Kind, data []byte) (repo.Saved, error) {
	s, err := c.Saver.SaveBlob(ctx, kind, data)
	if kind == repo.KindData && err == nil && !s.Known {
		c.plain.Add(int64(s.PlainSize))
		c.stored.Add(int64(s.StoredSize))
	}
	return s, err
}
