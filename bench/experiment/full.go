// SPDX-License-Identifier: BSD-2-Clause

package experiment

import (
	"context"
	"errors"
	"os"
	"path/filepath"

	"github.com/dsync-backup/dsync-backup/bench/contender"
	"github.com/dsync-backup/dsync-backup/bench/content"
	"github.com/dsync-backup/dsync-backup/bench/host"
	"github.com/dsync-backup/dsync-backup/bench/result"
)

// task is a command that is measured, and what is to be done around it.
type task struct {
	tool   string
	before func() error
	cmd    host.Command
	after  func() error
	parts  *parts // measured before and after, if set
}

// measure runs tasks, each round another one first, and hands out their rows.
func (l *lab) measure(ctx context.Context, experiment, what string, round int, tasks []task) error {
	for i := range tasks {
		t := tasks[(i+round)%len(tasks)]
		if err := l.fresh(); err != nil {
			return err
		}
		if t.before != nil {
			if err := t.before(); err != nil {
				return err
			}
		}
		if err := l.rest(ctx); err != nil {
			return err
		}
		var cost host.Cost
		run := func() (err error) { cost, err = host.Run(ctx, t.cmd); return err }
		if p := t.parts; p != nil {
			whole := run
			run = func() error { return p.around(l.bench, experiment, what, round, whole) }
		}
		if err := run(); err != nil {
			return err
		}
		row := result.Unknown()
		row.Experiment, row.Case, row.Tool, row.Round, row.Size, row.Dirty = experiment, what, t.tool, round, l.size, l.size
		row.Seconds, row.SourceCPU, row.Memory, row.Stolen = cost.Seconds, cost.CPU, cost.Memory, cost.Stolen
		row.Rate, row.Unit = float64(l.size)/1e6/cost.Seconds, "MB/s"
		l.bench.Log("  %-16s %-16s %7.2f s  %6.2f CPU s  %5.0f MB/s  %4d MiB of memory", what, t.tool, row.Seconds, row.SourceCPU, row.Rate, row.Memory>>20)
		if err := l.bench.Add(row); err != nil {
			return err
		}
		if t.after != nil {
			if err := t.after(); err != nil {
				return err
			}
		}
	}
	return nil
}

// runFull makes full backups into new repositories, and restores them.
func runFull(ctx context.Context, b *Bench) error {
	for _, size := range b.Sizes[len(b.Sizes)-1:] {
		if err := b.full(ctx, size); err != nil {
			return err
		}
	}
	return nil
}

func (b *Bench) full(ctx context.Context, size int64) (err error) {
	l, err := b.newLab(ctx, size, true)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.close()) }()
	// Repositories of our own and of restic's; each round makes them anew.
	ours, theirs := filepath.Join(l.Dir, "ours"), filepath.Join(l.Dir, "theirs")
	ourEnv, theirEnv := contender.Env(&l.Lab, ours+"-cache", ours), contender.Env(&l.Lab, theirs+"-cache", theirs)
	anew := func(dir string, env []string) func() error {
		return func() error {
			if err := errors.Join(os.RemoveAll(dir), os.RemoveAll(dir+"-cache")); err != nil {
				return err
			}
			_, err := host.Run(ctx, host.Command{Args: []string{b.Restic, "init", "-q"}, Env: env})
			return err
		}
	}
	out := filepath.Join(l.Dir, "out")
	clean := func() error { return os.RemoveAll(out) }
	check := func() error {
		if _, err := host.Output(ctx, "cmp", l.Disk.File, out); err != nil {
			return err
		}
		return clean()
	}
	inMemory := func() error {
		_, err := host.Output(ctx, "dd", "if="+l.Disk.File, "of=/dev/null", "bs=1M")
		return err
	}
	single, err := newParts(b.nextSeed())
	if err != nil {
		return err
	}
	for round := range b.Rounds {
		if err := l.measure(ctx, "full", "backup", round, []task{
			{"dsync-backup", anew(ours, ourEnv), host.Command{Args: []string{b.Dsync, "-q", "backup", "--changes", "full", l.Disk.Path}, Env: ourEnv}, nil, single},
			{"restic image", anew(theirs, theirEnv), host.Command{Args: []string{b.Restic, "-q", "backup", l.Disk.File}, Env: theirEnv}, nil, nil},
			{"dd, only reading", nil, host.Command{Args: []string{"dd", "if=" + l.Disk.Path, "of=/dev/null", "bs=1M", "iflag=direct", "status=none"}}, nil, nil},
		}); err != nil {
			return err
		}
		if err := l.measure(ctx, "full", "restore", round, []task{
			{"dsync-backup", nil, host.Command{Args: []string{b.Dsync, "-q", "restore", "latest", out}, Env: ourEnv}, check, nil},
			// restic leaves what it wrote in the page cache.
			{"restic image", nil, host.Command{Args: []string{"sh", "-c", `"$0" -q restore "latest:$1" --target "$2" && sync "$2/disk"`, b.Restic, l.Dir, out}, Env: theirEnv}, clean, nil},
			// What dd writes lies in memory, so that it is measured writing.
			{
				"dd oflag=direct", inMemory,
				host.Command{Args: []string{"dd", "if=" + l.Disk.File, "of=" + out, "bs=1M", "oflag=direct", "conv=fsync", "status=none"}},
				clean, nil,
			},
			// The least that a restore asks of a disk that has both.
			{
				"dd, and reading the packs", inMemory,
				host.Command{Args: []string{"sh", "-c", `cat "$0"/data/*/* > /dev/null & dd "if=$1" "of=$2" bs=1M oflag=direct conv=fsync status=none; wait`, ours, l.Disk.File, out}},
				clean, nil,
			},
		}); err != nil {
			return err
		}
	}
	return nil
}

