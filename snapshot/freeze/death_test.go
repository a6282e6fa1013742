// SPDX-License-Identifier: BSD-2-Clause

package freeze

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/snapshot/device"
	"github.com/dsync-backup/dsync-backup/snapshot/device/looptest"
)

const victimArg = "freeze-victim"

func lines(b []byte) iter.Seq[string] { return strings.Lines(string(b)) }

func contains(err error, s string) bool { return strings.Contains(err.Error(), s) }

// rounds is how often a random test kills something: the full count with SOAK.
func rounds(short, full int) int {
	if os.Getenv("SOAK") != "" {
		return full
	}
	return short
}

// victim freezes and thaws the file systems above a device until it is killed,
// and says what it is about to do.
func victim(dev string) int {
	mounts, err := device.Mounts(dev)
	for err == nil {
		var f *Freezer
		if f, err = Start(context.Background(), mounts, Options{MaxFreeze: long}); err != nil {
			break
		}
		fmt.Println("started", f.cmd.Process.Pid)
		if err = f.Freeze(context.Background()); err == nil {
			fmt.Println("frozen")
			time.Sleep(5 * time.Millisecond)
			_, err = f.Thaw()
		}
		err = errors.Join(err, f.Close())
	}
	fmt.Fprintln(os.Stderr, err)
	return 1
}

// startVictim returns the process and its output.
func startVictim(t *testing.T, dev string) (*exec.Cmd, *bufio.Reader, *bytes.Buffer) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", victimArg, dev)
	cmd.Args[0] = os.Args[0] // so that its watchdogs can be told from others
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return cmd, bufio.NewReader(out), &stderr
}

// TestKilledParentLeavesNothingFrozen kills the freezing process at random
// moments, most of them close to a freeze. The deadline is far away: only its
// death can have thawed.
func TestKilledParentLeavesNothingFrozen(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	for _, fsType := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(fsType, func(t *testing.T) {
			dev, dir := fileSystem(t, fsType)
			w := startWriter(t, dir)
			atFreeze := 0
			for range rounds(9, 200) {
				cmd, out, stderr := startVictim(t, dev)
				last := ""
				for range 1 + rng.IntN(4) {
					var err error
					if last, err = out.ReadString('\n'); err != nil {
						t.Fatalf("victim: %v: %s", err, stderr)
					}
				}
				if last == "frozen\n" {
					atFreeze++
				}
				time.Sleep(time.Duration(rng.IntN(12000)) * time.Microsecond)
				_ = cmd.Process.Kill()
				_ = cmd.Wait()
				awaitWatchdogs(t)
				writable(t, dir)
				w.goesOn(t)
			}
			t.Logf("%d deaths in a freeze or just after, the others around its start", atFreeze)
		})
	}
}

// awaitWatchdogs waits until those of killed parents have left.
func awaitWatchdogs(t *testing.T) {
	t.Helper()
	want := os.Args[0] + "\x00" + WatchdogArg + "\x00"
	alive := func() bool {
		files, err := filepath.Glob("/proc/[0-9]*/cmdline")
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range files {
			if b, err := os.ReadFile(name); err == nil && string(b) == want {
				return true // a zombie has no command line
			}
		}
		return false
	}
	for deadline := time.Now().Add(patience); alive(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			looptest.ThawAll()
			t.Fatal("a watchdog stays after the death of its parent")
		}
	}
}

