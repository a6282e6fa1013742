// SPDX-License-Identifier: BSD-2-Clause

package experiment

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"golang.org/x/crypto/scrypt"

	"github.com/dsync-backup/dsync-backup/bench/contender"
	"github.com/dsync-backup/dsync-backup/bench/host"
	"github.com/dsync-backup/dsync-backup/bench/result"
)

// fio runs one job on a device and gives its rates.
func fio(ctx context.Context, device, kind, block string, depth int, length time.Duration) (iops, mbs float64, err error) {
	out, err := host.Output(ctx, "fio", "--name=bench", "--filename="+device, "--rw="+kind, "--bs="+block, fmt.Sprintf("--iodepth=%d", depth),
		"--ioengine=libaio", "--direct=1", "--time_based", fmt.Sprintf("--runtime=%d", max(1, int(length.Seconds()))), "--randrepeat=0", "--output-format=json")
	if err != nil {
		return 0, 0, err
	}
	type rate struct {
		IOPS float64 `json:"iops"`
		BW   float64 `json:"bw_bytes"`
	}
	var r struct {
		Jobs []struct{ Read, Write rate } `json:"jobs"`
	}
	if err := json.Unmarshal([]byte(out), &r); err != nil || len(r.Jobs) != 1 {
		return 0, 0, fmt.Errorf("what fio printed is not understood: %w: %s", err, out)
	}
	j := r.Jobs[0]
	return j.Read.IOPS + j.Write.IOPS, (j.Read.BW + j.Write.BW) / 1e6, nil
}

// runDevice measures what the device itself can do, which bounds everything.
func runDevice(ctx context.Context, b *Bench) (err error) {
	l, err := b.newLab(ctx, b.Size, true)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.close()) }()
	for round := range b.Rounds {
		for _, j := range []struct {
			name, kind, block string
			depth             int
		}{{"random reads of 4 KiB, 16 in flight", "randread", "4k", 16}, {"sequential reads of 1 MiB, 8 in flight", "read", "1M", 8}, {"sequential writes of 1 MiB, 8 in flight", "write", "1M", 8}} {
			if err := host.DropCaches(); err != nil {
				return err
			}
			iops, mbs, err := fio(ctx, l.Disk.Path, j.kind, j.block, j.depth, b.Workload/4)
			if err != nil {
				return err
			}
			row := result.Unknown()
			row.Experiment, row.Case, row.Tool, row.Round, row.Size = "device", j.name, "fio", round, b.Size
			row.Rate, row.Unit = mbs, "MB/s"
			if j.block == "4k" {
				row.Rate, row.Unit = iops, "IOPS"
			}
			b.Log("  %-42s %8.0f %s", j.name, row.Rate, row.Unit)
			if err := b.Add(row); err != nil {
				return err
			}
		}
	}
	return nil
}

// runOverhead has fio write to the device while it is tracked and while it is
// not, in turns.
func runOverhead(ctx context.Context, b *Bench) (err error) {
	l, err := b.newLab(ctx, b.Size, true)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.close()) }()
	tracked := true
	for round := range 2 * b.Rounds {
		for _, j := range []struct {
			name, kind, block string
			depth             int
		}{{"random writes of 4 KiB, 16 in flight", "randwrite", "4k", 16}, {"random writes of 4 KiB, one at a time", "randwrite", "4k", 1}} {
			// off, on, on, off: drift meets both alike.
			for i := range 2 {
				want := (i+round)%2 == 0
				if want != tracked {
					change := l.untrack
					if want {
						change = func() error { return l.track(ctx) }
					}
					if err := change(); err != nil {
						return err
					}
					tracked = want
				}
				if err := host.DropCaches(); err != nil {
					return err
				}
				iops, _, err := fio(ctx, l.Disk.Path, j.kind, j.block, j.depth, b.Workload/3)
				if err != nil {
					return err
				}
				row := result.Unknown()
				row.Experiment, row.Case, row.Tool, row.Round, row.Size = "overhead", j.name, "not tracked", round, b.Size
				if tracked {
					row.Tool = "tracked, eBPF"
				}
				row.Rate, row.Unit = iops, "IOPS"
				b.Log("  %-42s %-14s %8.0f IOPS", j.name, row.Tool, iops)
				if err := b.Add(row); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// runOpen measures what opening a repository costs, of which most is to derive
// the key from the password.
func runOpen(ctx context.Context, b *Bench) (err error) {
	l, err := b.newLab(ctx, 64<<20, false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.close()) }()
	dir := filepath.Join(l.Dir, "repository")
	env := contender.Env(&l.Lab, dir+"-cache", dir)
	if _, err := host.Run(ctx, host.Command{Args: []string{b.Restic, "init", "-q"}, Env: env}); err != nil {
		return err
	}
	keyring := append(env[:len(env):len(env)], "DSYNC_KEYRING=1h")
	if _, err := host.Run(ctx, host.Command{Args: []string{b.Dsync, "snapshots"}, Env: keyring}); err != nil {
		return err
	}
	for round := range 2*b.Rounds + 1 {
		for _, t := range []struct {
			tool string
			args []string
			env  []string
		}{
			{"dsync-backup", []string{b.Dsync, "snapshots"}, env},
			{"dsync-backup, keyring", []string{b.Dsync, "snapshots"}, keyring},
			{"restic", []string{b.Restic, "snapshots"}, env},
		} {
			cost, err := host.Run(ctx, host.Command{Args: t.args, Env: t.env})
			if err != nil {
				return err
			}
			row := result.Unknown()
			row.Experiment, row.Case, row.Tool, row.Round = "open", "snapshots of an empty repository", t.tool, round
			row.Seconds, row.SourceCPU, row.Memory = cost.Seconds, cost.CPU, cost.Memory
			b.Log("  %-24s %6.3f s  %6.3f CPU s", t.tool, row.Seconds, row.SourceCPU)
			if err := b.Add(row); err != nil {
				return err
			}
		}
		start := time.Now()
		if _, err := scrypt.Key([]byte("x"), make([]byte, 64), 1<<15, 8, 1, 64); err != nil {
			return err
		}
		row := result.Unknown()
		row.Experiment, row.Case, row.Tool, row.Round, row.Seconds = "open", "scrypt alone, N=32768 r=8 p=1", "Go", round, time.Since(start).Seconds()
		if err := b.Add(row); err != nil {
			return err
		}
	}
	return nil
}
