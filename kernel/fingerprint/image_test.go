// SPDX-License-Identifier: BSD-2-Clause

package fingerprint

import (
	"bytes"
	"context"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

const imageSize = 320 << 20

// image is a device in a file. Loop devices on it go through the file's page
// cache, so that reading the file gives what a device would hold.
type image struct {
	t    testing.TB
	path string
}

func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := tryRun(name, args...)
	if err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
	return out
}

func tryRun(name string, args ...string) (string, error) {
	cmd := exec.Command(name, args...)
	// Times that tools write are of another day than the kernel's, so that no
	// two writes have the same time by chance. Nothing else depends on it.
	cmd.Env = append(os.Environ(), "E2FSPROGS_FAKE_TIME=1600000000", "LC_ALL=C")
	out, err := cmd.CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

// soak are the cases of a short run, and the others too if SOAK is set.
func soak[T any](short []T, others ...T) []T {
	if os.Getenv("SOAK") != "" {
		return append(short, others...)
	}
	return short
}

func needRoot(t testing.TB) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
}

func newImage(t testing.TB, size int64) image {
	t.Helper()
	i := image{t, filepath.Join(t.TempDir(), "image")}
	if err := os.WriteFile(i.path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(i.path, size); err != nil {
		t.Fatal(err)
	}
	return i
}

// copy gives the image as it is now; it shares nothing with the old one.
func (i image) copy() image {
	i.t.Helper()
	c := image{i.t, filepath.Join(i.t.TempDir(), "copy")}
	run(i.t, "cp", "--sparse=always", i.path, c.path)
	return c
}

func (i image) size() int64 {
	st, err := os.Stat(i.path)
	if err != nil {
		i.t.Fatal(err)
	}
	return st.Size()
}

func (i image) take(key Key) Fingerprint {
	i.t.Helper()
	f, err := os.Open(i.path)
	if err != nil {
		i.t.Fatal(err)
	}
	defer f.Close()
	fp, err := Take(context.Background(), ReaderAt(f), i.size(), key)
	if err != nil {
		i.t.Fatal(err)
	}
	return fp
}

// mount gives a mount point, and what unmounts it.
func (i image) mount(source string, options string) (dir string, unmount func()) {
	i.t.Helper()
	dir = i.t.TempDir()
	run(i.t, "mount", "-o", options, source, dir)
	done := false
	unmount = func() {
		if done {
			return
		}
		done = true
		if err := unix.Unmount(dir, 0); err != nil {
			i.t.Errorf("unmount: %v", err)
			_ = unix.Unmount(dir, unix.MNT_DETACH)
		}
	}
	i.t.Cleanup(unmount)
	return dir, unmount
}

// with mounts the image, does something, and unmounts it.
func (i image) with(options string, do func(dir string)) {
	i.t.Helper()
	dir, unmount := i.mount(i.path, "loop,"+options)
	if do != nil {
		do(dir)
	}
	unmount()
}

// loop binds a writable loop device for as long as do runs.
func (i image) loop(do func(device string)) {
	i.t.Helper()
	device := run(i.t, "losetup", "--find", "--show", i.path)
	defer run(i.t, "losetup", "-d", device)
	do(device)
}

func (i image) write(b []byte, off int64) {
	i.t.Helper()
	f, err := os.OpenFile(i.path, os.O_WRONLY, 0)
	if err != nil {
		i.t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(b, off); err != nil {
		i.t.Fatal(err)
	}
}

// equal compares two images byte by byte.
func (i image) equal(j image) bool {
	i.t.Helper()
	a, err := os.Open(i.path)
	if err != nil {
		i.t.Fatal(err)
	}
	defer a.Close()
	b, err := os.Open(j.path)
	if err != nil {
		i.t.Fatal(err)
	}
	defer b.Close()
	x, y := make([]byte, 1<<20), make([]byte, 1<<20)
	for {
		n, errA := io.ReadFull(a, x)
		m, errB := io.ReadFull(b, y)
		if n != m || !bytes.Equal(x[:n], y[:m]) {
			return false
		}
		if errA != nil || errB != nil {
			return true
		}
	}
}

// made makes a file system with a few files, used once.
func made(t testing.TB, args ...string) image {
	t.Helper()
	needRoot(t)
	i := newImage(t, imageSize)
	run(t, args[0], append(args[1:], i.path)...)
	i.with("rw", func(dir string) { fill(t, dir) })
	return i
}

// fill makes a file to be overwritten in place, and some more.
func fill(t testing.TB, dir string) {
	t.Helper()
	if err := os.Mkdir(filepath.Join(dir, "folder"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"file", "folder/one", "folder/two"} {
		if err := os.WriteFile(filepath.Join(dir, name), bytes.Repeat([]byte(name), 100000), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	run(t, "sync", "-f", dir)
}