// TestKilledWatchdogIsReplacedByTheParent kills the watchdog at random moments
// of a freeze. Whatever the moment, the parent ends with everything thawed and
// with an error, unless the freeze had ended before.
func TestKilledWatchdogIsReplacedByTheParent(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 2))
	dev, dir := fileSystem(t, "ext4")
	_, top := stackOn(t, dir)
	w := startWriter(t, top)
	for round := range rounds(24, 400) {
		f := start(t, dev, Options{MaxFreeze: long})
		delay := time.Duration(rng.IntN(20000)) * time.Microsecond
		killed := make(chan struct{})
		go func() {
			defer close(killed)
			if round%2 == 0 {
				// Aimed at the system call: between its announcement
				// and what the watchdog makes of its result.
				delay /= 20
				f.awaitFreezing(round / 2 % 2)
			}
			time.Sleep(delay)
			_ = unix.Kill(f.cmd.Process.Pid, unix.SIGKILL)
		}()
		err := f.Freeze(t.Context())
		if err == nil {
			<-killed
			<-f.Expired()
			_, err = f.Thaw()
		}
		if !errors.Is(err, ErrWatchdog) {
			t.Fatalf("killed after %v: %v, want ErrWatchdog", delay, err)
		}
		<-killed
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		w.goesOn(t)
		writable(t, dir, top)
	}
}

// awaitFreezing waits until the watchdog is about to freeze a file system.
func (f *Freezer) awaitFreezing(i int) {
	for {
		f.mu.Lock()
		state := f.states[i]
		f.mu.Unlock()
		if state != idle {
			return
		}
		time.Sleep(10 * time.Microsecond)
	}
}

