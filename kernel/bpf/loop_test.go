// SPDX-License-Identifier: BSD-2-Clause

package bpf

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel"
)

// newLoop attaches a sparse file of size bytes to a loop device for the time
// of the test.
func newLoop(t testing.TB, size int64, args ...string) (device, file string) {
	t.Helper()
	file = filepath.Join(t.TempDir(), "disk")
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
		t.Fatal(err)
	}
	return attachLoop(t, file, args...), file
}

func attachLoop(t testing.TB, file string, args ...string) string {
	t.Helper()
	device := run(t, "losetup", append(append([]string{"--find", "--show"}, args...), file)...)
	t.Cleanup(func() {
		if strings.Contains(tryRun("losetup", "-O", "BACK-FILE", device), file) {
			run(t, "losetup", "-d", device)
		}
	})
	return device
}

func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

func tryRun(name string, args ...string) string {
	out, _ := exec.Command(name, args...).CombinedOutput()
	return string(out)
}

// track starts a tracker that ends with the test.
func track(t testing.TB, device string) *Tracker {
	t.Helper()
	tr, err := Start(t.Context(), device, Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stopIfTracked(t, device, tr.dir) })
	return tr
}

// stopIfTracked removes what a test left pinned in a folder.
func stopIfTracked(t testing.TB, device, dir string) {
	t.Helper()
	tr, err := openDir(dir)
	if errors.Is(err, kernel.ErrNotTracked) {
		sweep(dir)
		return
	}
	if err != nil {
		t.Errorf("open tracker of %s: %v", device, err)
		return
	}
	// The test's own context is done by now.
	if err := tr.Stop(noContext); err != nil {
		t.Errorf("stop tracker of %s: %v", device, err)
	}
}

// alignedBuffer is n bytes that O_DIRECT accepts.
func alignedBuffer(n int) []byte {
	b := make([]byte, n+kernel.BlockSize)
	skip := kernel.BlockSize - int(uintptr(unsafe.Pointer(&b[0]))%kernel.BlockSize)
	return b[skip : skip+n]
}

func openDevice(t testing.TB, device string, flags int) *os.File {
	t.Helper()
	f, err := os.OpenFile(device, flags, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

func openDirect(t testing.TB, device string) *os.File {
	t.Helper()
	return openDevice(t, device, os.O_RDWR|unix.O_DIRECT)
}

// rotate ends an epoch and acknowledges it.
func rotate(t testing.TB, tr kernel.Tracker) *kernel.Bitmap {
	t.Helper()
	e, err := tr.Rotate(t.Context(), kernel.NewNonce())
	if err != nil {
		t.Fatal(err)
	}
	if err := tr.Ack(t.Context(), e.Position.Epoch); err != nil {
		t.Fatal(err)
	}
	return e.Bitmap
}

func wantReliable(t testing.TB, tr kernel.Tracker) {
	t.Helper()
	st, err := tr.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if !st.Reliable {
		t.Fatalf("tracker is not reliable: %s", st.Reason)
	}
}

func wantUnreliable(t testing.TB, tr kernel.Tracker, reason string) {
	t.Helper()
	st, err := tr.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if st.Reliable || !strings.Contains(st.Reason, reason) {
		t.Fatalf("reliable %v, reason %q; want unreliable with %q", st.Reliable, st.Reason, reason)
	}
	if strings.ContainsAny(st.Reason, "\n") {
		t.Fatalf("reason %q is not one line", st.Reason)
	}
}

// waitFor polls for what happens in the kernel's own time.
func waitFor(t testing.TB, what string, done func() bool) {
	t.Helper()
	for range 6000 {
		if done() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("gave up waiting until %s", what)
}
