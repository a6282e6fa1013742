// SPDX-License-Identifier: BSD-2-Clause

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/kernel/epochlog"
	"github.com/dsync-backup/dsync-backup/restore"
	"github.com/dsync-backup/dsync-backup/snapshot"
	"github.com/dsync-backup/dsync-backup/snapshot/device"
	"github.com/dsync-backup/dsync-backup/snapshot/extract"
	"github.com/dsync-backup/dsync-backup/snapshot/stream"
)

// streamFlags are those that extract and sync share.
type streamFlags struct {
	changes   string
	snapshot  string
	maxFreeze time.Duration
	reads     int
}

func (f *streamFlags) register(cmd *cobra.Command) {
	fl := cmd.Flags()
	fl.StringVar(&f.changes, "changes", "auto", "where the changes come from: auto, tracker, compare or full")
	fl.StringVar(&f.snapshot, "snapshot", "auto", "`way` to a point in time, as of backup")
	fl.DurationVar(&f.maxFreeze, "max-freeze", 0, "thaw and fail after this `duration` (default: as of backup)")
	fl.IntVar(&f.reads, "read-concurrency", device.DefaultParallel, "reads in flight")
}

type extractFlags struct {
	streamFlags
	since  string
	to     string
	sums   string
	commit string
}

func newExtract(g *globals) *cobra.Command {
	var f extractFlags
	cmd := &cobra.Command{
		Use:   "extract DEVICE | ssh HOST dsync-backup merge TARGET",
		Short: "Write what changed on a device as a stream to standard output",
		Long: `extract writes a stream for merge to standard output: what was written to a
tracked device since the position that the target is at.

  --changes auto     what changed since that position; everything the first time
  --changes tracker  the same, but never everything
  --changes compare  what differs from the sums in the file --sums, which come from
                     merge --sums TARGET
  --changes full     everything

The target's position is the one last acknowledged with --commit under the name
--to, or the one given with --since. merge prints the position that its target
is at. Until it is acknowledged, every stream holds what the one before did.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if f.commit != "" {
				return runCommit(cmd.Context(), g, &f, args[0])
			}
			return runExtract(cmd.Context(), g, &f, args[0])
		},
	}
	f.register(cmd)
	fl := cmd.Flags()
	fl.StringVar(&f.since, "since", "", "send what changed since this `position`, as merge prints it")
	fl.StringVar(&f.to, "to", "default", "`name` of the target, of which the acknowledged position is kept")
	fl.StringVar(&f.sums, "sums", "", "`file` with the target's sums, for --changes compare")
	fl.StringVar(&f.commit, "commit", "", "send nothing, and note that the target is at this `position`")
	return cmd
}

// encoder makes the encoder of --compression. A stream is made to be fast: auto
// is the fastest.
func (g *globals) encoder() (*zstd.Encoder, error) {
	levels := map[string]zstd.EncoderLevel{
		"auto": zstd.SpeedFastest, "fastest": zstd.SpeedFastest, "better": zstd.SpeedBetterCompression, "max": zstd.SpeedBestCompression,
	}
	level, ok := levels[g.compression]
	if g.compression == "off" {
		return nil, nil
	}
	if !ok {
		return nil, fmt.Errorf("compression %q is not one of auto, off, fastest, better, max", g.compression)
	}
	return stream.NewEncoder(level, runtime.GOMAXPROCS(0))
}

// holderOf names what is kept of a target in the epoch log.
func holderOf(name string) string { return "stream:" + name }

func runExtract(ctx context.Context, g *globals, f *extractFlags, path string) error {
	if term.IsTerminal(int(os.Stdout.Fd())) {
		return errors.New("the stream is not for a terminal: write `dsync-backup extract DEVICE | ssh HOST dsync-backup merge TARGET`")
	}
	// Standard output is the stream: all else goes to standard error.
	eg := *g
	eg.stdout = g.stderr
	p := eg.progress("extract")
	defer p.end()
	s, err := openStreamSource(ctx, &eg, &f.streamFlags, p, path, "/proc/self/fd/1")
	if err != nil {
		return err
	}
	defer s.close()
	o := s.options
	switch {
	case f.sums != "":
		file, err := os.Open(f.sums)
		if err != nil {
			return fmt.Errorf("open the target's sums: %w", err)
		}
		defer file.Close()
		o.Sums = func(context.Context, int64) (io.Reader, error) { return file, nil }
		if f.changes == "auto" {
			o.Changes = snapshot.ChangesCompare
		}
	case f.since != "":
		at, err := restore.ParsePosition(f.since)
		if err != nil {
			return fmt.Errorf("--since: %w", err)
		}
		o.Base = &extract.Base{Position: at.At, Partly: at.Partly}
	default:
		o.Base, err = s.acknowledged(g, f.to)
		if err != nil {
			return err
		}
	}
	if o.Changes == snapshot.ChangesTracker && o.Base == nil {
		return fmt.Errorf("no target named %q is known to hold anything of %s: use --changes auto, or name its position with --since", f.to, path)
	}
	res, err := extract.Send(ctx, os.Stdout, o)
	if err != nil {
		return lostReader(causeOf(ctx, err))
	}
	p.end()
	printExtract(&eg, res)
	return nil
}

func lostReader(err error) error {
	if errors.Is(err, unix.EPIPE) {
		return errors.New("what reads the stream has ended: see what it says, and send again")
	}
	return err
}

func printExtract(g *globals, r *extract.Result) {
	if g.json {
		g.printJSON(g.stdout, r)
		return
	}
	if g.quiet {
		return
	}
	if r.FallbackReason != "" {
		fmt.Fprintf(g.stdout, "the tracker could not be used, so the devices were compared: %s\n", r.FallbackReason)
	}
	fmt.Fprintf(g.stdout, "%s: %s, changes: %s, point in time: %s\n", r.Device, size(r.DeviceSize), r.Changes, r.PointInTime)
	fmt.Fprintf(g.stdout, "read %s, data %s, zeros %s, sent %s, %.1f s", size(r.BytesRead), size(r.DataBytes), size(r.ZeroBytes), size(r.BytesSent), r.Duration)
	if r.FreezeSeconds > 0 {
		fmt.Fprintf(g.stdout, ", frozen for %.2f s", r.FreezeSeconds)
	}
	fmt.Fprintln(g.stdout)
	if r.Position != nil {
		fmt.Fprintf(g.stdout, "leads to position %v\n", *r.Position)
	}
}

// streamSource is a device that is open to be sent.
type streamSource struct {
	options extract.Options
	history *history
	source  *source
}

// openStreamSource opens a device. The target, if it is a local path, must not
// lie on the device: while that is frozen, it could not be written to.
func openStreamSource(ctx context.Context, g *globals, f *streamFlags, p *progress, path, target string) (*streamSource, error) {
	o := extract.Options{Parallel: f.reads, Warn: g.warn}
	switch f.changes {
	case "auto":
	case "tracker", "compare", "full":
		o.Changes = snapshot.Changes(f.changes)
	default:
		return nil, fmt.Errorf("--changes %q is not one of auto, tracker, compare, full", f.changes)
	}
	if err := checkBeneath(path); err != nil {
		return nil, err
	}
	if err := checkApart(path, target); err != nil {
		return nil, err
	}
	var err error
	if o.Encoder, err = g.encoder(); err != nil {
		return nil, err
	}
	sg := *g
	sg.repo = "s3:http://localhost/none" // there is none that could be frozen
	src, err := openSource(ctx, &sg, &backupFlags{snapshot: f.snapshot, maxFreeze: f.maxFreeze, reads: f.reads}, p, path)
	if err != nil {
		return nil, err
	}
	s := &streamSource{source: src}
	if s.history, err = s.track(ctx, g, &o, path); err != nil {
		s.close()
		return nil, err
	}
	host, err := os.Hostname()
	if err != nil {
		s.close()
		return nil, err
	}
	o.Device, o.Instant, o.Precopy = src.device, src.instant, src.precopy
	o.Source = host + ":" + src.device.Path()
	o.Progress = func(pr snapshot.Progress) { p.update(pr.Phase, pr.Done, pr.Total) }
	s.options = o
	return s, nil
}

// track finds the device's tracker, if it has one.
func (s *streamSource) track(ctx context.Context, g *globals, o *extract.Options, path string) (*history, error) {
	d := s.source.device
	if d.Kind() != device.Block {
		if o.Changes == snapshot.ChangesTracker {
			return nil, fmt.Errorf("%s is a file, which cannot be tracked: use --changes auto", path)
		}
		return nil, nil
	}
	h, broken, err := openHistory(ctx, g, d)
	if err != nil {
		return nil, err
	}
	if o.Broken = broken; h != nil {
		o.History = h
		return h, nil
	}
	if o.Changes == snapshot.ChangesTracker || s.source.precopy != nil {
		if broken == "" {
			broken = "nothing tracks it"
		}
		return nil, fmt.Errorf("%s: %s: run `dsync-backup track start %s` first", path, broken, path)
	}
	return nil, nil
}

func (s *streamSource) close() {
	if s.history != nil {
		s.history.Close()
	}
	s.source.close()
	s.source.device.Close()
}

// acknowledged is the position that was acknowledged last under a name; nil if
// none ever was.
func (s *streamSource) acknowledged(g *globals, name string) (*extract.Base, error) {
	if s.history == nil {
		return nil, nil
	}
	uuid := s.history.tracker.UUID()
	dirs, err := os.ReadDir(filepath.Join(g.stateDir, "trackers"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("look for acknowledged positions: %w", err)
	}
	var old *extract.Base
	for _, dir := range dirs {
		var u kernel.UUID
		if u.UnmarshalText([]byte(dir.Name())) != nil {
			continue
		}
		holders, err := epochlog.Holders(g.stateDir, u)
		if err != nil {
			return nil, err
		}
		for _, h := range holders {
			if h.Repository != holderOf(name) {
				continue
			}
			base := &extract.Base{Position: h.Position}
			if u == uuid {
				return base, nil
			}
			if h.Name == s.source.device.RealPath() {
				old = base // of an earlier history: it cannot be bridged, and is said to be so
			}
		}
	}
	return old, nil
}

// hold notes that a target is at a position: what it needs for the next stream
// is kept.
func (s *streamSource) hold(ctx context.Context, name, location, id string, p kernel.Position) (err error) {
	h := s.history
	if h == nil || p.IsZero() {
		return nil
	}
	if err := h.Relock(ctx); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, h.Unlock()) }()
	return h.Hold(epochlog.Holder{
		Repository: holderOf(name), Location: location, Name: s.source.device.RealPath(), Snapshot: id, Position: p, Time: time.Now(),
	})
}

// runCommit notes what a target has acknowledged.
func runCommit(ctx context.Context, g *globals, f *extractFlags, path string) error {
	at, err := restore.ParsePosition(f.commit)
	if err != nil {
		return fmt.Errorf("--commit: %w", err)
	}
	if at.Incomplete {
		return fmt.Errorf("--commit: the target is incomplete, at %v: send with --since first", at)
	}
	d, err := device.Open(path, device.Options{})
	if err != nil {
		return err
	}
	defer d.Close()
	h, broken, err := openHistory(ctx, g, d)
	switch {
	case err != nil:
		return err
	case h == nil:
		return fmt.Errorf("commit: %s is not tracked: %s", path, broken)
	}
	defer h.Close()
	if _, err := h.Since(ctx, at.At); err != nil {
		return fmt.Errorf("commit %v: %w", at, err)
	}
	s := &streamSource{history: h, source: &source{device: d}}
	if err := s.hold(ctx, f.to, f.to, "", at.At); err != nil {
		return err
	}
	if g.json {
		g.printJSON(g.stdout, map[string]any{"message_type": "summary", "device": path, "to": f.to, "position": at.At})
	} else if !g.quiet {
		fmt.Fprintf(g.stdout, "%s: the target %q is at %v\n", path, f.to, at)
	}
	return nil
}

// checkApart refuses a local target that is the device itself, or lies on it.
func checkApart(path, target string) error {
	if target == "" {
		return nil
	}
	src, err := os.Stat(path)
	if err != nil {
		return fmt.Errorf("look at source: %w", err)
	}
	dst, err := os.Stat(target)
	if err == nil && os.SameFile(src, dst) {
		return fmt.Errorf("%s is source and target at once", path)
	}
	if err == nil && !dst.Mode().IsRegular() {
		return nil
	}
	if src.Mode().IsRegular() {
		return nil
	}
	if err != nil {
		target = filepath.Dir(target)
	}
	if target, err = filepath.EvalSymlinks(target); err != nil {
		return fmt.Errorf("look at target: %w", err)
	}
	use, err := device.InUse(path)
	if err != nil {
		return err
	}
	on, lies, err := device.LiesOn(target, use.Mounts)
	if err != nil {
		return err
	}
	if lies {
		return fmt.Errorf("%s lies on %s, a file system of the very device %s: write it elsewhere", target, on.Path, path)
	}
	return nil
}
