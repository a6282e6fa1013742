// SPDX-License-Identifier: BSD-2-Clause

package bpf

import (
	"os"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel/devmapper"
	"github.com/dsync-backup/dsync-backup/kernel/devmapper/dmtest"
)

// ioctls and structures of linux/raid/md_u.h.
const (
	mdSetArrayInfo = 0x40480923
	mdAddNewDisk   = 0x40140921
	mdRunArray     = 0x400c0930
	mdStopArray    = 0x932
	mdMajor        = 9
)

type (
	mdArray struct {
		major, minor, patch, ctime, level, size, count, raidDisks, mdMinor, notPersistent int32
		utime, state, active, working, failed, spare, layout, chunk                       int32
	}
	mdDisk struct{ number, major, minor, raidDisk, state int32 }
)

// newStripe makes a RAID 0 without metadata of two devices.
func newStripe(t *testing.T, devices ...string) string {
	t.Helper()
	node := t.TempDir() + "/md"
	if err := unix.Mknod(node, unix.S_IFBLK|0o600, int(unix.Mkdev(mdMajor, 77))); err != nil {
		t.Fatal(err)
	}
	f := openDevice(t, node, os.O_RDWR)
	call := func(request uintptr, arg unsafe.Pointer) {
		t.Helper()
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, uintptr(arg)); errno != 0 {
			t.Fatalf("ioctl %#x of md: %v", request, errno)
		}
	}
	array := mdArray{raidDisks: int32(len(devices)), count: int32(len(devices)), notPersistent: 1, mdMinor: 77, chunk: 64 << 10, state: 1, active: 2, working: 2}
	call(mdSetArrayInfo, unsafe.Pointer(&array))
	for i, d := range devices {
		dev := mustResolve(t, d).dev
		disk := mdDisk{int32(i), int32(dev.major), int32(dev.minor), int32(i), 6} // active, in sync
		call(mdAddNewDisk, unsafe.Pointer(&disk))
	}
	call(mdRunArray, nil)
	t.Cleanup(func() { _, _, _ = unix.Syscall(unix.SYS_IOCTL, f.Fd(), mdStopArray, 0) })
	return node
}

// TestNoBioThatADriverAboveTurnsToMappedIsMissed builds a RAID 0 above a tracked
// device. By the kernel's version, and by whether it counts them, it sends on
// clones of the bios that it is given, or those themselves, which the kernel does
// not trace as queued a second time.
func TestNoBioThatADriverAboveTurnsToMappedIsMissed(t *testing.T) {
	dmtest.Need(t)
	d := disksBelow(t, 2, stackSectors)
	m := newMapped(t, "part", line(0, stackSectors, d[0], 0))
	other := newMapped(t, "other", devmapper.Target{Length: stackSectors, Type: "linear", Params: d[1] + " 0"})
	for _, counts := range []string{"1", "0"} {
		t.Run("iostats "+counts, func(t *testing.T) {
			tr := track(t, m.device)
			raid := newStripe(t, m.device, other.device)
			if err := os.WriteFile("/sys/block/md77/queue/iostats", []byte(counts), 0o600); err != nil {
				t.Fatal(err)
			}
			f := openDirect(t, raid)
			write(t, f, 0)
			if _, err := f.WriteAt(alignedBuffer(256<<10), 1<<20); err != nil { // over both
				t.Fatal(err)
			}
			if err := f.Close(); err != nil {
				t.Fatal(err)
			}
			b := mustPeek(t, tr)
			st, err := tr.Status(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("reliable %v (%s), marked %v and %v", st.Reliable, st.Reason, b.Get(0), b.Get(128))
			if st.Reliable && (!b.Get(0) || !b.Get(128)) {
				t.Fatal("it was missed")
			}
		})
	}
	newStripe(t, m.device, other.device)
	wantRefused(t, m.device, "it is part of md77")
}
