// SPDX-License-Identifier: BSD-2-Clause

package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/repo/check"
	"github.com/dsync-backup/dsync-backup/snapshot"
	devicecheck "github.com/dsync-backup/dsync-backup/snapshot/check"
)

type checkFlags struct {
	readData  bool
	subset    string
	withCache bool
}

func newCheck(g *globals) *cobra.Command {
	var f checkFlags
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Look for damage in the repository",
		Long: `check makes sure that the index, the packs, the snapshots and their trees agree,
that every device snapshot has every range of its device, and with --read-data
that every byte stored is right. It names what is damaged, then each snapshot
that this touches, with the ranges of the device that cannot be given; those
that are not named can be restored (see restore --salvage). It locks the
repository exclusively and changes nothing. Exit status 1: there is damage.

  --read-data-subset 1/7    the first of seven parts of the packs
  --read-data-subset 2.5%   so many of the packs, chosen at random
  --read-data-subset 10G    about so much, chosen at random

Its last line says how many of the packs were read: none without these, and where a
part of a small repository holds none.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return runCheck(cmd.Context(), g, f) },
	}
	fl := cmd.Flags()
	fl.BoolVar(&f.readData, "read-data", false, "read every pack")
	fl.StringVar(&f.subset, "read-data-subset", "", "read a `subset` of the packs: n/t, x% or a size")
	fl.BoolVar(&f.withCache, "with-cache", false, "believe what the local cache holds instead of reading it from the store")
	return cmd
}

func (f checkFlags) options() (o check.Options, err error) {
	switch {
	case f.readData && f.subset != "":
		return o, errors.New("--read-data and --read-data-subset exclude each other")
	case f.readData:
		o.ReadData = check.All()
	case f.subset != "":
		if o.ReadData, err = check.ParseSubset(f.subset); err != nil {
			return o, fmt.Errorf("--read-data-subset: %w", err)
		}
	}
	return o, nil
}

// checkSummary begins with restic's fields.
type checkSummary struct {
	MessageType        string    `json:"message_type"` // "summary"
	NumErrors          int       `json:"num_errors"`
	BrokenPacks        []repo.ID `json:"broken_packs"`
	SuggestRepairIndex bool      `json:"suggest_repair_index"`
	SuggestPrune       bool      `json:"suggest_prune"`
	Snapshots          int       `json:"snapshots"`
	Devices            int       `json:"devices"`
	DamagedSnapshots   []repo.ID `json:"damaged_snapshots"`
	Packs              int       `json:"packs"`
	PacksRead          int       `json:"packs_read"`

	badPacks bool // some of what packs hold is lost
}

func runCheck(ctx context.Context, g *globals, f checkFlags) error {
	o, err := f.options()
	if err != nil {
		return err
	}
	if !f.withCache && !g.noCache {
		// What the cache holds says nothing of the store.
		dir, remove, err := checkCache(g.cacheDir)
		if err != nil {
			return err
		}
		g.cacheDir = dir
		g.closers = append(g.closers, remove)
	}
	r, ctx, err := g.openWithLock(ctx, true)
	if err != nil {
		return err
	}
	p := g.progress("check")
	defer p.end()
	o.Progress = func(phase string, done, total int64) {
		if phase == check.PhaseData {
			p.update(phase, done, total)
		} else {
			p.count(phase, done, total)
		}
	}
	sum := checkSummary{MessageType: "summary", BrokenPacks: []repo.ID{}, DamagedSnapshots: []repo.ID{}}
	o.Report = func(problem check.Problem) {
		p.end()
		g.printProblem(problem)
		if !problem.Harmless && (problem.Kind == "pack" || problem.Kind == "blob") {
			sum.badPacks = true
		}
	}
	res, err := check.Check(ctx, r, o)
	if err != nil {
		return causeOf(ctx, err)
	}
	defer res.Damage.Close()
	sum.NumErrors, sum.Snapshots = res.Errors, len(res.Snapshots)+len(res.Unread)
	sum.DamagedSnapshots = append(sum.DamagedSnapshots, res.Unread...)
	sum.Packs, sum.PacksRead = res.Packs, res.PacksRead
	sum.BrokenPacks = append(sum.BrokenPacks, res.BrokenPacks...)
	sum.SuggestRepairIndex, sum.SuggestPrune = res.SuggestRepairIndex, res.SuggestPrune
	if err := checkDevices(ctx, g, r, p, res, &sum); err != nil {
		return causeOf(ctx, err)
	}
	p.end()
	return g.printCheck(sum)
}

// checkDevices finds the snapshots that are damaged.
func checkDevices(ctx context.Context, g *globals, r *repo.Repository, p *progress, res *check.Result, sum *checkSummary) error {
	touched, err := res.Damage.Touched(ctx, res.Snapshots)
	if err != nil {
		return err
	}
	sum.Devices, err = devicecheck.Devices(ctx, snapshot.Store{Repository: r}, devicecheck.Options{
		Snapshots: res.Snapshots, Touched: touched, Blob: res.Damage.Blob,
		Alive:    func(ctx context.Context) error { return check.Alive(ctx, r) },
		Progress: func(done, total int64) { p.count("checking devices", done, total) },
		Report: func(f devicecheck.Finding) {
			p.end()
			sum.NumErrors++
			if n := len(sum.DamagedSnapshots); n == 0 || sum.DamagedSnapshots[n-1] != f.Snapshot {
				sum.DamagedSnapshots = append(sum.DamagedSnapshots, f.Snapshot)
			}
			if g.json {
				g.printJSON(g.stdout, struct {
					MessageType string `json:"message_type"`
					devicecheck.Finding
					Message string `json:"message"`
				}{"damaged_snapshot", f, f.String()})
				return
			}
			fmt.Fprintln(g.stdout, f)
		},
	})
	return err
}

func (g *globals) printProblem(p check.Problem) {
	if g.json {
		kind := "error"
		if p.Harmless {
			kind = "hint"
		}
		g.printJSON(g.stdout, struct {
			MessageType string `json:"message_type"`
			check.Problem
		}{kind, p})
		return
	}
	if p.Harmless {
		fmt.Fprintf(g.stdout, "hint: %s\n", p)
		return
	}
	fmt.Fprintf(g.stdout, "error: %s\n", p)
}

// next says what to do about damage, in short.
func (s checkSummary) next() string {
	const salvage = "`restore --salvage` what is needed of the damaged snapshots"
	var steps []string
	damaged := len(s.DamagedSnapshots) > 0
	switch {
	case s.SuggestRepairIndex && damaged && s.badPacks:
		// What the index says of a lost pack tells what lies around it.
		steps = []string{salvage, "then `repair index` (not `prune`)", "`check` again"}
	case s.SuggestRepairIndex:
		steps = []string{"`repair index` (not `prune`)", "`check` again"}
	case damaged:
		steps = []string{salvage, "`backup --changes full`", "`check --read-data` again", "`forget` what it still names", "`prune`"}
	}
	const where = "\"What to do about damage\" in docs/retention.md"
	if len(steps) == 0 {
		return "next: see " + where
	}
	return "next: " + strings.Join(steps, ", ") + "; see " + where
}

func (g *globals) printCheck(sum checkSummary) error {
	if g.json {
		g.printJSON(g.stdout, sum)
	} else {
		if sum.NumErrors == 0 && !g.quiet {
			fmt.Fprintf(g.stdout, "no errors were found in %d snapshots, %d devices; %d of %d packs were read\n",
				sum.Snapshots, sum.Devices, sum.PacksRead, sum.Packs)
		}
		if sum.NumErrors > 0 {
			fmt.Fprintf(g.stdout, "%d errors; %d of %d snapshots are damaged; %d of %d packs were read\n",
				sum.NumErrors, len(sum.DamagedSnapshots), sum.Snapshots, sum.PacksRead, sum.Packs)
			fmt.Fprintln(g.stdout, sum.next())
		}
	}
	if sum.NumErrors > 0 {
		return errSaid
	}
	return nil
}
