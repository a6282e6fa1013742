// SPDX-License-Identifier: BSD-2-Clause

package bpf

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel"
)

// A child process works a tracker through its whole life and kills itself with
// SIGKILL when it comes to a point.
const (
	envChildDevice = "DSYNC_TEST_CHILD_DEVICE"
	envChildCrash  = "DSYNC_TEST_CHILD_CRASH" // the point, or "" to go round until killed
)

func TestMain(m *testing.M) {
	if device := os.Getenv(envChildDevice); device != "" {
		if err := childLife(device, os.Getenv(envChildCrash)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// childLife starts the device's tracker if there is none, rotates and
// acknowledges, and stops it.
func childLife(device, crash string) error {
	hook := func(point string) {
		if point == crash {
			_ = unix.Kill(os.Getpid(), unix.SIGKILL)
			select {}
		}
	}
	ctx := context.Background()
	tr, err := Open(device)
	if errors.Is(err, kernel.ErrNotTracked) {
		tr, err = Start(ctx, device, Options{hook: hook})
	}
	if err != nil {
		return err
	}
	tr.hook = hook
	for {
		if e, err := tr.Pending(ctx); err != nil {
			return err
		} else if e != nil {
			return fmt.Errorf("epoch %d is pending", e.Position.Epoch)
		}
		e, err := tr.Rotate(ctx, childNonce)
		if err != nil {
			return err
		}
		if err := tr.Ack(ctx, e.Position.Epoch); err != nil {
			return err
		}
		if crash != "" {
			return tr.Stop(ctx)
		}
	}
}

var childNonce = kernel.Nonce{1, 2, 3}

func child(t *testing.T, device, crash string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), envChildDevice+"="+device, envChildCrash+"="+crash)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() && stderr.Len() > 0 {
			t.Logf("child: %s", stderr.String())
		}
	})
	return cmd
}

func wantKilled(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	err := cmd.Wait()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != unix.SIGKILL {
		t.Fatalf("child was not killed: %v: %s", err, cmd.Stderr)
	}
}

func TestCrashedStartLeavesNoTrackerAndCanBeStartedAgain(t *testing.T) {
	any, _ := newLoop(t, 8<<20)
	points := []string{"made folder", "pinned maps"}
	for _, name := range wantedPrograms(t, any) {
		points = append(points, "attached "+name)
	}
	for _, point := range points {
		t.Run(point, func(t *testing.T) {
			device, _ := newLoop(t, 8<<20)
			wantKilled(t, child(t, device, point))
			target, err := resolve(device)
			if err != nil {
				t.Fatal(err)
			}
			if !exists(pinDir(target.dev)) {
				t.Fatal("the crash left nothing behind: it came too early")
			}
			if _, err := Open(device); !errors.Is(err, kernel.ErrNotTracked) {
				t.Fatalf("got %v, want ErrNotTracked", err)
			}
			if exists(pinDir(target.dev)) {
				t.Fatal("what the crash left behind was not removed")
			}
			wantWritesMarked(t, track(t, device), device)
		})
	}
}

func TestCrashedStopLeavesNoTracker(t *testing.T) {
	device, _ := newLoop(t, 8<<20)
	wantKilled(t, child(t, device, "stopping"))
	tr := track(t, device) // removes the rest, and starts afresh
	wantWritesMarked(t, tr, device)
}

