// SPDX-License-Identifier: BSD-2-Clause

// Command bench compares dsync-backup with other tools on loop devices of this
// machine, and writes what it measured, as a CSV file and as a report with
// charts, to a folder. It runs as root: `make bench`.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/dsync-backup/dsync-backup/bench/contender"
	"github.com/dsync-backup/dsync-backup/bench/experiment"
	"github.com/dsync-backup/dsync-backup/bench/host"
	"github.com/dsync-backup/dsync-backup/bench/report"
	"github.com/dsync-backup/dsync-backup/bench/result"
)

type flags struct {
	quick                      bool
	only, sizes, tools, out    string
	work, root, trace, version string
	rounds                     int
	size                       float64
	onlyReport                 bool
}

func main() {
	if len(os.Args) > 1 && os.Args[1] == "receiver" {
		os.Exit(contender.Receiver(os.Args[2:]))
	}
	var f flags
	flag.BoolVar(&f.quick, "quick", false, "minutes instead of hours")
	flag.StringVar(&f.only, "only", "", "run only these `experiments`, separated by commas, and keep what the CSV has of the others")
	flag.StringVar(&f.sizes, "sizes", "", "`sizes` of the state in the experiments sync and full, in GiB, separated by commas")
	flag.Float64Var(&f.size, "size", 0, "size of the state in the other experiments, in `GiB`")
	flag.StringVar(&f.tools, "tools", "", "compare only these `tools`, separated by semicolons")
	flag.IntVar(&f.rounds, "rounds", 0, "`number` of rounds")
	flag.StringVar(&f.out, "out", "docs/benchmarks", "`folder` for results.csv, README.md and charts")
	flag.StringVar(&f.work, "work", "/var/tmp", "`folder` on the disk to measure with; it needs room for about seven times the state")
	flag.StringVar(&f.root, "root", ".", "`folder` of dsync-backup's sources, with the built command and .build")
	flag.StringVar(&f.trace, "trace", "", "`file` of an MSR Cambridge trace; without it one is generated")
	flag.BoolVar(&f.onlyReport, "report", false, "only write the report again")
	flag.Usage = func() {
		fmt.Fprintln(flag.CommandLine.Output(), "usage: bench [flags]\n\nexperiments:")
		for _, e := range experiment.All {
			fmt.Fprintf(flag.CommandLine.Output(), "  %-12s %s\n", e.Name, e.Does)
		}
		fmt.Fprintln(flag.CommandLine.Output(), "\nflags:")
		flag.PrintDefaults()
	}
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, f); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, f flags) (err error) {
	file := filepath.Join(f.out, "results.csv")
	rows, err := result.Load(file)
	if err != nil {
		return err
	}
	if f.onlyReport {
		return report.Write(f.out, rows)
	}
	if os.Geteuid() != 0 {
		return errors.New("run it as root: it makes loop devices, tracks them and drops caches")
	}
	if err := os.MkdirAll(f.out, 0o755); err != nil {
		return err
	}
	scale, err := f.scale()
	if err != nil {
		return err
	}
	chosen, err := choose(f.only)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp(f.work, "dsync-bench-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	b := &experiment.Bench{Programs: programs(f.root), Scale: scale, Dir: dir, Trace: f.trace}
	b.Log = func(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }
	b.Add = func(r result.Row) error { rows = append(rows, r); return ctx.Err() }
	for _, e := range chosen {
		b.Log("%s: %s", e.Name, e.Does)
		started, load := time.Now(), host.Load()
		rows = slices.DeleteFunc(rows, func(r result.Row) bool {
			return (r.Experiment == e.Name || r.Experiment == e.Name+result.Parts) && (f.sizes == "" || slices.Contains(scale.Sizes, r.Size) || e.Name != "sync")
		})
		failed := e.Run(ctx, b)
		b.Log("%s took %.0f s", e.Name, time.Since(started).Seconds())
		name := report.LoadBefore + e.Name
		rows = slices.DeleteFunc(rows, func(r result.Row) bool {
			return r.Experiment == "about" && (r.Case == name || !strings.HasPrefix(r.Case, report.LoadBefore))
		})
		rows = append(rows, about(context.WithoutCancel(ctx), b.Programs)...)
		row := result.Unknown()
		row.Experiment, row.Case, row.Tool, row.Rate = "about", name, fmt.Sprintf("%.1f", load), load
		rows = append(rows, row)
		// After each, so that what was measured so far is not lost with what fails.
		if err := result.Save(file, rows); err != nil {
			return err
		}
		if failed != nil {
			return errors.Join(fmt.Errorf("%s: %w", e.Name, failed), report.Write(f.out, rows))
		}
	}
	return report.Write(f.out, rows)
}

func (f flags) scale() (experiment.Scale, error) {
	s := experiment.Full
	if f.quick {
		s = experiment.Quick
	}
	if f.sizes != "" {
		s.Sizes = nil
		for _, x := range strings.Split(f.sizes, ",") {
			n, err := strconv.ParseInt(x, 10, 20)
			if err != nil || n < 1 {
				return s, fmt.Errorf("-sizes %q: want numbers of GiB", f.sizes)
			}
			s.Sizes = append(s.Sizes, n<<30)
		}
	}
	if f.size > 0 {
		s.Size = int64(f.size*1024) << 20
	}
	if f.rounds > 0 {
		s.Rounds = f.rounds
	}
	if f.tools != "" {
		s.Tools = strings.Split(f.tools, ";")
	}
	return s, nil
}

func choose(only string) ([]experiment.Experiment, error) {
	if only == "" {
		return experiment.All, nil
	}
	var chosen []experiment.Experiment
	for _, name := range strings.Split(only, ",") {
		i := slices.IndexFunc(experiment.All, func(e experiment.Experiment) bool { return e.Name == name })
		if i < 0 {
			return nil, fmt.Errorf("no experiment is called %q", name)
		}
		chosen = append(chosen, experiment.All[i])
	}
	return chosen, nil
}

// programs finds the tools: what was built here, else what is installed.
func programs(root string) contender.Programs {
	root, _ = filepath.Abs(root)
	find := func(candidates ...string) string {
		for _, c := range candidates {
			if p, err := exec.LookPath(c); err == nil {
				return p
			}
		}
		return ""
	}
	self, _ := os.Executable()
	return contender.Programs{
		Self:   self,
		Dsync:  find(filepath.Join(root, "dsync-backup")),
		Restic: find(filepath.Join(root, ".build/restic-0.18")),
		MinIO:  find(filepath.Join(root, ".build/minio")),
		Kopia:  find(filepath.Join(root, ".build/kopia"), "kopia"),
		Rsync:  find("rsync"),
		Borg:   find("borg"),
	}
}

// about describes machine and tools, as rows of text.
func about(ctx context.Context, p contender.Programs) []result.Row {
	var rows []result.Row
	add := func(what, text string) {
		r := result.Unknown()
		r.Experiment, r.Case, r.Tool = "about", what, text
		rows = append(rows, r)
	}
	for _, d := range host.Describe() {
		add(d[0], d[1])
	}
	add("memory is told from", fmt.Sprintf("%.0f MiB", float64(host.Floor())/(1<<20)))
	for _, c := range [][]string{{p.Dsync, "--version"}, {p.Restic, "version"}, {p.Rsync, "--version"}, {p.Borg, "--version"}, {p.Kopia, "--version"}, {p.MinIO, "--version"}} {
		if c[0] == "" {
			continue
		}
		out, err := host.Output(ctx, c...)
		if line, _, _ := strings.Cut(out, "\n"); err == nil {
			add(filepath.Base(c[0]), strings.TrimSpace(line))
		}
	}
	return rows
}
