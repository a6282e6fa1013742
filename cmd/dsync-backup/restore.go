// SPDX-License-Identifier: BSD-2-Clause

package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/restore"
)

func newRestore(g *globals) *cobra.Command {
	sel := selectFlags{canSalvage: true}
	var o restore.Options
	changes := "auto"
	cmd := &cobra.Command{
		Use:   "restore SNAPSHOT TARGET",
		Short: "Write a snapshot of a device to a device or a file",
		Long: `restore writes the device of a snapshot (an ID, the beginning of one, or
"latest") to a block device or a file. A target that is mounted, in use or too
small is refused; one with data on it needs --force.

  --changes auto     read the target first if it has data on it, else write all
  --changes compare  read the target and write only what differs
  --changes all      write everything`,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			var err error
			if o.Changes, err = restore.ParseChanges(changes); err != nil {
				return err
			}
			o.Target, sel.salvage = args[1], o.Salvage
			return runRestore(cmd.Context(), g, &sel, args[0], o)
		},
	}
	sel.register(cmd)
	cmd.Flags().StringVar(&changes, "changes", changes, "what to write: auto, compare or all")
	cmd.Flags().BoolVar(&o.Verify, "verify", false, "read the target again afterwards and compare")
	cmd.Flags().BoolVar(&o.Force, "force", false, "overwrite a target that has data on it")
	cmd.Flags().BoolVar(&o.Salvage, "salvage", false, "of a damaged snapshot write what there is; the ranges that are not there are printed, keep what the target held, and the exit status is 1")
	return cmd
}

func runRestore(ctx context.Context, g *globals, sel *selectFlags, name string, o restore.Options) error {
	ctx, from, d, err := sel.open(ctx, g, name)
	if err != nil {
		return err
	}
	o.Device = d
	p := g.progress("restore")
	defer p.end()
	o.Progress = func(pr restore.Progress) { p.update(pr.Phase, pr.Done, pr.Total) }
	res, err := restore.Restore(ctx, from, o)
	if err != nil {
		p.end()
		if o.Salvage {
			g.printLost(g.stdout, err)
		}
		return causeOf(ctx, sel.refused(err))
	}
	p.end()
	if g.json {
		g.printJSON(g.stdout, res)
		return nil
	}
	fmt.Fprintf(g.stdout, "restored snapshot %s of %s to %s: wrote %s, made %s zeros, skipped %s, fetched %s, %.1f s\n",
		res.SnapshotID.Str(), o.Device.Name, res.Target, size(res.BytesWritten), size(res.BytesZeroed), size(res.BytesSkipped), size(res.BytesFetched), res.DurationSeconds)
	return nil
}

// refused adds to a refusal for damage what --salvage would do. A target that is incomplete
// has got all that there is.
func (s *selectFlags) refused(err error) error {
	if lost := (*restore.DamageError)(nil); errors.As(err, &lost) && !errors.Is(err, restore.ErrIncomplete) {
		return s.orSalvage(err)
	}
	return err
}

// printLost prints every range that a damaged snapshot could not give: the error
// itself names only some.
func (g *globals) printLost(w io.Writer, err error) {
	var lost *restore.DamageError
	if !errors.As(err, &lost) {
		return
	}
	for _, e := range lost.Ranges {
		if g.json {
			g.printJSON(w, struct {
				MessageType string `json:"message_type"`
				kernel.Extent
			}{"lost", e})
		} else {
			fmt.Fprintf(w, "lost at %d, %d bytes\n", e.Offset, e.Length)
		}
	}
}

func newDump(g *globals) *cobra.Command {
	sel := selectFlags{canSalvage: true}
	salvage := false
	cmd := &cobra.Command{
		Use:   "dump SNAPSHOT",
		Short: "Write a snapshot of a device to standard output",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			sel.salvage = salvage
			ctx, from, d, err := sel.open(cmd.Context(), g, args[0])
			if err != nil {
				return err
			}
			_, err = restore.Dump(ctx, from, g.stdout, restore.DumpOptions{Device: d, Salvage: salvage})
			if err != nil && salvage {
				g.printLost(g.stderr, err) // stdout is the device
			}
			return causeOf(ctx, sel.refused(err))
		},
	}
	sel.register(cmd)
	cmd.Flags().BoolVar(&salvage, "salvage", false, "of a damaged snapshot write what there is, and zeros for the rest; the ranges are printed to standard error, and the exit status is 1")
	return cmd
}

func newVerify(g *globals) *cobra.Command {
	var sel selectFlags
	cmd := &cobra.Command{
		Use:   "verify SNAPSHOT DEVICE",
		Short: "Compare a device or a file with a snapshot",
		Long: `verify reads a device and compares it with the sums that a snapshot keeps of
every block. It fetches no data. Exit status 0: equal; 1: different, and the
ranges are printed.`,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runVerify(cmd.Context(), g, &sel, args)
		},
	}
	sel.register(cmd)
	return cmd
}

func runVerify(ctx context.Context, g *globals, sel *selectFlags, args []string) error {
	ctx, from, d, err := sel.open(ctx, g, args[0])
	if err != nil {
		return err
	}
	p := g.progress("verify")
	defer p.end()
	different, err := restore.Verify(ctx, from, restore.VerifyOptions{
		Device: d, Target: args[1], Progress: func(pr restore.Progress) { p.update(pr.Phase, pr.Done, pr.Total) },
	})
	if err != nil {
		return causeOf(ctx, err)
	}
	p.end()
	for _, e := range different {
		if g.json {
			g.printJSON(g.stdout, struct {
				MessageType string `json:"message_type"`
				kernel.Extent
			}{"different", e})
		} else {
			fmt.Fprintf(g.stdout, "%s differs at %d, %d bytes\n", args[1], e.Offset, e.Length)
		}
	}
	if g.json {
		g.printJSON(g.stdout, map[string]any{
			"message_type": "summary", "snapshot_id": d.Snapshot, "device": args[1],
			"equal": len(different) == 0, "different_bytes": kernel.TotalLength(different),
		})
	}
	if len(different) > 0 {
		return errSaid
	}
	if !g.json && !g.quiet {
		fmt.Fprintf(g.stdout, "%s equals snapshot %s\n", args[1], d.Snapshot.Str())
	}
	return nil
}
