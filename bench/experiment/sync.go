// SPDX-License-Identifier: BSD-2-Clause

package experiment

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/dsync-backup/dsync-backup/bench/content"
	"github.com/dsync-backup/dsync-backup/bench/trace"
)

// runSync has all tools sync after 0.1 % and 1 % of random blocks were written.
func runSync(ctx context.Context, b *Bench) error {
	for _, size := range b.Sizes {
		if err := b.compare(ctx, size); err != nil {
			return err
		}
	}
	return nil
}

func (b *Bench) compare(ctx context.Context, size int64) (err error) {
	l, err := b.newLab(ctx, size, true)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.close()) }()
	if err := l.use(ctx, b.Tools...); err != nil {
		return err
	}
	if err := l.round(ctx, "sync", "first", 0, size); err != nil {
		return err
	}
	for _, share := range []float64{0.001, 0.01} {
		for round := range b.Rounds {
			dirty, err := l.write(share, false)
			if err != nil {
				return err
			}
			if err := l.round(ctx, "sync", "random "+percent(share), round, dirty); err != nil {
				return err
			}
		}
	}
	return l.verify(ctx)
}

var fractions = []float64{0, 0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1}

// fractionTools are those of the paper's figure 6, and restic.
var fractionTools = []string{"dsync-backup", "extract | merge", "rsync in place", "copy", "restic image"}

func runFraction(ctx context.Context, b *Bench) (err error) {
	l, err := b.newLab(ctx, b.Size, true)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.close()) }()
	if err := l.use(ctx, fractionTools...); err != nil {
		return err
	}
	if err := l.round(ctx, "fraction", "first", 0, b.Size); err != nil {
		return err
	}
	for i, share := range fractions {
		for _, sequential := range []bool{false, true} {
			kind := "random "
			if sequential {
				kind = "sequential "
			}
			dirty, err := l.write(share, sequential)
			if err != nil {
				return err
			}
			if err := l.round(ctx, "fraction", kind+percent(share), i, dirty); err != nil {
				return err
			}
		}
	}
	return l.verify(ctx)
}

var traceTools = []string{"dsync-backup", "extract | merge", "rsync in place", "restic image"}

// runTrace replays the writes of a day, and syncs every hour.
func runTrace(ctx context.Context, b *Bench) (err error) {
	hours, err := b.hours()
	if err != nil {
		return err
	}
	l, err := b.newLab(ctx, b.Size, true)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.close()) }()
	if err := l.use(ctx, traceTools...); err != nil {
		return err
	}
	if err := l.round(ctx, "trace", "first", 0, b.Size); err != nil {
		return err
	}
	for h, blocks := range hours {
		if err := content.Write(l.Disk.Path, content.New(b.nextSeed(), true), blocks); err != nil {
			return err
		}
		if err := l.round(ctx, "trace", fmt.Sprintf("hour %02d", h), h, int64(len(blocks))*trace.BlockSize); err != nil {
			return err
		}
	}
	return l.verify(ctx)
}

// hours are the blocks that each hour of the trace writes.
func (b *Bench) hours() ([][]int64, error) {
	if b.Trace == "" {
		return trace.Hours(trace.NewGenerator(trace.Profiles[2], 1).Next, b.Size, b.Hours)
	}
	f, err := os.Open(b.Trace)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return trace.Hours(trace.NewReader(bufio.NewReaderSize(f, 1<<20)).Next, b.Size, b.Hours)
}
