// SPDX-License-Identifier: BSD-2-Clause

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/user"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/dsync-backup/dsync-backup/snapshot"
	"github.com/dsync-backup/dsync-backup/snapshot/device"
)

type backupFlags struct {
	name      string
	tags      []string
	host      string
	changes   string
	snapshot  string
	maxFreeze time.Duration
	cow       string
	spot      int
	reads     int
	at        string
	parent    string
}

func newBackup(g *globals) *cobra.Command {
	var f backupFlags
	cmd := &cobra.Command{
		Use:   "backup DEVICE",
		Short: "Back up a block device or an image file",
		Long: `backup makes a snapshot of a block device or an image file. It stores what
changed since the last snapshot in this repository:

  --changes auto     by the tracker if one watches the device (track start), else
                     by comparing the device with the last snapshot, else all
  --changes tracker  by the tracker; an error if the device is not tracked
  --changes compare  read the whole device, store what differs
  --changes full     read and store the whole device, as a chain of its own
  --changes FILE     a list of changed ranges, {"offset":BYTES,"length":BYTES} a
                     line, of all that changed since the last snapshot ("-": stdin),
                     or since the one that --parent names: what the list lacks is
                     missing in the snapshot, and nothing shows it

A device that is mounted read-write has no single state to be saved, unless its
file systems are frozen:

  --snapshot auto     dm if the kernel module tracks the device, lvm if it is a
                      logical volume and LVM has room, precopy if eBPF tracks it,
                      else refuse
  --snapshot dm       freeze and suspend it for a moment, in which a copy-on-write
                      snapshot is made (--cow), and read that while it goes on
  --snapshot lvm      have LVM make a snapshot of a logical volume (lvcreate -s), and
                      read that; with or without a tracker
  --snapshot precopy  copy it in use, then what was written meanwhile, until
                      little is left; read that with the file systems frozen
  --snapshot freeze   freeze the file systems while all that changed is read
  --snapshot none     read it as it is: recorded as not a point in time`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error { return runBackup(cmd.Context(), g, &f, args[0]) },
	}
	fl := cmd.Flags()
	fl.StringVar(&f.name, "name", "", "`path` of the device in the snapshot (default: DEVICE)")
	fl.StringArrayVar(&f.tags, "tag", nil, "add a `tag` to the snapshot")
	fl.StringVarP(&f.host, "host", "H", "", "`host` that the snapshot is of (default: this one)")
	fl.StringVar(&f.changes, "changes", "auto", "where the changes come from: auto, tracker, compare, full or a `file`")
	fl.StringVar(&f.snapshot, "snapshot", "auto", "`way` to a point in time: auto, none, freeze, precopy, dm or lvm")
	fl.DurationVar(&f.maxFreeze, "max-freeze", 0, "thaw and fail after this `duration` (default: 1m with freeze, else 10s)")
	fl.StringVar(&f.cow, "cow", "", "`space` for what is overwritten while a snapshot is read: memory:SIZE, a block device, or FILE[:SIZE] for a new file (default: a tenth of the device, in a file in the state directory); with lvm, a SIZE in the volume group (default: a tenth, or what is free)")
	fl.IntVar(&f.spot, "spot-check", snapshot.DefaultSpotCheck, "read at least this `number` of blocks that the tracker says were not written, and compare them; 0: none")
	fl.IntVar(&f.reads, "read-concurrency", device.DefaultParallel, "reads in flight")
	fl.StringVar(&f.parent, "parent", "", "`ID` of the snapshot that a list of ranges was made against, or to compare with (default: the newest of the device on the host)")
	fl.StringVar(&f.at, "time", "", "`time` of the snapshot, as 2006-01-02 15:04:05 (default: now)")
	return cmd
}