// runCompression makes full backups in each mode, of data that compress 2:1 and
// of data that do not compress.
func runCompression(ctx context.Context, b *Bench) (err error) {
	size := b.Size / 2
	l, err := b.newLab(ctx, size, false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.close()) }()
	for _, compressible := range []bool{true, false} {
		what := "2:1 data"
		if !compressible {
			what = "random data"
		}
		if err := content.FillDevice(l.Disk.Path, content.New(b.nextSeed(), compressible), size); err != nil {
			return err
		}
		for round := range b.Rounds {
			if err := l.modes(ctx, what, round); err != nil {
				return err
			}
		}
	}
	return nil
}

func (l *lab) modes(ctx context.Context, what string, round int) error {
	for _, tool := range []string{"dsync-backup", "restic image"} {
		for _, mode := range []string{"auto", "fastest", "off"} {
			if mode == "fastest" && tool != "dsync-backup" {
				continue // restic 0.18.0 has no such mode
			}
			dir := filepath.Join(l.Dir, "repository")
			env := contender.Env(&l.Lab, dir+"-cache", dir)
			if _, err := host.Run(ctx, host.Command{Args: []string{l.Restic, "init", "-q"}, Env: env}); err != nil {
				return err
			}
			env = append(env, "RESTIC_COMPRESSION="+mode)
			args := []string{l.Dsync, "-q", "backup", "--changes", "full", l.Disk.Path}
			if tool != "dsync-backup" {
				args = []string{l.Restic, "-q", "backup", l.Disk.File}
			}
			if err := errors.Join(l.fresh(), l.rest(ctx)); err != nil {
				return err
			}
			cost, err := host.Run(ctx, host.Command{Args: args, Env: env})
			if err != nil {
				return err
			}
			row := result.Unknown()
			row.Experiment, row.Case, row.Tool, row.Round, row.Size, row.Dirty = "compression", what, tool+" "+mode, round, l.size, l.size
			row.Seconds, row.SourceCPU, row.Memory, row.Stolen = cost.Seconds, cost.CPU, cost.Memory, cost.Stolen
			row.Rate, row.Unit = float64(l.size)/1e6/cost.Seconds, "MB/s"
			if row.Stored, err = host.Size(dir); err != nil {
				return err
			}
			l.bench.Log("  %-12s %-24s %7.2f s  %5.0f MB/s  stored %5d MiB", what, row.Tool, row.Seconds, row.Rate, row.Stored>>20)
			if err := l.bench.Add(row); err != nil {
				return err
			}
			if err := errors.Join(os.RemoveAll(dir), os.RemoveAll(dir+"-cache")); err != nil {
				return err
			}
		}
	}
	return nil
}
