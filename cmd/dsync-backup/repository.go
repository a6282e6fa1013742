// SPDX-License-Identifier: BSD-2-Clause

package main

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/snapshot"
	"github.com/dsync-backup/dsync-backup/snapshot/retention"
)

func newInit(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "init",
		Short: "Make a new repository (restic's format, version 2)",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx := cmd.Context()
			be, err := g.openBackend(ctx)
			if err != nil {
				return err
			}
			password, err := g.password(ctx, true)
			if err != nil {
				return err
			}
			o, err := g.options()
			if err != nil {
				return err
			}
			r, err := repo.Init(ctx, be, password, o)
			if err != nil {
				return err
			}
			defer r.Close()
			if g.json {
				g.printJSON(g.stdout, map[string]string{"message_type": "initialized", "id": r.ID(), "repository": r.Location()})
			} else if !g.quiet {
				fmt.Fprintf(g.stdout, "created repository %.10s at %s\nKeep the password: without it the data are lost.\n", r.ID(), r.Location())
			}
			return nil
		},
	}
}

func newUnlock(g *globals) *cobra.Command {
	all := false
	cmd := &cobra.Command{
		Use:   "unlock",
		Short: "Remove locks that dead processes left",
		Long: `unlock removes the locks that nobody holds any more: of a process on this host
that is gone, and, of whatever host, one that was not refreshed for 30 minutes
(a program at work does that every five). The rules are restic's. Each lock that
stays is named, with the time from which on it counts as left behind. One that
cannot be read always stays.

--remove-all removes every lock, also of programs that are at work. They stop
when they notice. Until then they go on without protection: a prune may delete
what a backup relies on, or what a restore reads. Use it only when it is certain
that nothing works on the repository, from any host.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			r, err := g.open(cmd.Context())
			if err != nil {
				return err
			}
			n, err := r.RemoveStaleLocks(cmd.Context(), all)
			if err != nil {
				return err
			}
			left, err := r.Locks(cmd.Context())
			if err != nil {
				return fmt.Errorf("%d locks were removed; look at those that stay: %w", n, err)
			}
			if g.json {
				g.printJSON(g.stdout, map[string]any{"message_type": "summary", "removed": n, "left": left})
			} else if !g.quiet {
				fmt.Fprintf(g.stdout, "removed %d locks\n", n)
				for _, l := range left {
					fmt.Fprintf(g.stdout, "lock %s stays: %s\n", l.ID.Str(), l)
				}
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&all, "remove-all", false, "remove every lock, also of programs that are at work, which then have no protection")
	return cmd
}

// filterFlags adds the flags that narrow down snapshots, and returns what makes
// a filter of them.
func filterFlags(cmd *cobra.Command) func() repo.SnapshotFilter { return filterFlagsWith(cmd, "H") }

// filterFlagsWith is filterFlags with a letter of its own for --host.
func filterFlagsWith(cmd *cobra.Command, host string) func() repo.SnapshotFilter {
	var f repo.SnapshotFilter
	var tags []string
	if name := os.Getenv("RESTIC_HOST"); name != "" {
		f.Hosts = []string{name}
	}
	cmd.Flags().StringArrayVarP(&f.Hosts, "host", host, f.Hosts, "only snapshots of this `host` (may be given again; default: $RESTIC_HOST)")
	cmd.Flags().StringArrayVar(&f.Paths, "path", nil, "only snapshots of this `path`")
	cmd.Flags().StringArrayVar(&tags, "tag", nil, "only snapshots with all of these `tag[,tag,…]` (may be given again: or)")
	return func() repo.SnapshotFilter {
		f.Tags = nil
		for _, t := range tags {
			f.Tags = append(f.Tags, retention.ParseTags(t))
		}
		return f
	}
}

// listedSnapshot has restic's fields.
type listedSnapshot struct {
	*repo.Snapshot
	ID      repo.ID `json:"id"`
	ShortID string  `json:"short_id"`
}

func newSnapshots(g *globals) *cobra.Command {
	var filter func() repo.SnapshotFilter
	cmd := &cobra.Command{
		Use:   "snapshots [SNAPSHOT ...]",
		Short: "List the snapshots, restic's own too",
		RunE: func(cmd *cobra.Command, args []string) error {
			// What is listed needs no index; only the sizes do.
			r, ctx, err := g.openSalvaging(cmd.Context())
			if err != nil {
				return err
			}
			list, err := listSnapshots(ctx, g, r, filter(), args)
			if err != nil {
				return err
			}
			if g.json {
				g.printJSON(g.stdout, list)
				return nil
			}
			return printSnapshots(ctx, g, r, list)
		},
	}
	filter = filterFlags(cmd)
	return cmd
}

func listSnapshots(ctx context.Context, g *globals, r *repo.Repository, filter repo.SnapshotFilter, names []string) ([]listedSnapshot, error) {
	list := []listedSnapshot{}
	if len(names) > 0 {
		for _, name := range names {
			id, sn, err := r.FindSnapshot(ctx, name, filter)
			if err != nil {
				return nil, err
			}
			list = append(list, listedSnapshot{sn, id, id.Str()})
		}
		return list, nil
	}
	err := r.ListSnapshots(ctx, func(id repo.ID, sn *repo.Snapshot, err error) error {
		if err != nil {
			g.warn(fmt.Errorf("snapshot %s: %w", id.Str(), err))
		} else if filter.Match(sn) {
			list = append(list, listedSnapshot{sn, id, id.Str()})
		}
		return nil
	})
	slices.SortFunc(list, func(a, b listedSnapshot) int { return cmp.Or(a.Time.Compare(b.Time), a.ID.Compare(b.ID)) })
	return list, err
}

func printSnapshots(ctx context.Context, g *globals, r *repo.Repository, list []listedSnapshot) error {
	fmt.Fprintf(g.stdout, "%-10s%-21s%-16s%-20s%-12s%-11s%s\n", "ID", "Time", "Host", "Tags", "Size", "Changes", "Paths")
	for _, s := range list {
		bytes, changes := "", ""
		if devices, err := snapshot.Devices(ctx, snapshot.Store{Repository: r}, s.ID, s.Snapshot); err == nil {
			var n int64
			for _, d := range devices {
				n += d.Manifest.Size
				changes = string(d.Manifest.Changes)
			}
			bytes = size(n)
		}
		fmt.Fprintf(g.stdout, "%-10s%-21s%-16.15s%-20s%-12s%-11s%s\n", s.ShortID, s.Time.Local().Format("2006-01-02 15:04:05"),
			s.Hostname, strings.Join(s.Tags, ","), bytes, changes, strings.Join(s.Paths, " "))
	}
	fmt.Fprintf(g.stdout, "%d snapshots\n", len(list))
	return nil
}
