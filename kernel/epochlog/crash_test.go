// SPDX-License-Identifier: BSD-2-Clause

package epochlog

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel/trackers"
)

const envChild = "DSYNC_TEST_EPOCHLOG_CHILD" // device, state directory, and how far to go

func TestMain(m *testing.M) {
	if spec := os.Getenv(envChild); spec != "" {
		if err := childLife(strings.Split(spec, "\n")); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// childLife backs up without end, or dies on the way.
func childLife(spec []string) error {
	device, stateDir, end := spec[0], spec[1], spec[2]
	ctx := context.Background()
	tr, err := trackers.Open(device)
	if err != nil {
		return err
	}
	die := func() { _ = unix.Kill(os.Getpid(), unix.SIGKILL); select {} }
	for {
		s, err := Open(ctx, tr, stateDir)
		if err != nil {
			return err
		}
		e, err := s.Rotate(ctx)
		if err != nil {
			return err
		}
		switch end {
		case "rotated":
			die()
		case "logged":
			if err := s.log.write(e); err != nil {
				return err
			}
			die()
		}
		if err := errors.Join(s.Unlock(), s.Relock(ctx), s.Commit(ctx), s.Unlock()); err != nil {
			return err
		}
	}
}

func child(t *testing.T, d *disk, dir, end string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), envChild+"="+strings.Join([]string{d.device, dir, end}, "\n"))
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return cmd
}

func wantKilled(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	var exit *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &exit) || exit.ExitCode() != -1 {
		t.Fatalf("child was not killed: %v", err)
	}
}

func TestNextSessionRecoversAKilledOne(t *testing.T) {
	for _, end := range []string{"rotated", "logged"} {
		t.Run(end, func(t *testing.T) {
			d, dir := newDisk(t), t.TempDir()
			first := d.backup(t, dir)
			d.write(t, 7)
			wantKilled(t, child(t, d, dir, end))
			d.write(t, 8)
			s := d.open(t, dir)
			wantSince(t, s, first, 7)
			rotate(t, s)
			wantSince(t, s, first, 7, 8)
		})
	}
}

// TestKilledAnywhereLosesNothing kills a process that backs up without end, at
// random; every block written since the first position stays in the union.
func TestKilledAnywhereLosesNothing(t *testing.T) {
	rounds := 25
	if os.Getenv("SOAK") != "" {
		rounds = 300
	}
	rng := newRand(t)
	d, dir := newDisk(t), t.TempDir()
	first := d.backup(t, dir)
	written := map[int64]bool{}
	for range rounds {
		cmd := child(t, d, dir, "")
		for until := time.Now().Add(time.Duration(20+rng.IntN(150)) * time.Millisecond); time.Now().Before(until); {
			b := rng.Int64N(testBlocks)
			d.write(t, b)
			written[b] = true
		}
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		wantKilled(t, cmd)
		s := d.open(t, dir)
		rotate(t, s)
		b, err := s.Since(t.Context(), first)
		if err != nil {
			t.Fatal(err)
		}
		for i := range written {
			if !b.Get(i) {
				t.Fatalf("block %d is missing", i)
			}
		}
		if err := errors.Join(s.Commit(t.Context()), s.Unlock()); err != nil {
			t.Fatal(err)
		}
		left, err := filepath.Glob(filepath.Join(dir, "trackers", "*", tempPrefix+"*"))
		if err != nil || len(left) > 0 {
			t.Fatalf("left behind: %v, %v", left, err)
		}
		if len(written) > testBlocks/2 { // a new start, so that the union says something
			first, written = *s.last, map[int64]bool{}
		}
	}
}
