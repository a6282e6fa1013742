// SPDX-License-Identifier: BSD-2-Clause

package looptest

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// fiThaw is FITHAW of linux/fs.h.
const fiThaw = 0xc0045878

// Run runs a command and returns its standard output; its failure is the
// test's.
func Run(t testing.TB, name string, args ...string) string {
	t.Helper()
	var stderr strings.Builder
	cmd := exec.Command(name, args...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s%s", name, strings.Join(args, " "), err, out, &stderr)
	}
	return strings.TrimSpace(string(out))
}

// File makes a sparse file of size bytes.
func File(t testing.TB, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(path, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	return path
}

// Attach binds a loop device to a file or device; args go to losetup.
func Attach(t testing.TB, file string, args ...string) string {
	t.Helper()
	dev := Run(t, "losetup", append(append([]string{"--find", "--show"}, args...), file)...)
	tell("+loop " + dev)
	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "-d", dev).CombinedOutput(); err != nil {
			t.Errorf("detach %s: %v: %s", dev, err, out)
		}
		tell("-loop " + dev)
	})
	return dev
}

// Device binds a loop device to a sparse file of size bytes.
func Device(t testing.TB, size int64, args ...string) string {
	t.Helper()
	return Attach(t, File(t, size), args...)
}

// MinSize is a size in bytes on which every file system of [Mkfs] fits.
const MinSize = 320 << 20

// Mkfs makes an ext4, xfs or btrfs on the devices, or a swap area.
func Mkfs(t testing.TB, fsType string, devices ...string) {
	t.Helper()
	switch fsType {
	case "ext4":
		Run(t, "mkfs.ext4", append([]string{"-q", "-F"}, devices...)...)
	case "xfs", "btrfs":
		Run(t, "mkfs."+fsType, append([]string{"-q", "-f"}, devices...)...)
	case "swap":
		Run(t, "mkswap", devices...)
	default:
		t.Fatalf("no mkfs for %q", fsType)
	}
}

// Mount mounts a device or directory on a new directory; args go to mount.
func Mount(t testing.TB, source string, args ...string) string {
	t.Helper()
	dir := t.TempDir()
	tell("+mount " + dir)
	Run(t, "mount", append(append([]string{}, args...), source, dir)...)
	t.Cleanup(func() {
		Thaw(dir)
		unmount(t, dir)
		tell("-mount " + dir)
	})
	return dir
}

// unmount waits for those who are just leaving the file system.
func unmount(t testing.TB, dir string) {
	var err error
	for range 100 {
		if err = unix.Unmount(dir, 0); err == nil || errors.Is(err, unix.EINVAL) {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Errorf("unmount %s: %v", dir, err)
	_ = unix.Unmount(dir, unix.MNT_DETACH)
}

// Thaw thaws whatever is frozen at a mount point, and reports whether
// anything was.
func Thaw(dir string) bool {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), fiThaw, 0)
	return errno == 0
}
