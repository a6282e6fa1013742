// SPDX-License-Identifier: BSD-2-Clause

package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/dsync-backup/dsync-backup/restore"
	"github.com/dsync-backup/dsync-backup/snapshot/stream"
)

// streamBuffer is that of what is read from a pipe, in bytes.
const streamBuffer = 256 << 10

type mergeFlags struct {
	restore.MergeOptions
	sums     bool
	size     int64
	position bool
	serve    bool
}

func newMerge(g *globals) *cobra.Command {
	var f mergeFlags
	cmd := &cobra.Command{
		Use:   "merge TARGET",
		Short: "Apply a stream of extract from standard input to a device or a file",
		Long: `merge applies a stream of extract to a block device or an image file, and prints
the position that it is at once everything is durable: have it acknowledged
with extract --commit. A stream that does not go on from the target's position
is refused. A merge that is cut short leaves the target incomplete, and says
so; the same changes sent again complete it.

A target that is mounted, in use or too small is refused; one that holds what no
merge left there needs --force.

  merge --position TARGET  print the position that the target is at
  merge --sums TARGET      write the sums of the target's blocks to standard
                           output, for extract --changes compare --sums FILE`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			f.Target, f.StateDir, f.Serving = args[0], g.stateDir, f.serve
			switch {
			case f.serve:
				return runServe(cmd.Context(), g, &f)
			case f.position:
				return runPosition(cmd.Context(), g, &f)
			case f.sums:
				return runSums(cmd.Context(), g, &f)
			}
			return runMerge(cmd.Context(), g, &f)
		},
	}
	fl := cmd.Flags()
	fl.BoolVar(&f.Force, "force", false, "overwrite a target that holds what no merge left there")
	fl.StringVar(&f.Spool, "spool", "", "keep the stream in this `folder` until it is whole, and only then apply it")
	fl.IntVar(&f.Parallel, "write-concurrency", 16, "writes in flight")
	fl.BoolVar(&f.position, "position", false, "print the position that the target is at, and end")
	fl.BoolVar(&f.sums, "sums", false, "write the sums of the target's blocks, and end")
	fl.Int64Var(&f.size, "size", -1, "`bytes` of the target to sum (default: all)")
	fl.BoolVar(&f.serve, "serve", false, "talk to sync")
	_ = fl.MarkHidden("serve")
	return cmd
}

func runMerge(ctx context.Context, g *globals, f *mergeFlags) error {
	if term.IsTerminal(int(os.Stdin.Fd())) {
		return errors.New("the stream comes from standard input: write `dsync-backup extract DEVICE | dsync-backup merge TARGET`")
	}
	p := g.progress("merge")
	defer p.end()
	f.Progress = func(pr restore.Progress) { p.update(pr.Phase, pr.Done, pr.Total) }
	m, err := restore.OpenMerge(ctx, f.MergeOptions)
	if err != nil {
		return err
	}
	defer m.Close()
	defer unblock(ctx)()
	res, err := m.Apply(ctx, bufio.NewReaderSize(os.Stdin, streamBuffer))
	if err != nil {
		return causeOf(ctx, err)
	}
	p.end()
	if g.json {
		g.printJSON(g.stdout, res)
		return nil
	}
	if !g.quiet {
		fmt.Fprintf(g.stdout, "%s: received %s, wrote %s, made %s zeros, %.1f s\n",
			res.Target, size(res.BytesReceived), size(res.BytesWritten), size(res.BytesZeroed), res.Duration)
	}
	fmt.Fprintf(g.stdout, "position %v\n", m.Position())
	return nil
}

// unblock makes reads from standard input end when ctx is done.
func unblock(ctx context.Context) (stop func() bool) {
	return context.AfterFunc(ctx, func() { os.Stdin.Close() })
}

func runPosition(ctx context.Context, g *globals, f *mergeFlags) error {
	m, err := restore.OpenMerge(ctx, f.MergeOptions)
	if err != nil {
		return err
	}
	defer m.Close()
	h := m.Hello()
	if g.json {
		g.printJSON(g.stdout, h)
		return nil
	}
	if h.Reason != "" {
		g.warn(fmt.Errorf("%s: %s", h.Target, h.Reason))
	}
	if h.Incomplete {
		g.warn(fmt.Errorf("%s: %w", h.Target, restore.ErrIncomplete))
	}
	fmt.Fprintln(g.stdout, m.Position())
	return nil
}

func runSums(ctx context.Context, g *globals, f *mergeFlags) error {
	if term.IsTerminal(int(os.Stdout.Fd())) {
		return errors.New("the sums are not for a terminal: write them to a file")
	}
	eg := *g
	eg.stdout = g.stderr
	p := eg.progress("merge")
	defer p.end()
	f.Progress = func(pr restore.Progress) { p.update(pr.Phase, pr.Done, pr.Total) }
	m, err := restore.OpenMerge(ctx, f.MergeOptions)
	if err != nil {
		return err
	}
	defer m.Close()
	out := bufio.NewWriterSize(os.Stdout, streamBuffer)
	write, err := m.Sums(ctx, f.size)
	if err == nil {
		err = write(ctx, out)
	}
	if err != nil {
		return causeOf(ctx, err)
	}
	return out.Flush()
}

// runServe is the target's end of sync: what goes wrong is said in the reply.
func runServe(ctx context.Context, g *globals, f *mergeFlags) error {
	m, err := restore.OpenMerge(ctx, f.MergeOptions)
	if err != nil {
		return errors.Join(stream.Send(os.Stdout, stream.Hello{Protocol: stream.ProtocolVersion, Error: err.Error()}), errSaid)
	}
	defer m.Close()
	if err := stream.Send(os.Stdout, m.Hello()); err != nil {
		return err
	}
	defer unblock(ctx)()
	in := bufio.NewReaderSize(os.Stdin, streamBuffer)
	var req stream.Request
	if err := stream.Receive(in, &req); err != nil {
		if errors.Is(err, io.ErrUnexpectedEOF) {
			err = errSaid // the source says why it gave up
		}
		return err
	}
	// While the source works on the first sums, the others are made: what it
	// sends is applied meanwhile, which changes only what was summed.
	sctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	sums := make(chan error, 1)
	if req.Sums < 0 {
		sums <- nil
	} else {
		write, err := m.Sums(ctx, req.Sums)
		if err != nil {
			return err
		}
		go func() { sums <- write(sctx, os.Stdout) }()
	}
	res, err := m.Apply(ctx, in)
	if err != nil {
		cancel(err)
	}
	if sumErr := <-sums; sumErr != nil {
		return errSaid // within the sums
	}
	if err != nil {
		return errors.Join(stream.Send(os.Stdout, stream.Reply{Error: err.Error()}), errSaid)
	}
	return stream.Send(os.Stdout, stream.Reply{Position: m.Position().At, Written: res.BytesWritten, Zeroed: res.BytesZeroed})
}
