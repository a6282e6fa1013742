// SPDX-License-Identifier: BSD-2-Clause

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/snapshot/retention"
)

type forgetFlags struct {
	policy    retention.Policy
	groupBy   retention.GroupBy
	keepTags  []string
	removeAll bool
	dryRun    bool
	compact   bool
	prune     bool
	pruning   pruneFlags
	filter    func() repo.SnapshotFilter
	hostnames []string // --hostname, which restic still takes for --host
}

func newForget(g *globals) *cobra.Command {
	f := forgetFlags{groupBy: retention.GroupBy{Host: true, Paths: true}}
	cmd := &cobra.Command{
		Use:   "forget [SNAPSHOT ...]",
		Short: "Remove snapshots, by name or by a policy",
		Long: `forget removes the snapshots that are named, or those that no --keep rule keeps.
Snapshots are first divided into groups (--group-by), and the policy is applied
to each group by itself; a policy that would keep nothing of a group is refused.
Snapshots that restic made of files are treated like all others. What is
removed still takes space until a prune; --prune runs one.

The rules are restic's: --keep-daily 7 keeps the newest snapshot of each of the
last 7 days that have one, and as long as there are fewer days than that, the
oldest snapshot too.`,
		RunE: func(cmd *cobra.Command, args []string) error { return runForget(cmd.Context(), g, &f, args) },
	}
	fl := cmd.Flags()
	fl.VarP(&f.policy.Last, "keep-last", "l", "keep the last `n` snapshots (or unlimited, as below)")
	fl.VarP(&f.policy.Hourly, "keep-hourly", "H", "keep the newest of each of the last `n` hours with a snapshot")
	fl.VarP(&f.policy.Daily, "keep-daily", "d", "keep the newest of each of the last `n` days")
	fl.VarP(&f.policy.Weekly, "keep-weekly", "w", "keep the newest of each of the last `n` weeks")
	fl.VarP(&f.policy.Monthly, "keep-monthly", "m", "keep the newest of each of the last `n` months")
	fl.VarP(&f.policy.Yearly, "keep-yearly", "y", "keep the newest of each of the last `n` years")
	fl.Var(&f.policy.Within, "keep-within", "keep what is at most this `duration` (such as 1y5m7d2h) older than the newest")
	fl.Var(&f.policy.WithinHourly, "keep-within-hourly", "keep the newest of each hour within this `duration`")
	fl.Var(&f.policy.WithinDaily, "keep-within-daily", "keep the newest of each day within this `duration`")
	fl.Var(&f.policy.WithinWeekly, "keep-within-weekly", "keep the newest of each week within this `duration`")
	fl.Var(&f.policy.WithinMonthly, "keep-within-monthly", "keep the newest of each month within this `duration`")
	fl.Var(&f.policy.WithinYearly, "keep-within-yearly", "keep the newest of each year within this `duration`")
	fl.StringArrayVar(&f.keepTags, "keep-tag", nil, "keep what has all of these `tag[,tag,…]` (may be given again: or)")
	fl.VarP(&f.groupBy, "group-by", "g", "`group` snapshots by host, paths, tags, with commas between; empty: all in one")
	filter := filterFlagsWith(cmd, "") // -H is --keep-hourly, as in restic
	fl.StringArrayVar(&f.hostnames, "hostname", nil, "the same as --host")
	_ = fl.MarkHidden("hostname") // there is such a flag
	f.filter = func() repo.SnapshotFilter {
		sf := filter()
		if len(f.hostnames) > 0 && !fl.Changed("host") {
			sf.Hosts = nil // $RESTIC_HOST
		}
		sf.Hosts = append(slices.Clone(sf.Hosts), f.hostnames...)
		return sf
	}
	fl.BoolVar(&f.removeAll, "unsafe-allow-remove-all", false, "remove all that --host, --path and --tag let through")
	fl.BoolVarP(&f.dryRun, "dry-run", "n", false, "only say what would be removed")
	fl.BoolVarP(&f.compact, "compact", "c", false, "leave reasons and paths out of what is printed")
	fl.BoolVar(&f.prune, "prune", false, "run prune if anything was removed")
	f.pruning.register(fl)
	return cmd
}

// errNoPolicy says what to do instead of removing everything.
var errNoPolicy = errors.New("no snapshot and no --keep rule is given, so that nothing is removed")

func (f *forgetFlags) check(args []string) error {
	for _, t := range f.keepTags {
		f.policy.Tags = append(f.policy.Tags, retention.ParseTags(t))
	}
	switch {
	case len(args) > 0 || !f.policy.Empty():
		return nil
	case !f.removeAll:
		return errNoPolicy
	case f.filter().Empty():
		return errors.New("--unsafe-allow-remove-all needs --host, --path or --tag, which say what to remove")
	}
	return nil
}

func runForget(ctx context.Context, g *globals, f *forgetFlags, args []string) error {
	filter := f.filter()
	if err := f.check(args); err != nil {
		return err
	}
	if len(f.hostnames) > 0 {
		g.warn(errors.New("--hostname is deprecated, use --host"))
	}
	pruning, err := f.pruning.options(g)
	if err != nil {
		return err
	}
	r, ctx, err := g.openExclusive(ctx, f.dryRun)
	if err != nil {
		return err
	}
	var groups []*retention.Group
	if len(args) > 0 {
		groups, err = namedSnapshots(ctx, g, r, filter, args)
	} else {
		groups, err = f.decide(ctx, g, r, filter)
	}
	if err != nil {
		return causeOf(ctx, err)
	}
	remove := map[repo.ID]bool{}
	for _, gr := range groups {
		for _, s := range gr.Remove {
			remove[s.ID] = true
		}
	}
	// What was decided is said before it is done, and that it is done after that.
	f.printDecision(g, groups)
	if !f.dryRun {
		if err := removeSnapshots(ctx, g, r, remove); err != nil {
			return causeOf(ctx, err)
		}
	}
	f.printDone(g, groups, len(remove))
	if !f.prune || len(remove) == 0 {
		return nil
	}
	if err := r.LoadIndex(ctx); err != nil {
		return causeOf(ctx, err)
	}
	pruning.DryRun = f.dryRun
	if f.dryRun {
		pruning.Ignore = remove
	}
	return runPruneOn(ctx, g, r, pruning)
}

