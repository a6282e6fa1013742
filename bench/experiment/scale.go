// SPDX-License-Identifier: BSD-2-Clause

package experiment

import (
	"context"
	"errors"
	"fmt"

	"github.com/dsync-backup/dsync-backup/bench/content"
)

// scaleBlocks is how many blocks are written on each device: 8 MiB.
const scaleBlocks = 2048

// runScale writes the same number of blocks on ever larger devices. Only 1 GiB
// at each device's beginning, and what is written, takes space.
func runScale(ctx context.Context, b *Bench) (err error) {
	var labs []*lab
	defer func() {
		for _, l := range labs {
			err = errors.Join(err, l.close())
		}
	}()
	for _, size := range []int64{2 << 30, 64 << 30, 4 << 40} {
		l, err := b.newLab(ctx, size, false)
		if err != nil {
			return err
		}
		labs = append(labs, l)
		if err := l.use(ctx, "dsync-backup"); err != nil {
			return err
		}
		if err := content.FillDevice(l.Disk.Path, content.New(b.nextSeed(), true), 256<<20); err != nil {
			return err
		}
		if err := l.round(ctx, "scale", "first", 0, 256<<20); err != nil {
			return err
		}
	}
	// The devices take turns, so that what else goes on meets all of them.
	for round := range 2*b.Rounds + 1 {
		for i := range labs {
			l := labs[(i+round)%len(labs)]
			m := content.New(b.nextSeed(), true)
			if err := content.Write(l.Disk.Path, m, m.Random(l.size/content.BlockSize, scaleBlocks)); err != nil {
				return err
			}
			if err := l.round(ctx, "scale", fmt.Sprintf("%d blocks", scaleBlocks), round, scaleBlocks*content.BlockSize); err != nil {
				return err
			}
		}
	}
	return nil
}
