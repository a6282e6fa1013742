// SPDX-License-Identifier: BSD-2-Clause

package local

import (
	"errors"
	"fmt"
	"os"
	"syscall"
	"testing"

	"github.com/dsync-backup/dsync-backup/repo/backend"
	"golang.org/x/sys/unix"
)

// TestAnErrorOfTheMediumIsOneOnLocalDisksOnly asks about a FUSE file system, such
// as sshfs is, and about one of this machine. FUSE's has nobody who answers,
// which the kernel does by itself for users to whom it does not belong.
func TestAnErrorOfTheMediumIsOneOnLocalDisksOnly(t *testing.T) {
	far, near := t.TempDir(), t.TempDir()
	device, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer device.Close()
	options := fmt.Sprintf("fd=%d,rootmode=40000,user_id=12345,group_id=12345", device.Fd())
	if err := syscall.Mount("nobody", far, "fuse", 0, options); err != nil {
		t.Fatalf("mount (needs root): %v", err)
	}
	defer syscall.Unmount(far, unix.MNT_DETACH) //nolint:errcheck // goes with the device
	for dir, want := range map[string]bool{near: true, far: false} {
		var st unix.Statfs_t
		if err := unix.Statfs(dir, &st); err != nil {
			t.Fatal(err)
		}
		if err := unreadable(unix.EIO, uint32(st.Type)); errors.Is(err, backend.ErrBroken) != want || !errors.Is(err, unix.EIO) {
			t.Errorf("%s: %v", dir, err)
		}
	}
}
