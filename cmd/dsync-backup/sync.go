// SPDX-License-Identifier: BSD-2-Clause

package main

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/snapshot"
	"github.com/dsync-backup/dsync-backup/snapshot/extract"
	"github.com/dsync-backup/dsync-backup/snapshot/stream"
)

// replyWait is how long the target is given for its last word after something
// failed.
const replyWait = 10 * time.Second

type syncFlags struct {
	streamFlags
	remote
	force bool
	spool string
}

func newSync(g *globals) *cobra.Command {
	var f syncFlags
	cmd := &cobra.Command{
		Use:   "sync DEVICE TARGET",
		Short: "Bring another device or image file up to date with a device",
		Long: `sync is extract and merge in one command: TARGET is a path, or
ssh://[USER@]HOST[:PORT]/PATH, where dsync-backup is run by ssh. It asks the
target for its position, sends what changed since, and notes what the target
acknowledges once that is durable. Whatever is lost on the way, the next sync
sends everything since.

  --changes auto     what changed since the target's position; everything if it
                     holds nothing; if neither is known, what differs
  --changes tracker  an error where auto would compare
  --changes compare  both ends read their device, and what differs is sent
  --changes full     everything

A target that holds what no merge left there needs --force.`,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error { return runSync(cmd.Context(), g, &f, args[0], args[1]) },
	}
	f.register(cmd)
	fl := cmd.Flags()
	fl.BoolVar(&f.force, "force", false, "overwrite a target that holds what no merge left there")
	fl.StringVar(&f.spool, "spool", "", "have the target keep the stream in this `folder` until it is whole")
	fl.StringVar(&f.ssh, "ssh-command", "ssh", "`command` in place of ssh, with its options")
	fl.StringVar(&f.program, "remote-command", "dsync-backup", "`command` of dsync-backup on the remote host")
	fl.StringVar(&f.stateDir, "remote-state-dir", "", "state `folder` on the remote host (default: its own)")
	return cmd
}

// peer is the target's end of a sync, in a process of its own.
type peer struct {
	cmd   *exec.Cmd
	in    io.WriteCloser
	out   *bufio.Reader
	hello stream.Hello
	asked bool
}

func startPeer(cmd *exec.Cmd) (*peer, error) {
	p := &peer{cmd: cmd}
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, fmt.Errorf("start the target's end: %w", err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, fmt.Errorf("start the target's end: %w", err)
	}
	p.in, p.out = in, bufio.NewReaderSize(out, streamBuffer)
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start the target's end: %w", err)
	}
	return p, nil
}

// greet hears what the target is.
func (p *peer) greet() error {
	if err := stream.Receive(p.out, &p.hello); err != nil {
		return fmt.Errorf("the target's end did not start (%s): %w", p.cmd.Args[0], err)
	}
	if p.hello.Error != "" {
		return fmt.Errorf("the target's end says: %s", p.hello.Error)
	}
	if p.hello.Protocol != stream.ProtocolVersion {
		return fmt.Errorf("the target's end speaks version %d of the protocol, and this one %d: use the same release at both ends", p.hello.Protocol, stream.ProtocolVersion)
	}
	return nil
}

// ask sends the request, once.
func (p *peer) ask(sums int64) error {
	p.asked = true
	return stream.Send(p.in, stream.Request{Sums: sums})
}

// Write sends a part of the stream.
func (p *peer) Write(b []byte) (int, error) {
	if !p.asked {
		if err := p.ask(-1); err != nil {
			return 0, err
		}
	}
	return p.in.Write(b)
}

// sums asks for the target's sums. The same reader gives the reply.
func (p *peer) sums(_ context.Context, size int64) (io.Reader, error) { return p.out, p.ask(size) }

// reply hears the target's last word.
func (p *peer) reply() (r stream.Reply, err error) {
	if err = stream.Receive(p.out, &r); err == nil && r.Error != "" {
		err = fmt.Errorf("the target's end says: %s", r.Error)
	}
	return r, err
}

