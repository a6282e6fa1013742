// SPDX-License-Identifier: BSD-2-Clause

package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/kernel/bpf"
)

func newTrack(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "track",
		Short: "Start, stop and look at the tracking of written blocks",
	}
	which := "auto"
	start := &cobra.Command{
		Use:   "start DEVICE",
		Short: "Track which blocks of a device are written, from now on",
		Long: `track start has the kernel mark every block of the device that is written, one
bit for each 4 KiB. It goes on when the command has ended, until track stop or
the end of the machine: after a reboot it is to be started again, and the next
backup then compares the device with the last snapshot once.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error { return trackStart(cmd.Context(), g, args[0], which) },
	}
	start.Flags().StringVar(&which, "tracker", "auto", "`kind` of tracker: auto or bpf")
	stop := &cobra.Command{
		Use:   "stop DEVICE",
		Short: "Stop tracking a device; its history ends",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			t, err := bpf.Open(args[0])
			if err != nil {
				return err
			}
			if err := t.Stop(cmd.Context()); err != nil {
				return err
			}
			if !g.json && !g.quiet {
				fmt.Fprintf(g.stdout, "%s is no longer tracked\n", args[0])
			}
			return nil
		},
	}
	status := &cobra.Command{
		Use:   "status [DEVICE]",
		Short: "Say what is tracked, and whether it can be trusted",
		Args:  cobra.MaximumNArgs(1),
		RunE:  func(cmd *cobra.Command, args []string) error { return trackStatus(cmd.Context(), g, args) },
	}
	cmd.AddCommand(start, stop, status)
	return cmd
}

func trackStart(ctx context.Context, g *globals, path, which string) error {
	if which != "auto" && which != "bpf" {
		return fmt.Errorf("--tracker %q is not one of auto, bpf", which)
	}
	t, err := bpf.Start(ctx, path, bpf.Options{})
	if err != nil {
		return err
	}
	defer t.Close()
	st, err := t.Status(ctx)
	if err != nil {
		return err
	}
	if g.json {
		g.printJSON(g.stdout, st)
	} else if !g.quiet {
		fmt.Fprintf(g.stdout, "%s is tracked (%s, %s) until track stop or a reboot\n", path, st.Tracker, st.UUID)
	}
	return nil
}

func trackStatus(ctx context.Context, g *globals, args []string) error {
	trackers, err := openTrackers(args)
	if err != nil {
		return err
	}
	list := []kernel.Status{}
	for _, t := range trackers {
		defer t.Close()
		st, err := t.Status(ctx)
		if err != nil {
			return err
		}
		list = append(list, st)
	}
	if g.json {
		g.printJSON(g.stdout, list)
		return nil
	}
	if len(list) == 0 {
		fmt.Fprintln(g.stdout, "nothing is tracked: dsync-backup track start DEVICE")
		return nil
	}
	fmt.Fprintf(g.stdout, "%-20s%-9s%-34s%7s%12s  %s\n", "Device", "Tracker", "UUID", "Epoch", "Dirty", "State")
	for _, st := range list {
		state := "reliable"
		if !st.Reliable {
			state = "NOT RELIABLE: " + st.Reason
		}
		fmt.Fprintf(g.stdout, "%-20s%-9s%-34s%7d%12s  %s\n", st.Device, st.Tracker, st.UUID, st.Epoch, size(st.DirtyBlocks*int64(st.BlockSize)), state)
	}
	return nil
}

func openTrackers(args []string) ([]*bpf.Tracker, error) {
	if len(args) == 0 {
		return bpf.List()
	}
	t, err := bpf.Open(args[0])
	if errors.Is(err, kernel.ErrNotTracked) {
		return nil, fmt.Errorf("%w: run `dsync-backup track start %s`", err, args[0])
	}
	return []*bpf.Tracker{t}, err
}
