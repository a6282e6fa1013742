// SPDX-License-Identifier: BSD-2-Clause

package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/kernel/dm"
	"github.com/dsync-backup/dsync-backup/kernel/trackers"
	"github.com/dsync-backup/dsync-backup/snapshot/cow"
	"github.com/dsync-backup/dsync-backup/snapshot/device"
)

func newTrack(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "track",
		Short: "Start, stop and look at the tracking of written blocks",
	}
	var o trackers.Options
	start := &cobra.Command{
		Use:   "start DEVICE",
		Short: "Track which blocks of a device are written, from now on",
		Long: `track start has the kernel mark every block of the device that is written, one
bit for each 4 KiB. It goes on when the command has ended, until track stop or
the end of the machine: after a reboot it is to be started again, and the next
backup then compares the device with the last snapshot once.

  --tracker bpf   eBPF programs watch the device as it is, in use or not
  --tracker dm    the kernel module dm-dsync maps the device to /dev/mapper/NAME,
                  which is to be mounted and backed up in its place from then
                  on; the device must not be in use meanwhile
  --tracker auto  dm if the module is there and the device is not in use,
                  else bpf`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error { return trackStart(cmd.Context(), g, args[0], o) },
	}
	start.Flags().StringVar((*string)(&o.Kind), "tracker", "auto", "`kind` of tracker: auto, dm or bpf")
	start.Flags().StringVar(&o.Name, "as", "", "`name` of the mapped device of a dm tracker (default: DEVICE's own name and -dsync)")
	stop := &cobra.Command{
		Use:   "stop DEVICE",
		Short: "Stop tracking a device; its history ends",
		Long: `track stop ends the tracking of a device. A dm tracker's mapped device goes away,
so that it must not be in use; DEVICE is that or the device beneath.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error { return trackStop(cmd.Context(), g, args[0]) },
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

func trackStart(ctx context.Context, g *globals, path string, o trackers.Options) error {
	switch o.Kind {
	case trackers.Auto, trackers.DM, trackers.BPF:
	default:
		return fmt.Errorf("--tracker %q is not one of auto, dm, bpf", o.Kind)
	}
	if o.Name != "" && o.Kind == trackers.BPF {
		return errors.New("--as is the name of a mapped device, which --tracker bpf does not make")
	}
	o.Warn = g.warn
	t, err := trackers.Start(ctx, path, o)
	if errors.Is(err, dm.ErrInUse) {
		if use, useErr := device.InUse(path); useErr == nil && !use.Empty() {
			err = fmt.Errorf("%w (%v)", err, use)
		}
	}
	if err != nil {
		return err
	}
	defer t.Close()
	st, err := t.Status(ctx)
	if err != nil {
		return err
	}
	switch {
	case g.json:
		g.printJSON(g.stdout, st)
	case g.quiet:
	case st.Below != "":
		fmt.Fprintf(g.stdout, "%s is tracked as %s (%s, %s) until track stop or a reboot\n", path, st.Device, st.Tracker, st.UUID)
		fmt.Fprintf(g.stdout, "from now on use %s in its place: mount it, back it up; what is written to %s itself is not seen\n", st.Device, st.Below)
	default:
		fmt.Fprintf(g.stdout, "%s is tracked (%s, %s) until track stop or a reboot\n", path, st.Tracker, st.UUID)
	}
	return nil
}

func trackStop(ctx context.Context, g *globals, path string) error {
	t, err := trackers.Open(path)
	if err != nil {
		return err
	}
	node := t.Device()
	if d, ok := t.(*dm.Tracker); ok {
		// What a backup that was killed has left beneath it.
		if err := cow.Clean(ctx, d); err != nil {
			return errors.Join(err, t.Close())
		}
	}
	err = t.Stop(ctx)
	if errors.Is(err, dm.ErrInUse) {
		if use, useErr := device.InUse(node); useErr == nil && !use.Empty() {
			err = fmt.Errorf("%w (%v)", err, use)
		}
	}
	if err != nil {
		return errors.Join(err, t.Close())
	}
	if !g.json && !g.quiet {
		fmt.Fprintf(g.stdout, "%s is no longer tracked\n", path)
	}
	return nil
}

func trackStatus(ctx context.Context, g *globals, args []string) error {
	found, err := openTrackers(g, args)
	if err != nil {
		return err
	}
	list := []trackerStatus{}
	for _, t := range found {
		defer t.Close()
		st, err := describeTracker(ctx, g, t)
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
	fmt.Fprintf(g.stdout, "%-24s%-9s%-34s%7s%12s  %s\n", "Device", "Tracker", "UUID", "Epoch", "Dirty", "State")
	for _, st := range list {
		st.print(g.stdout)
	}
	return nil
}

// openTrackers opens the tracker of a device, or all. What cannot be opened of
// all is a warning, unless it is everything.
func openTrackers(g *globals, args []string) ([]trackers.Tracker, error) {
	if len(args) == 0 {
		all, err := trackers.List()
		if err != nil && len(all) > 0 {
			g.warn(err)
			err = nil
		}
		return all, err
	}
	t, err := trackers.Open(args[0])
	if errors.Is(err, kernel.ErrNotTracked) {
		return nil, fmt.Errorf("%w: run `dsync-backup track start %s`", err, args[0])
	}
	if err != nil {
		return nil, err
	}
	return []trackers.Tracker{t}, nil
}