func TestTerminatedWatchdogThaws(t *testing.T) {
	dev, dir := fileSystem(t, "ext4")
	f := start(t, dev, Options{MaxFreeze: long})
	if err := f.Freeze(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, sig := range []unix.Signal{unix.SIGINT, unix.SIGHUP, unix.SIGQUIT} {
		if err := unix.Kill(f.cmd.Process.Pid, sig); err != nil {
			t.Fatal(err)
		}
	}
	time.Sleep(50 * time.Millisecond)
	if !isFrozen(t, dir) {
		t.Fatal("a signal from the terminal ended the freeze")
	}
	if err := unix.Kill(f.cmd.Process.Pid, unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	<-f.Expired()
	if _, err := f.Thaw(); !errors.Is(err, ErrWatchdog) {
		t.Fatalf("got %v, want ErrWatchdog", err)
	}
	writable(t, dir)
}

// TestStoppedWatchdogIsOverruled stops the watchdog, so that it cannot keep its
// deadline: the parent does.
func TestStoppedWatchdogIsOverruled(t *testing.T) {
	dev, dir := fileSystem(t, "ext4")
	f := start(t, dev, Options{MaxFreeze: time.Second})
	if err := f.Freeze(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(f.cmd.Process.Pid, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	<-f.Expired()
	if _, err := f.Thaw(); !errors.Is(err, ErrTooLong) {
		t.Fatalf("got %v, want ErrTooLong", err)
	}
	writable(t, dir)
	if err := unix.Kill(f.cmd.Process.Pid, unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
}

func TestCancelledFreezeThaws(t *testing.T) {
	dev, dir := fileSystem(t, "xfs")
	for _, delay := range []time.Duration{0, time.Millisecond, 5 * time.Millisecond} {
		f := start(t, dev, Options{MaxFreeze: long})
		ctx, cancel := context.WithTimeout(t.Context(), delay)
		err := f.Freeze(ctx)
		cancel()
		if err == nil {
			_, err = f.Thaw()
		} else if errors.Is(err, context.DeadlineExceeded) {
			err = nil
		}
		if err := errors.Join(err, f.Close()); err != nil {
			t.Fatalf("after %v: %v", delay, err)
		}
		writable(t, dir)
	}
}

func TestFreezerFreezesOnce(t *testing.T) {
	dev, dir := fileSystem(t, "ext4")
	f := start(t, dev, Options{MaxFreeze: long})
	if err := f.Freeze(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := f.Freeze(t.Context()); err == nil {
		t.Fatal("froze twice")
	}
	if err := f.Close(); err != nil { // without Thaw
		t.Fatal(err)
	}
	writable(t, dir)
	if err := f.Freeze(t.Context()); err == nil {
		t.Fatal("froze after Close")
	}
}

// TestWatchdogNeedsNoDisk looks for pages of its program that are not in memory.
func TestWatchdogNeedsNoDisk(t *testing.T) {
	dev, _ := fileSystem(t, "ext4")
	f := start(t, dev, Options{})
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", f.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	name, size, rss, seen := "", 0, 0, 0
	for line := range lines(b) {
		if fields := strings.Fields(line); !strings.HasSuffix(fields[0], ":") {
			name = fields[len(fields)-1]
		}
		_, _ = fmt.Sscanf(line, "Size: %d kB", &size)
		if n, _ := fmt.Sscanf(line, "Rss: %d kB", &rss); n == 1 && strings.HasSuffix(name, filepath.Base(os.Args[0])) {
			seen++
			if rss != size {
				t.Errorf("%s: %d of %d kB are in memory", name, rss, size)
			}
		}
	}
	if seen == 0 {
		t.Fatal("its program is not mapped")
	}
}

// TestOutputIsHeldWhileFrozen writes more than a pipe takes to one whose reader
// waits for the frozen file system, as a shell's `> log` on it would.
func TestOutputIsHeldWhileFrozen(t *testing.T) {
	dev, dir := fileSystem(t, "ext4")
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	out := NewHoldOutput(w, 1<<20)
	f := start(t, dev, Options{MaxFreeze: long, Outputs: []*HoldOutput{out}})
	log, err := os.Create(dir + "/log")
	if err != nil {
		t.Fatal(err)
	}
	copied := make(chan int64)
	go func() {
		n, _ := io.Copy(log, r)
		log.Close()
		copied <- n
	}()
	if err := f.Freeze(t.Context()); err != nil {
		t.Fatal(err)
	}
	line := bytes.Repeat([]byte("x"), 1024)
	for range 300 {
		if _, err := out.Write(line); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := f.Thaw(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	if n := <-copied; n != 300*1024 {
		t.Fatalf("%d bytes came through, want %d", n, 300*1024)
	}
}

func TestHeldOutputIsBoundedAndSaysWhatItDropped(t *testing.T) {
	var dst bytes.Buffer
	h := NewHoldOutput(&dst, 10)
	fmt.Fprint(h, "a\n")
	h.Hold()
	for _, s := range []string{"bbbb\n", "ccc\n", "dd\n", "e\n"} {
		fmt.Fprint(h, s)
	}
	if dst.String() != "a\n" {
		t.Fatalf("written while holding: %q", dst.String())
	}
	if err := h.Release(); err == nil || !contains(err, "5 bytes") {
		t.Fatalf("got %v, want the 5 bytes that were dropped", err)
	}
	fmt.Fprint(h, "f\n")
	if dst.String() != "a\nbbbb\nccc\nf\n" {
		t.Fatalf("%q", dst.String())
	}
}

func TestMountInAnotherNamespaceIsFrozen(t *testing.T) {
	dev, dir := fileSystem(t, "ext4")
	other := t.TempDir()
	cmd := exec.Command("unshare", "--mount", "--propagation", "private", "sh", "-c",
		`umount "$1" && mount "$2" "$3" && echo mounted && read wait && echo x >"$3/x" && echo written && read wait`, "sh", dir, dev, other)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		_ = cmd.Wait()
	})
	out := bufio.NewReader(pipe)
	if line, _ := out.ReadString('\n'); line != "mounted\n" {
		t.Fatalf("mount in another namespace: %q", line)
	}
	if err := unix.Unmount(dir, 0); err != nil { // now it is mounted only there
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Mount(dev, dir, "ext4", 0, "") }) // as its own cleanup expects it
	f := start(t, dev, Options{MaxFreeze: long})
	if err := f.Freeze(t.Context()); err != nil {
		t.Fatal(err)
	}
	written := make(chan string)
	go func() {
		fmt.Fprintln(in)
		line, _ := out.ReadString('\n')
		written <- line
	}()
	select {
	case <-written:
		t.Fatal("a write in the other namespace went through")
	case <-time.After(100 * time.Millisecond):
	}
	if _, err := f.Thaw(); err != nil {
		t.Fatal(err)
	}
	if line := <-written; line != "written\n" {
		t.Fatalf("after the thaw: %q", line)
	}
}
