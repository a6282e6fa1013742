// SPDX-License-Identifier: BSD-2-Clause

package restore

import (
	"context"
	"fmt"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/snapshot"
	"github.com/dsync-backup/dsync-backup/snapshot/blocksum"
	"github.com/dsync-backup/dsync-backup/snapshot/device"
)

// VerifyOptions say what to compare. Device and Target must be set.
type VerifyOptions struct {
	Device   snapshot.Device
	Target   string // a block device or file; it may be in use
	Parallel int    // reads in flight; 0 means 8
	Progress func(Progress)
}

// Verify reads a device or file and lists, in device order and whole blocks,
// where it does not hold what the snapshot does. It fetches the snapshot's
// indexes and sums, and no data. What the target lacks at its end differs;
// what it has beyond the snapshot's size is not looked at.
func Verify(ctx context.Context, store snapshot.Store, o VerifyOptions) ([]kernel.Extent, error) {
	c, err := openWhole(ctx, store, o.Device)
	if err != nil {
		return nil, fmt.Errorf("verify: open snapshot %s: %w", o.Device.Snapshot.Str(), err)
	}
	differ, err := c.verify(ctx, o.Target, o.Parallel, o.Progress)
	if err != nil {
		return nil, fmt.Errorf("verify %s: %w", o.Target, err)
	}
	return differ, nil
}

func (c *chain) verify(ctx context.Context, path string, parallel int, tell func(Progress)) ([]kernel.Extent, error) {
	d, err := device.Open(path, device.Options{})
	if err != nil {
		return nil, err
	}
	defer d.Close()
	p := newProgress(PhaseVerifying, c.size(), tell)
	differ := rangeSet{size: c.size()}
	size := c.size()
	if d.Size() < size {
		size = d.Size() / kernel.BlockSize * kernel.BlockSize
		differ.add(kernel.Extent{Offset: size, Length: c.size() - size})
	}
	key := blocksum.Key(c.device.Manifest.SumKey)
	s := &scan{
		device: d, size: size, key: &key, expected: c.sums(ctx), parallel: parallel,
		found: func(e kernel.Extent, same bool) error {
			if !same {
				differ.add(e)
			}
			p.add(e.Length)
			return nil
		},
	}
	if err := s.run(ctx); err != nil {
		return nil, err
	}
	return differ.list(), nil
}
