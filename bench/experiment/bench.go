// SPDX-License-Identifier: BSD-2-Clause

// Package experiment has the parts of the benchmark. Each makes devices,
// changes them, has tools bring their copies up to date, and hands out rows.
package experiment

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"time"

	"github.com/dsync-backup/dsync-backup/bench/contender"
	"github.com/dsync-backup/dsync-backup/bench/content"
	"github.com/dsync-backup/dsync-backup/bench/host"
	"github.com/dsync-backup/dsync-backup/bench/result"
)

// Scale says how large and how often.
type Scale struct {
	Sizes    []int64 // of the state, in the comparison of all tools
	Size     int64   // of the state, in the other experiments
	Rounds   int
	Hours    int           // of a trace
	Workload time.Duration // of pgbench, fio
	Tools    []string      // of the comparison
}

// Quick takes minutes, Full about an hour for each size.
var (
	Quick = Scale{Sizes: []int64{1 << 30}, Size: 1 << 30, Rounds: 3, Hours: 6, Workload: 6 * time.Second, Tools: contender.Names}
	Full  = Scale{Sizes: []int64{2 << 30, 4 << 30, 8 << 30}, Size: 2 << 30, Rounds: 5, Hours: 24, Workload: 30 * time.Second, Tools: contender.Names}
)

// Bench is one run.
type Bench struct {
	contender.Programs
	Scale
	Dir   string // for everything that is made, removed with it
	Trace string // an MSR Cambridge trace; "" generates one
	Add   func(result.Row) error
	Log   func(format string, args ...any)
	seed  uint64
}

// Experiment is a part of the benchmark.
type Experiment struct {
	Name string
	Does string
	Run  func(context.Context, *Bench) error
}

// All are the experiments, in the order in which they run.
var All = []Experiment{
	{"single", "what SHA-256, zstd, encryption and chunking cost on one core", runSingle},
	{"device", "the device's own rates, by fio", runDevice},
	{"open", "opening a repository: key derivation", runOpen},
	{"sync", "all tools, 0.1 % and 1 % of random blocks", runSync},
	{"fraction", "0 to 100 % updated, random and sequential", runFraction},
	{"cpu", "processor time for 10 % updated, against what single parts take in the same minute", runCPU},
	{"full", "full backup and restore, against restic and dd", runFull},
	{"compression", "modes of compression, on data that compress and on data that do not", runCompression},
	{"scale", "the same number of blocks on 2 GiB to 4 TiB", runScale},
	{"trace", "hourly syncs over a day of a block trace", runTrace},
	{"postgres", "PostgreSQL under pgbench", runPostgres},
	{"overhead", "what tracking costs writes, by fio", runOverhead},
}

// nextSeed differs each time, and is the same in each run of the benchmark.
func (b *Bench) nextSeed() uint64 { b.seed++; return b.seed }

// lab is a tracked device full of data.
type lab struct {
	contender.Lab
	bench *Bench
	size  int64
	tools []contender.Contender
}

// newLab makes a device of size bytes in a folder of its own, filled unless it
// is to be left a hole, and tracks it.
func (b *Bench) newLab(ctx context.Context, size int64, fill bool) (l *lab, err error) {
	dir, err := os.MkdirTemp(b.Dir, "lab-")
	if err != nil {
		return nil, err
	}
	l = &lab{bench: b, size: size, Lab: contender.Lab{Programs: b.Programs, Dir: dir, State: filepath.Join(dir, "state")}}
	if l.Disk, err = host.NewDisk(ctx, filepath.Join(dir, "disk"), size); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.close())
		}
	}()
	if fill {
		if err := content.FillDevice(l.Disk.Path, content.New(b.nextSeed(), true), size); err != nil {
			return l, err
		}
	}
	return l, l.track(ctx)
}

func (l *lab) dsync(ctx context.Context, args ...string) (host.Cost, error) {
	return host.Run(ctx, host.Command{Args: append([]string{l.Dsync, "-q"}, args...), Env: []string{"DSYNC_STATE_DIR=" + l.State}})
}

func (l *lab) track(ctx context.Context) error {
	_, err := l.dsync(ctx, "track", "start", l.Disk.Path)
	return err
}

func (l *lab) untrack() error {
	_, err := l.dsync(context.Background(), "track", "stop", l.Disk.Path)
	return err
}

// close removes everything, also after the context's end.
func (l *lab) close() error {
	var errs []error
	for _, t := range l.tools {
		errs = append(errs, t.Close())
	}
	_ = l.untrack() // it may not be tracked
	errs = append(errs, l.Disk.Close(), os.RemoveAll(l.Dir))
	return errors.Join(errs...)
}

// use adds tools. One that is not installed is left out, with a word.
func (l *lab) use(ctx context.Context, names ...string) error {
	for _, name := range names {
		t, err := contender.New(ctx, name, &l.Lab, len(l.tools))
		if errors.Is(err, contender.ErrMissing) {
			l.bench.Log("  %s is left out: %v", name, err)
			continue
		}
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		l.tools = append(l.tools, t)
	}
	return nil
}

// round has every tool sync once, each time another one first.
func (l *lab) round(ctx context.Context, experiment, what string, round int, dirty int64) error {
	for i := range l.tools {
		t := l.tools[(i+round)%len(l.tools)]
		row := result.Unknown()
		row.Experiment, row.Case, row.Tool, row.Round, row.Size, row.Dirty = experiment, what, t.Name(), round, l.size, dirty
		if err := l.fresh(); err != nil {
			return err
		}
		if err := l.rest(ctx); err != nil {
			return err
		}
		if err := t.Sync(ctx, &row); err != nil {
			return fmt.Errorf("%s: %w", t.Name(), err)
		}
		l.bench.Log("  %-22s %-24s %7.2f s  %6.2f CPU s  read %5d MiB  sent %5d MiB", what, t.Name(), row.Seconds, row.SourceCPU, row.Read>>20, row.Sent>>20)
		if err := l.bench.Add(row); err != nil {
			return err
		}
	}
	return nil
}

// fresh drops the caches, and has the programs themselves in memory.
func (l *lab) fresh() error {
	if err := host.DropCaches(); err != nil {
		return err
	}
	for _, p := range []string{l.Dsync, l.Restic, l.Rsync, l.Kopia} {
		if p == "" {
			continue
		}
		f, err := os.Open(p)
		if err != nil {
			return err
		}
		_, err = io.Copy(io.Discard, f)
		f.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// rest lets the disk come to rest.
func (l *lab) rest(ctx context.Context) error {
	rested, err := host.AwaitRest(ctx, l.Dir)
	if err == nil && !rested {
		l.bench.Log("  the disk does not come to rest; what follows is told too slow")
	}
	return err
}

// write writes new content to a share of the device's blocks.
func (l *lab) write(share float64, sequential bool) (dirty int64, err error) {
	m := content.New(l.bench.nextSeed(), true)
	all := l.size / content.BlockSize
	n := int64(math.Round(float64(all) * share))
	if n == 0 {
		return 0, nil
	}
	pick := m.Random
	if sequential {
		pick = m.Sequential
	}
	return n * content.BlockSize, content.Write(l.Disk.Path, m, pick(all, n))
}

// verify compares every copy with the device.
func (l *lab) verify(ctx context.Context) error {
	for _, t := range l.tools {
		if err := t.Verify(ctx); err != nil {
			return fmt.Errorf("the copy of %s is not what the device holds: %w", t.Name(), err)
		}
	}
	return nil
}

func percent(share float64) string { return fmt.Sprintf("%g %%", share*100) }
