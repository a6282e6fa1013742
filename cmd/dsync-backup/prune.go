// SPDX-License-Identifier: BSD-2-Clause

package main

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/repo/prune"
)

// metaFiles are the names of the small files of a device snapshot
// (docs/format.md), whose blobs stay together.
var metaFiles = []string{"device.json", "index", "sums"}

type pruneFlags struct {
	maxUnused     string
	maxRepack     string
	smallerThan   string
	cacheableOnly bool
	small         bool
	uncompressed  bool
}

func (f *pruneFlags) register(fl *pflag.FlagSet) {
	fl.StringVar(&f.maxUnused, "max-unused", "5%", "`limit` of unused data that may stay: a percentage, a size such as 500M, or unlimited")
	fl.StringVar(&f.maxRepack, "max-repack-size", "", "pack at most this `size` anew, such as 10G")
	fl.BoolVar(&f.cacheableOnly, "repack-cacheable-only", false, "pack only trees anew")
	fl.BoolVar(&f.small, "repack-small", false, "put packs below 80 % of the pack size together")
	fl.StringVar(&f.smallerThan, "repack-smaller-than", "", "put packs below this `size` together")
	fl.BoolVar(&f.uncompressed, "repack-uncompressed", false, "compress what is not")
}

func (f *pruneFlags) options(g *globals) (o prune.Options, err error) {
	o.RepackCacheableOnly, o.RepackSmall, o.RepackUncompressed = f.cacheableOnly, f.small, f.uncompressed
	if o.MaxUnused, err = prune.ParseMaxUnused(f.maxUnused); err != nil {
		return o, fmt.Errorf("--%w", err)
	}
	if f.maxRepack != "" {
		if o.MaxRepack, err = repo.ParseSize(f.maxRepack); err != nil {
			return o, fmt.Errorf("--max-repack-size: %w", err)
		}
		if o.MaxRepack == 0 {
			o.MaxRepack = prune.RepackNothing
		}
	}
	if f.smallerThan != "" {
		if o.SmallPack, err = repo.ParseSize(f.smallerThan); err != nil {
			return o, fmt.Errorf("--repack-smaller-than: %w", err)
		}
		if o.SmallPack > int64(g.packSize)<<20 {
			return o, errors.New("--repack-smaller-than is more than the pack size")
		}
	}
	if f.uncompressed && g.compression == string(repo.CompressionOff) {
		return o, errors.New("--repack-uncompressed and --compression off exclude each other")
	}
	o.IsMeta = func(name string) bool { return slices.Contains(metaFiles, name) }
	return o, nil
}

func newPrune(g *globals) *cobra.Command {
	var f pruneFlags
	dryRun := false
	cmd := &cobra.Command{
		Use:   "prune",
		Short: "Free the space that no snapshot needs",
		Long: `prune deletes the packs of which no snapshot needs anything, and packs anew what
is still needed of others until little enough stays unused (--max-unused).
It locks the repository exclusively, deletes nothing before it has found all that
every snapshot needs, and can be killed at any time and run again.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			o, err := f.options(g)
			if err != nil {
				return err
			}
			o.DryRun = dryRun
			r, ctx, err := g.openExclusive(cmd.Context(), dryRun)
			if err != nil {
				return err
			}
			if err := r.LoadIndex(ctx); err != nil {
				return causeOf(ctx, err)
			}
			return runPruneOn(ctx, g, r, o)
		},
	}
	f.register(cmd.Flags())
	cmd.Flags().BoolVarP(&dryRun, "dry-run", "n", false, "only say what would be done")
	return cmd
}

func runPruneOn(ctx context.Context, g *globals, r *repo.Repository, o prune.Options) error {
	p := g.progress("prune")
	defer p.end()
	o.Warn = g.warn
	o.Progress = func(phase string, done, total int64) {
		if phase == prune.PhaseRepack {
			p.update(phase, done, total)
		} else {
			p.count(phase, done, total)
		}
	}
	s, err := prune.Prune(ctx, r, o)
	if err != nil {
		return causeOf(ctx, err)
	}
	p.end()
	if g.json {
		g.printJSON(g.stdout, s)
		return nil
	}
	if g.quiet {
		return nil
	}
	w, would := g.stdout, ""
	if o.DryRun {
		would = "would be "
	}
	fmt.Fprintf(w, "%d snapshots use %d blobs, %s; unused are %d blobs, %s, and %d second copies, %s\n", s.Snapshots,
		s.Used.Count, size(s.Used.Bytes), s.Unused.Count, size(s.Unused.Bytes), s.Duplicate.Count, size(s.Duplicate.Bytes))
	if s.PacksUnindexed.Count > 0 {
		fmt.Fprintf(w, "%d packs that no index lists, %s, %sdeleted\n", s.PacksUnindexed.Count, size(s.PacksUnindexed.Bytes), would)
	}
	if s.PacksMissing > 0 {
		fmt.Fprintf(w, "%d packs that are missing and not needed %sforgotten\n", s.PacksMissing, would)
	}
	fmt.Fprintf(w, "%d packs %sdeleted, %d %spacked anew, %d kept\n", s.PacksRemoved, would, s.PacksRepacked, would, s.PacksKept)
	fmt.Fprintf(w, "packs: %s before, %s after, of which %s unused; %.1f s\n", size(s.BytesBefore), size(s.BytesAfter), size(s.UnusedAfter), s.DurationSeconds)
	return nil
}
