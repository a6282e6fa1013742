// SPDX-License-Identifier: BSD-2-Clause

package dm

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/kernel/devmapper"
	"github.com/dsync-backup/dsync-backup/kernel/devmapper/dmtest"
)

// A child process starts and rotates a tracker and kills itself with SIGKILL
// when it comes to a point.
const (
	envChildDevice = "DSYNC_TEST_CHILD_DEVICE"
	envChildCrash  = "DSYNC_TEST_CHILD_CRASH"
)

const (
	testBlocks = 2048
	testSize   = testBlocks * kernel.BlockSize
)

var (
	noContext  = context.Background()
	childNonce = kernel.Nonce{1, 2, 3}
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

func childLife(device, crash string) error {
	hook := func(point string) error {
		if point == crash {
			_ = unix.Kill(os.Getpid(), unix.SIGKILL)
			select {}
		}
		return nil
	}
	tr, err := Open(device)
	if errors.Is(err, kernel.ErrNotTracked) {
		tr, err = Start(noContext, device, Options{hook: hook})
	}
	if err != nil {
		return err
	}
	if _, err := tr.Rotate(noContext, childNonce); err != nil {
		return err
	}
	return hook("rotated")
}

// killChild runs a child that kills itself at a point.
func killChild(t *testing.T, device, point string) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), envChildDevice+"="+device, envChildCrash+"="+point)
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != -1 {
		t.Fatalf("the child was to die at %q: %v: %s", point, err, out)
	}
}

// need skips a test where the module is not there.
func need(t testing.TB) {
	t.Helper()
	err := Supported()
	if errors.Is(err, ErrNoModule) {
		t.Skip("this test runs in a guest with the module dm-dsync: ", err)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// newLoop is a loop device of size bytes that is not tracked.
func newLoop(t testing.TB, size int64) string {
	t.Helper()
	need(t)
	return dmtest.Loop(t, size, dmtest.LoopOptions{})
}

// track starts a tracker that ends with the test.
func track(t testing.TB, device string) *Tracker {
	t.Helper()
	dmtest.RemoveAtEnd(t, DefaultName(device))
	tr, err := Start(t.Context(), device, Options{})
	if err != nil {
		t.Fatal(err)
	}
	return tr
}

func newTracked(t testing.TB) *Tracker {
	t.Helper()
	return track(t, newLoop(t, testSize))
}

func openDevice(t testing.TB, path string, flags int) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, flags, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

// alignedBuffer is n bytes that O_DIRECT accepts.
func alignedBuffer(n int) []byte {
	b := make([]byte, n+kernel.BlockSize)
	skip := kernel.BlockSize - int(uintptr(unsafe.Pointer(&b[0]))%kernel.BlockSize)
	return b[skip : skip+n]
}

// write writes blocks to the mapped device, past its page cache.
func write(t testing.TB, tr *Tracker, blocks ...int64) {
	t.Helper()
	f, err := os.OpenFile(tr.Device(), os.O_WRONLY|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := alignedBuffer(kernel.BlockSize)
	for i := range b {
		b[i] = byte(rand.Uint32())
	}
	for _, i := range blocks {
		if _, err := f.WriteAt(b, i*kernel.BlockSize); err != nil {
			t.Fatal(err)
		}
	}
}

func rotate(t testing.TB, tr *Tracker) kernel.Epoch {
	t.Helper()
	e, err := tr.Rotate(noContext, kernel.NewNonce())
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func ack(t testing.TB, tr *Tracker, epoch uint64) {
	t.Helper()
	if err := tr.Ack(noContext, epoch); err != nil {
		t.Fatal(err)
	}
}

// turn rotates, acknowledges, and tells what the epoch had marked.
func turn(t testing.TB, tr *Tracker) *kernel.Bitmap {
	t.Helper()
	e := rotate(t, tr)
	ack(t, tr, e.Position.Epoch)
	return e.Bitmap
}

func wantBlocks(t testing.TB, b *kernel.Bitmap, blocks ...int64) {
	t.Helper()
	want := kernel.NewBitmap(b.Blocks())
	for _, i := range blocks {
		want.Set(i)
	}
	size := b.Blocks() * kernel.BlockSize
	if fmt.Sprint(b.Extents(size)) != fmt.Sprint(want.Extents(size)) {
		t.Errorf("marked %v, want %v", b.Extents(size), want.Extents(size))
	}
}

func status(t testing.TB, tr *Tracker) kernel.Status {
	t.Helper()
	st, err := tr.Status(noContext)
	if err == nil {
		st.DirtyBlocks, err = tr.Dirty(noContext)
	}
	if err != nil {
		t.Fatal(err)
	}
	return st
}

func wantReliable(t testing.TB, tr *Tracker) {
	t.Helper()
	if st := status(t, tr); !st.Reliable || st.Reason != "" {
		t.Errorf("not reliable: %s", st.Reason)
	}
}

func wantUnreliable(t testing.TB, tr *Tracker, reason string) {
	t.Helper()
	st := status(t, tr)
	if st.Reliable || !strings.Contains(st.Reason, reason) || strings.Contains(st.Reason, "\n") {
		t.Errorf("reliable: %v, reason %q; want %q", st.Reliable, st.Reason, reason)
	}
}

func wantErr(t testing.TB, err error, texts ...string) {
	t.Helper()
	for _, text := range texts {
		if err == nil || !strings.Contains(err.Error(), text) || strings.Contains(err.Error(), "\n") {
			t.Errorf("error %v; want one line with %q", err, text)
		}
	}
}

// reload swaps a table in.
func reload(t testing.TB, tr *Tracker, targets ...devmapper.Target) {
	t.Helper()
	if err := devmapper.Load(tr.name, devmapper.LoadOptions{}, targets...); err != nil {
		t.Fatal(err)
	}
	if err := devmapper.Resume(t.Context(), tr.name, devmapper.ResumeOptions{}); err != nil {
		t.Fatal(err)
	}
}