func TestStopCrashedBeforeItTookHoldIsUnreliable(t *testing.T) {
	device, _ := newLoop(t, 8<<20)
	wantKilled(t, child(t, device, "told stop"))
	tr, err := Open(device)
	if err != nil {
		t.Fatal(err)
	}
	wantUnreliable(t, tr, "tracking was stopped")
	if err := tr.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// TestCrashedRotationIsRecovered kills a rotation and an acknowledgement at
// each step. Whatever is marked before, between and after is in exactly the
// epochs that it may be in, and the nonce of a rotation that took place stays.
func TestCrashedRotationIsRecovered(t *testing.T) {
	for point, pending := range map[string]bool{
		"rotating": false, "swapped": true, "carried over": true, "pending": true,
		"clearing": false, "cleared": false,
	} {
		t.Run(point, func(t *testing.T) {
			device, _ := newLoop(t, 8<<20)
			tr := track(t, device)
			f := openDirect(t, device)
			write(t, f, 3)
			wantKilled(t, child(t, device, point))
			write(t, f, 5)
			if point == "rotating" || point == "swapped" || point == "carried over" {
				// In the middle of it, a look from outside sees everything.
				b, err := tr.Peek(t.Context())
				if err != nil || !b.Get(3) || !b.Get(5) {
					t.Fatalf("peeked %v %v: %v", b.Get(3), b.Get(5), err)
				}
			}
			e, err := tr.Pending(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if pending != (e != nil) {
				t.Fatalf("pending epoch %v, want one: %v", e, pending)
			}
			first := kernel.NewBitmap(2048)
			first.Set(3)
			if e != nil {
				if e.Position != (kernel.Position{Tracker: tr.UUID(), Epoch: 1, Nonce: childNonce}) {
					t.Fatalf("pending %s", e.Position)
				}
				wantEqual(t, e.Bitmap, first)
				if _, err := tr.Rotate(t.Context(), kernel.NewNonce()); !errors.Is(err, kernel.ErrUnacknowledged) {
					t.Fatalf("rotated over a pending epoch: %v", err)
				}
				if err := tr.Ack(t.Context(), 1); err != nil {
					t.Fatal(err)
				}
			}
			want := kernel.NewBitmap(2048)
			want.Set(5)
			if point == "rotating" {
				want.Set(3) // the rotation did not take place
			}
			wantEqual(t, rotate(t, tr), want)
			wantEqual(t, rotate(t, tr), kernel.NewBitmap(2048))
			wantReliable(t, tr)
		})
	}
}

// TestKilledAnywhere kills a process that rotates without end, at random, and
// finds each write that was made before a kill in some epoch that was pending
// or ends after it.
func TestKilledAnywhere(t *testing.T) {
	rounds := 25
	if os.Getenv("SOAK") != "" {
		rounds = 300
	}
	device, _ := newLoop(t, 8<<20)
	tr := track(t, device)
	f := openDirect(t, device)
	rng := seed(t)
	for range rounds {
		cmd := child(t, device, "")
		time.Sleep(time.Duration(rng.IntN(150)) * time.Millisecond)
		// Stopped, the child cannot acknowledge what is written from here on.
		if err := cmd.Process.Signal(unix.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		waitStopped(t, cmd.Process.Pid)
		block := rng.Int64N(2048)
		write(t, f, block)
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		wantKilled(t, cmd)
		union := kernel.NewBitmap(2048)
		e, err := tr.Pending(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if e != nil {
			if err := errors.Join(union.Or(e.Bitmap), tr.Ack(t.Context(), e.Position.Epoch)); err != nil {
				t.Fatal(err)
			}
		}
		if err := union.Or(rotate(t, tr)); err != nil {
			t.Fatal(err)
		}
		if !union.Get(block) {
			t.Fatalf("block %d is missing", block)
		}
		wantEqual(t, rotate(t, tr), kernel.NewBitmap(2048))
	}
	wantReliable(t, tr)
}

// waitStopped waits until a process has left the kernel, too: a system call
// under way when it is told to stop is carried through before.
func waitStopped(t *testing.T, pid int) {
	t.Helper()
	waitFor(t, "the child stops", func() bool {
		stat := readText(fmt.Sprintf("/proc/%d/stat", pid))
		_, rest, _ := strings.Cut(stat, ") ")
		return strings.HasPrefix(rest, "T") || strings.HasPrefix(rest, "Z")
	})
}

func write(t testing.TB, f *os.File, block int64) {
	t.Helper()
	if _, err := f.WriteAt(alignedBuffer(kernel.BlockSize), block*kernel.BlockSize); err != nil {
		t.Fatal(err)
	}
}

func wantWritesMarked(t *testing.T, tr *Tracker, device string) {
	t.Helper()
	f := openDirect(t, device)
	want := kernel.NewBitmap(tr.target.blocks())
	for _, block := range []int64{0, 1, 77, 2047} {
		write(t, f, block)
		want.Set(block)
	}
	wantEqual(t, rotate(t, tr), want)
	wantReliable(t, tr)
}

// TestWhatOneReadAnotherMayHaveAcknowledged: two processes work the same tracker. What one of
// them has read of an ended epoch is worth nothing once the other has ended the next.
func TestWhatOneReadAnotherMayHaveAcknowledged(t *testing.T) {
	device, _ := newLoop(t, 8<<20)
	one := track(t, device)
	other, err := Open(device)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	f := openDirect(t, device)
	marks := func(blocks ...int64) *kernel.Bitmap {
		b := kernel.NewBitmap(2048)
		for _, i := range blocks {
			b.Set(i)
		}
		return b
	}
	pending := func(tr *Tracker, want *kernel.Bitmap) {
		t.Helper()
		e, err := tr.Pending(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if want == nil && e == nil {
			return
		}
		if want == nil || e == nil {
			t.Fatalf("pending is %v, want %v", e, want)
		}
		wantEqual(t, e.Bitmap, want)
	}
	end := func(tr *Tracker, want *kernel.Bitmap) uint64 {
		t.Helper()
		e, err := tr.Rotate(t.Context(), kernel.NewNonce())
		if err != nil {
			t.Fatal(err)
		}
		wantEqual(t, e.Bitmap, want)
		return e.Position.Epoch
	}
	ack := func(tr *Tracker, epoch uint64) {
		t.Helper()
		if err := tr.Ack(t.Context(), epoch); err != nil {
			t.Fatal(err)
		}
	}
	write(t, f, 3)
	first := end(one, marks(3))
	pending(one, marks(3))
	ack(other, first)
	write(t, f, 5)
	write(t, f, 700)
	second := end(other, marks(5, 700))
	pending(one, marks(5, 700))
	ack(one, second)
	pending(other, nil)
	write(t, f, 9)
	third := end(one, marks(9))
	write(t, f, 11)
	ack(one, third)
	end(other, marks(11)) // nothing is left of the epochs before
}