func runBackup(ctx context.Context, g *globals, f *backupFlags, path string) (err error) {
	o, err := f.options(g, path)
	if err != nil {
		return err
	}
	if err := checkBeneath(path); err != nil {
		return err
	}
	p := g.progress("backup")
	defer p.end()
	src, err := openSource(ctx, g, f, p, path)
	if err != nil {
		return err
	}
	defer src.device.Close()
	defer src.close()
	o.Device, o.Instant, o.Precopy = src.device, src.instant, src.precopy
	if o.Changes == snapshot.ChangesRanges {
		if o.Ranges, err = readRanges(f.changes, src.device.Size()); err != nil {
			return err
		}
	}
	r, settled, ctx, err := g.openAhead(ctx)
	if err != nil {
		return err
	}
	o.Settled = settled
	if src.device.Kind() == device.Block {
		h, broken, err := openHistory(ctx, g, src.device)
		o.Broken = broken
		switch {
		case err != nil:
			return err
		case h != nil:
			defer h.Close()
			o.History = h
		case o.Changes == snapshot.ChangesTracker && broken != "":
			return fmt.Errorf("%s: %s: use --changes auto", path, broken)
		case o.Changes == snapshot.ChangesTracker:
			return fmt.Errorf("%s is not tracked: run `dsync-backup track start %s`, or use --changes auto", path, path)
		}
	} else if o.Changes == snapshot.ChangesTracker {
		return fmt.Errorf("%s is a file, which cannot be tracked: use --changes auto", path)
	}
	if o.Precopy != nil && o.History == nil {
		if o.Broken == "" {
			o.Broken = "nothing tracks it"
		}
		return fmt.Errorf("%s: %s, so that what is written while it is copied would be missed: run `dsync-backup track start %s`, or say --snapshot freeze", path, o.Broken, path)
	}
	o.Progress = func(pr snapshot.Progress) { p.update(pr.Phase, pr.Done, pr.Total) }
	o.Warn = g.warn
	sum, err := snapshot.Backup(ctx, r, o)
	if err != nil {
		return refusedOr(ctx, settled, err)
	}
	p.end()
	if h, ok := o.History.(*history); ok {
		// The snapshot is there: what fails now costs a compare scan some day.
		if err := h.hold(ctx, g, r.ID(), sum); err != nil {
			g.warn(fmt.Errorf("note in the epoch log what this repository has: %w", err))
		}
	}
	return g.printBackup(sum)
}

// causeOf says why a context ended, where that is why something failed.
func causeOf(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil && errors.Is(err, context.Canceled) && !errors.Is(cause, context.Canceled) {
		return cause
	}
	return err
}

func (f *backupFlags) options(g *globals, path string) (o snapshot.Options, err error) {
	name := f.name
	if name == "" {
		if name, err = absolute(path); err != nil {
			return o, err
		}
	}
	if o.Name, err = snapshot.CleanName(name); err != nil {
		return o, err
	}
	o.Tags, o.Parallel, o.Time, o.SpotCheck = f.tags, f.reads, time.Now(), f.spot
	if f.at != "" {
		if o.Time, err = time.ParseInLocation("2006-01-02 15:04:05", f.at, time.Local); err != nil {
			return o, fmt.Errorf("--time: %w", err)
		}
	}
	if o.Host = f.host; o.Host == "" {
		if o.Host, err = os.Hostname(); err != nil {
			return o, err
		}
	}
	switch f.changes {
	case "auto":
	case "tracker", "compare", "full":
		o.Changes = snapshot.Changes(f.changes)
	default:
		o.Changes = snapshot.ChangesRanges
	}
	if o.Parent = f.parent; o.Parent != "" && o.Changes != snapshot.ChangesRanges && o.Changes != snapshot.ChangesCompare {
		return o, fmt.Errorf("--parent is for --changes compare or a list of ranges, and not for %s", f.changes)
	}
	if u, err := user.Current(); err == nil {
		uid, _ := strconv.ParseUint(u.Uid, 10, 32)
		gid, _ := strconv.ParseUint(u.Gid, 10, 32)
		o.User = snapshot.User{Name: u.Username, UID: uint32(uid), GID: uint32(gid)}
	}
	return o, nil
}

func (g *globals) printBackup(s *snapshot.Summary) error {
	if g.json {
		g.printJSON(g.stdout, s)
		return nil
	}
	w := g.stdout
	if s.FallbackReason != "" {
		did := "compared with the last snapshot"
		if s.Changes == snapshot.ChangesFull {
			did = "backed up in full"
		}
		fmt.Fprintf(w, "the tracker could not be used, so the device was read and %s: %s\n", did, s.FallbackReason)
	}
	fmt.Fprintf(w, "%s: %s, changes: %s, point in time: %s\n", s.Device, size(s.DeviceSize), s.Changes, s.PointInTime)
	fmt.Fprintf(w, "read %s, changed %s, new data %s (stored %s), metadata %s, layers %d, %.1f s\n",
		size(s.BytesRead), size(s.DirtyBytes), size(s.DataAdded), size(s.DataAddedPacked), size(s.MetadataAddedPacked), s.Layers, s.DurationSeconds)
	if s.CopiedForwardBytes > 0 {
		fmt.Fprintf(w, "copied forward %s (stored %s), to free worn blobs\n", size(s.CopiedForwardBytes), size(s.CopiedForwardPacked))
	}
	if s.FreezeSeconds > 0 {
		fmt.Fprintf(w, "the file systems were frozen for %.2f s", s.FreezeSeconds)
		if s.Rounds > 1 {
			fmt.Fprintf(w, ", for the last of %d copies", s.Rounds)
		}
		fmt.Fprintln(w)
	}
	fmt.Fprintf(w, "snapshot %s saved\n", s.SnapshotID.Str())
	return nil
}
