// SPDX-License-Identifier: BSD-2-Clause

package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/kernel/dm"
	"github.com/dsync-backup/dsync-backup/kernel/resume"
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
	var fresh, save bool
	start := &cobra.Command{
		Use:   "start DEVICE",
		Short: "Track which blocks of a device are written, from now on",
		Long: `track start has the kernel mark every block of the device that is written, one
bit for each 4 KiB. It goes on when the command has ended, until track stop or
the end of the machine.

What track stop --save has put away is taken up again, if nothing can have been
written to the device since: the next backup then reads only what was written, also
after a reboot. Otherwise a new history begins, and the next backup compares the
device with the last snapshot once. The start comes before anything that writes to the
device, its mount and its fsck too: see dsync-backup-track@.service.

  --tracker bpf   eBPF programs watch the device as it is, in use or not
  --tracker dm    the kernel module dm-dsync maps the device to /dev/mapper/NAME,
                  which is to be mounted and backed up in its place from then
                  on; the device must not be in use meanwhile
  --tracker auto  dm if the module is there and the device is not in use,
                  else bpf`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return trackStart(cmd.Context(), g, args[0], resume.Options{Options: o, StateDir: g.stateDir, Fresh: fresh})
		},
	}
	start.Flags().StringVar((*string)(&o.Kind), "tracker", "auto", "`kind` of tracker: auto, dm or bpf")
	start.Flags().StringVar(&o.Name, "as", "", "`name` of the mapped device of a dm tracker (default: DEVICE's own name and -dsync)")
	start.Flags().BoolVar(&fresh, "fresh", false, "begin a new history, whatever was saved: after writes that no tracker saw and no file system tells of")
	stop := &cobra.Command{
		Use:   "stop DEVICE",
		Short: "Stop tracking a device; its history ends, or is saved",
		Long: `track stop ends the tracking of a device. A dm tracker's mapped device goes away,
so that it must not be in use; DEVICE is that or the device beneath.

  --save   put its history away for the next track start, with a fingerprint by which
           that sees whether anything was written in between. The device must not
           be in use. With what cannot be vouched for (btrfs, LVM, a file system with
           boot loaders, and more in docs/reboots.md) tracking just ends, and the
           reason is said`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error { return trackStop(cmd.Context(), g, args[0], save) },
	}
	stop.Flags().BoolVar(&save, "save", false, "save the history, so that the next track start can take it up")
	status := &cobra.Command{
		Use:   "status [DEVICE]",
		Short: "Say what is tracked, and whether it can be trusted",
		Args:  cobra.MaximumNArgs(1),
		RunE:  func(cmd *cobra.Command, args []string) error { return trackStatus(cmd.Context(), g, args) },
	}
	cmd.AddCommand(start, stop, status)
	return cmd
}

// started is what `track start --json` says.
type started struct {
	kernel.Status
	Resumed bool   `json:"resumed"`          // the history that was saved goes on
	Reason  string `json:"reason,omitempty"` // why it is not reliable
	Fresh   string `json:"fresh_reason,omitempty"`
}

func trackStart(ctx context.Context, g *globals, path string, o resume.Options) error {
	switch o.Kind {
	case trackers.Auto, trackers.DM, trackers.BPF:
	default:
		return fmt.Errorf("--tracker %q is not one of auto, dm, bpf", o.Kind)
	}
	if o.Name != "" && o.Kind == trackers.BPF {
		return errors.New("--as is the name of a mapped device, which --tracker bpf does not make")
	}
	o.Warn = g.warn
	t, err := resume.Start(ctx, path, o, deviceOpener{})
	if err != nil {
		return sayUse(err, path)
	}
	defer t.Close()
	st, err := counted(ctx, t)
	if err != nil {
		return err
	}
	out := started{Status: st, Resumed: t.Resumed, Reason: st.Reason}
	if t.Why != nil {
		out.Fresh = t.Why.Error()
	}
	if g.json {
		g.printJSON(g.stdout, out)
		return nil
	}
	if t.Why != nil && t.Saved && !o.Fresh {
		g.warn(fmt.Errorf("a new history begins, and the next backup compares: %w", t.Why))
	}
	if g.quiet {
		return nil
	}
	as := ""
	if st.Below != "" {
		as = " as " + st.Device
	}
	fmt.Fprintf(g.stdout, "%s is tracked%s (%s, %s) until track stop, or the machine stops\n", path, as, st.Tracker, st.UUID)
	if t.Resumed {
		fmt.Fprintf(g.stdout, "its history goes on with epoch %d\n", st.Epoch)
	}
	if st.Below != "" {
		fmt.Fprintf(g.stdout, "from now on use %s in its place: mount it, back it up; what is written to %s itself is not seen\n", st.Device, st.Below)
	}
	return nil
}

// sayUse adds to an error that a device is in use by whom.
func sayUse(err error, path string) error {
	if !errors.Is(err, dm.ErrInUse) {
		return err
	}
	if use, useErr := device.InUse(path); useErr == nil && !use.Empty() {
		return fmt.Errorf("%w (%v)", err, use)
	}
	return err
}

// stopped is what `track stop --save --json` says.
type stopped struct {
	Device string `json:"device"`
	Saved  bool   `json:"saved"`
	Reason string `json:"reason,omitempty"` // why not
}

func trackStop(ctx context.Context, g *globals, path string, save bool) error {
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
	if save {
		return trackSave(ctx, g, t, node)
	}
	if err = t.Stop(ctx); err != nil {
		return errors.Join(sayUse(err, node), t.Close())
	}
	if !g.json && !g.quiet {
		fmt.Fprintf(g.stdout, "%s is no longer tracked\n", path)
	}
	return nil
}

func trackSave(ctx context.Context, g *globals, t trackers.Tracker, node string) error {
	why, err := resume.Stop(ctx, t, g.stateDir, deviceOpener{})
	if errors.Is(err, device.ErrInUse) {
		return fmt.Errorf("%w: stop that (unmount it) first, or stop tracking without --save", err)
	}
	if err != nil {
		return sayUse(err, node)
	}
	out := stopped{Device: node, Saved: why == nil}
	if why != nil {
		out.Reason = why.Error()
	}
	switch {
	case g.json:
		g.printJSON(g.stdout, out)
	case why != nil:
		g.warn(fmt.Errorf("%s is no longer tracked, and its history is not saved: %w", node, why))
	case !g.quiet:
		fmt.Fprintf(g.stdout, "%s is no longer tracked; its history is saved for the next track start\n", node)
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