// decide applies the policy to all groups, and refuses if one would be empty.
func (f *forgetFlags) decide(ctx context.Context, g *globals, r *repo.Repository, filter repo.SnapshotFilter) ([]*retention.Group, error) {
	var list []retention.Snapshot
	err := r.ListSnapshots(ctx, func(id repo.ID, s *repo.Snapshot, err error) error {
		if err != nil {
			g.warn(fmt.Errorf("snapshot %s is left alone: %w", id.Str(), err))
		} else if filter.Match(s) {
			list = append(list, retention.New(id, s))
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	groups, now := f.groupBy.Split(list), time.Now()
	for _, gr := range groups {
		gr.Keep, gr.Remove, gr.Reasons = f.policy.Apply(gr.Snapshots, now)
		if len(gr.Keep) == 0 && !f.policy.Empty() {
			return nil, fmt.Errorf("the policy keeps no snapshot of %s: nothing was removed", gr.Name())
		}
	}
	return groups, nil
}

// unreadSnapshot stands for one of which only the ID is known.
var unreadSnapshot = &repo.Snapshot{}

// namedSnapshots finds the snapshots that the user names. One that is not there
// is no error, as with restic, so that a forget which was killed can be run
// again. One that cannot be read can be removed all the same.
func namedSnapshots(ctx context.Context, g *globals, r *repo.Repository, filter repo.SnapshotFilter, names []string) ([]*retention.Group, error) {
	if !filter.Empty() && !slices.Contains(names, "latest") {
		g.warn(errors.New("--host, --path and --tag are ignored: the snapshots are named by their IDs"))
	}
	gr := &retention.Group{}
	seen := map[repo.ID]bool{}
	for _, name := range names {
		id, s, err := r.FindSnapshot(ctx, name, filter)
		switch {
		case ctx.Err() != nil:
			return nil, context.Cause(ctx)
		case errors.Is(err, repo.ErrDamaged) && !id.IsNull():
			g.warn(fmt.Errorf("snapshot %s cannot be read and is removed: %w", id.Str(), err))
			s = unreadSnapshot
		case errors.Is(err, repo.ErrNoSnapshot), errors.Is(err, backend.ErrNotExist):
			g.warn(fmt.Errorf("%q is passed over: %w", name, err))
			continue
		case err != nil:
			return nil, err
		}
		if !seen[id] {
			seen[id] = true
			gr.Remove = append(gr.Remove, retention.New(id, s))
		}
	}
	return []*retention.Group{gr}, nil
}

// removeSnapshots removes what it can, and says if anything stayed.
func removeSnapshots(ctx context.Context, g *globals, r *repo.Repository, remove map[repo.ID]bool) error {
	ids := make([]repo.ID, 0, len(remove))
	for id := range remove {
		ids = append(ids, id)
	}
	p := g.progress("forget")
	defer p.end()
	failed := 0
	err := r.RemoveSnapshots(ctx, ids, func(_ repo.ID, err error) {
		if err != nil {
			failed++
		}
	})
	if err != nil && failed > 0 {
		return fmt.Errorf("%d of %d snapshots could not be removed: %w", failed, len(ids), err)
	}
	return err
}

// printDecision says what stays, and why, and what goes.
func (f *forgetFlags) printDecision(g *globals, groups []*retention.Group) {
	if g.json || g.quiet {
		return
	}
	verb := "to remove"
	if f.dryRun {
		verb = "would be removed"
	}
	w := g.stdout
	for _, gr := range groups {
		if len(gr.Keep) > 0 {
			fmt.Fprintf(w, "%s: %d to keep, %d %s\n", gr.Name(), len(gr.Keep), len(gr.Remove), verb)
		}
		for i, s := range gr.Keep {
			f.printSnapshot(w, "keep  ", s, strings.Join(gr.Reasons[i].Matches, ", "))
		}
		for _, s := range gr.Remove {
			f.printSnapshot(w, "remove", s, strings.Join(s.Paths, " "))
		}
	}
}

func (f *forgetFlags) printSnapshot(w io.Writer, what string, s retention.Snapshot, more string) {
	at := s.Time.Local().Format("2006-01-02 15:04:05")
	if s.Snapshot == unreadSnapshot {
		at = "it cannot be read  "
	}
	line := fmt.Sprintf("  %s  %s  %s", what, s.ShortID, at)
	if !f.compact {
		line += "  " + more
	}
	fmt.Fprintln(w, line)
}

// printDone says that what was decided is done.
func (f *forgetFlags) printDone(g *globals, groups []*retention.Group, removed int) {
	switch {
	case g.json:
		if groups == nil {
			groups = []*retention.Group{}
		}
		g.printJSON(g.stdout, groups)
	case g.quiet:
	case f.dryRun:
		fmt.Fprintf(g.stdout, "%d snapshots would be removed\n", removed)
	default:
		fmt.Fprintf(g.stdout, "%d snapshots removed\n", removed)
	}
}
