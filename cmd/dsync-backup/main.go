// SPDX-License-Identifier: BSD-2-Clause

// Command dsync-backup backs up block devices into a restic repository, in
// time and bytes proportional to what was written since the last backup.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/snapshot/freeze"
)

// version is set by the Makefile.
var version = "0.1.0-dev"

// Exit codes, as restic's.
const (
	exitDone         = 0
	exitFailed       = 1
	exitNoRepository = 10
	exitLocked       = 11
	exitPassword     = 12
	exitInterrupted  = 130
)

// heldOutput bounds what is held back of our output while a file system is
// frozen, in bytes.
const heldOutput = 1 << 20

// gcPercent is how much the heap may grow before it is collected: with it a full
// backup stays under 300 MiB, and takes no longer.
const gcPercent = 30

// errSaid ends a command that worked and found a difference: exit code 1
// without a further message.
var errSaid = errors.New("")

func main() {
	if freeze.IsWatchdog() {
		os.Exit(freeze.WatchdogMain())
	}
	// Most of the memory is buffers that are used again: the collector has
	// little to do, and would only let the heap grow to twice what is in use.
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(gcPercent)
	}
	os.Exit(run(arguments(os.Args)))
}

// arguments are those of the command, which may also be called by the names of
// the two that make a pipeline.
func arguments(args []string) []string {
	switch filepath.Base(args[0]) {
	case "dmextract":
		return append([]string{"extract"}, args[1:]...)
	case "dmmerge":
		return append([]string{"merge"}, args[1:]...)
	}
	return args[1:]
}

func run(args []string) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	// Whose lock it is, restic asks a process with SIGHUP, which must not end it. Nor
	// must a reader of what we print that goes away, before the lock is removed.
	signal.Notify(make(chan os.Signal, 1), unix.SIGHUP, unix.SIGPIPE)
	// What we print while a file system is frozen waits for the thaw: whoever
	// reads it may be writing to that file system.
	stdout := freeze.NewHoldOutput(&pipe{os.Stdout, cancel}, heldOutput)
	stderr := freeze.NewHoldOutput(os.Stderr, heldOutput)
	// After the first signal the second one kills.
	context.AfterFunc(ctx, stop)

	g := &globals{stdout: stdout, stderr: stderr}
	root := newRoot(g)
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	g.close()
	if err == nil {
		return exitDone // what it was asked for is done, whoever reads of it
	}
	code := exitCode(ctx, err)
	if !errors.Is(err, errSaid) {
		// The flags of an unknown command were not parsed.
		report(stderr, g.json || slices.Contains(args, "--json"), code, err)
	}
	return code
}

// pipe is the standard output. When whoever reads it has gone away the command
// ends, as by an interruption.
type pipe struct {
	io.Writer
	end context.CancelCauseFunc
}

var errUnread = errors.New("nobody reads the output any more")

// Write implements [io.Writer].
func (p *pipe) Write(b []byte) (int, error) {
	n, err := p.Writer.Write(b)
	if errors.Is(err, unix.EPIPE) {
		p.end(errUnread)
	}
	return n, err
}

func exitCode(ctx context.Context, err error) int {
	switch {
	case errors.Is(context.Cause(ctx), errUnread):
		return exitFailed
	case ctx.Err() != nil:
		return exitInterrupted
	case errors.Is(err, repo.ErrNoRepository):
		return exitNoRepository
	case errors.Is(err, repo.ErrLocked):
		return exitLocked
	case errors.Is(err, repo.ErrWrongPassword):
		return exitPassword
	}
	return exitFailed
}

// report says in one line what failed.
func report(w io.Writer, asJSON bool, code int, err error) {
	text := strings.Join(strings.FieldsFunc(err.Error(), func(r rune) bool { return r == '\n' }), "; ")
	if code == exitInterrupted {
		text = "interrupted: " + text
	}
	if asJSON {
		_ = json.NewEncoder(w).Encode(map[string]any{"message_type": "exit_error", "code": code, "message": text})
		return
	}
	fmt.Fprintln(w, "dsync-backup:", text)
}

func newRoot(g *globals) *cobra.Command {
	root := &cobra.Command{
		Use:   "dsync-backup",
		Short: "Incremental backups of block devices into a restic repository",
		Long: `dsync-backup backs up Linux block devices into an ordinary restic repository,
in time and bytes proportional to what was written since the last backup.

EXIT STATUS
  0 done, 1 failed, 10 no repository, 11 cannot lock, 12 wrong password,
  130 interrupted`,
		Version:       version + " (compresses by " + repo.Encoder + ")",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.CompletionOptions.HiddenDefaultCmd = true
	g.register(root.PersistentFlags())
	root.AddCommand(
		newInit(g), newTrack(g), newBackup(g), newSnapshots(g), newLs(g),
		newExtract(g), newMerge(g), newSync(g),
		newRestore(g), newDump(g), newVerify(g),
		newForget(g), newPrune(g), newCheck(g), newRepair(g), newUnlock(g),
	)
	return root
}