// lost says why the stream could not be sent: what the target says counts for
// more than that it did not listen any more.
func (p *peer) lost(err error) error {
	if !errors.Is(err, unix.EPIPE) && !errors.Is(err, os.ErrClosed) {
		return err
	}
	timer := time.AfterFunc(replyWait, func() { _ = p.cmd.Process.Kill() })
	defer timer.Stop()
	if _, said := p.reply(); said != nil && !errors.Is(said, io.ErrUnexpectedEOF) {
		return said
	}
	return errors.New("the connection to the target was lost: sync again, and all that is not acknowledged is sent")
}

// close ends the process, which has nothing more to do.
func (p *peer) close() error {
	_ = p.in.Close()
	timer := time.AfterFunc(replyWait, func() { _ = p.cmd.Process.Kill() })
	defer timer.Stop()
	_, _ = io.Copy(io.Discard, p.out)
	return p.cmd.Wait()
}

func runSync(ctx context.Context, g *globals, f *syncFlags, path, target string) (err error) {
	cmd, local, err := f.command(ctx, g, target, f.force, f.spool)
	if err != nil {
		return err
	}
	sg := *g
	if local != "" && g.compression == "auto" {
		sg.compression = "off" // it would cost more than it saves
	}
	progress := g.progress("sync")
	defer progress.end()
	s, err := openStreamSource(ctx, &sg, &f.streamFlags, progress, path, local)
	if err != nil {
		return err
	}
	defer s.close()
	p, err := startPeer(cmd)
	if err != nil {
		return err
	}
	defer func() { _ = p.close() }() // its last word was heard, or what failed is known
	// Nothing waits for the other end any more when this one is interrupted.
	defer context.AfterFunc(ctx, func() { _ = p.in.Close() })()
	if err := p.greet(); err != nil {
		return err
	}
	o := s.options
	if err := f.choose(&o, p.hello); err != nil {
		return err
	}
	o.Sums, o.Abort = p.sums, func() { _ = p.in.Close() }
	if o.Changes == snapshot.ChangesTracker {
		o.Sums = nil
	}
	res, err := extract.Send(ctx, p, o)
	if err != nil {
		return p.lost(causeOf(ctx, err))
	}
	reply, err := p.reply()
	if err != nil {
		return fmt.Errorf("%w: what was sent is not acknowledged, and is sent again by the next sync", err)
	}
	var at kernel.Position
	if res.Position != nil {
		at = *res.Position
	}
	if reply.Position != at {
		return fmt.Errorf("the target says that it is at %v, and was sent up to %v", reply.Position, at)
	}
	if err := s.hold(ctx, target, target, res.Stream.String(), at); err != nil {
		return err
	}
	progress.end()
	printSync(g, target, res, reply)
	return nil
}

// choose decides what is sent to the target as it is.
func (f *syncFlags) choose(o *extract.Options, h stream.Hello) error {
	unknown := !h.Known && (h.Holds != "" || h.Reason != "")
	if unknown && !f.force {
		return fmt.Errorf("the target %s %s: it is overwritten only with --force", h.Target, cmp.Or(h.Reason, "has "+h.Holds+", and no merge left that there"))
	}
	switch {
	case o.Changes == snapshot.ChangesFull, o.Changes == snapshot.ChangesCompare:
	case h.Known:
		o.Base = &extract.Base{Position: h.Position, Partly: h.Partly}
		if o.Changes == "" && h.Position.IsZero() {
			o.Changes = snapshot.ChangesCompare
		}
	case unknown && o.Changes == "":
		o.Changes = snapshot.ChangesCompare
	case o.Changes == snapshot.ChangesTracker:
		return fmt.Errorf("the target %s is at no position: use --changes auto", h.Target)
	}
	return nil
}

func printSync(g *globals, target string, r *extract.Result, reply stream.Reply) {
	if g.json {
		g.printJSON(g.stdout, struct {
			*extract.Result
			Target  string `json:"target"`
			Written int64  `json:"bytes_written"`
			Zeroed  int64  `json:"bytes_zeroed"`
		}{r, target, reply.Written, reply.Zeroed})
		return
	}
	printExtract(g, r)
	if !g.quiet {
		fmt.Fprintf(g.stdout, "%s: wrote %s, made %s zeros; acknowledged\n", target, size(reply.Written), size(reply.Zeroed))
	}
}
