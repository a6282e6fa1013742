// SPDX-License-Identifier: BSD-2-Clause

package bpf

import (
	"crypto/rand"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel"
)

// TestRotateWhileFrozen rotates under a frozen file system of each kind, with
// data that was dirty when it froze. A rotation that waited for the thaw would
// hang the test. What the file system wrote is marked in the epoch that ended,
// and nothing is written until the thaw.
func TestRotateWhileFrozen(t *testing.T) {
	for _, fs := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(fs, func(t *testing.T) {
			device, _ := newLoop(t, 512<<20)
			run(t, "mkfs."+fs, "-q", device)
			tr := track(t, device)
			mount := t.TempDir()
			run(t, "mount", device, mount)
			t.Cleanup(func() { run(t, "umount", mount) })
			rotate(t, tr)
			data := make([]byte, 8<<20)
			_, _ = rand.Read(data)
			if err := os.WriteFile(filepath.Join(mount, "file"), data, 0o600); err != nil {
				t.Fatal(err)
			}
			run(t, "fsfreeze", "-f", mount)
			t.Cleanup(func() { _ = tryRun("fsfreeze", "-u", mount) })

			marked := rotate(t, tr).Count()
			if marked < 8<<20/kernel.BlockSize {
				t.Errorf("%d blocks are marked, fewer than were written", marked)
			}
			if n := rotate(t, tr).Count(); n != 0 {
				t.Errorf("%d blocks were written while frozen", n)
			}
			wantReliable(t, tr)
			run(t, "fsfreeze", "-u", mount)
		})
	}
}

// TestRotateSyncsThePageCache writes through the device's own page cache,
// without syncing it: the data is on the device, and marked, when the epoch
// has ended.
func TestRotateSyncsThePageCache(t *testing.T) {
	device, _ := newLoop(t, 8<<20)
	tr := track(t, device)
	f := openDevice(t, device, os.O_RDWR)
	if _, err := f.WriteAt([]byte("dirty"), 5*kernel.BlockSize); err != nil {
		t.Fatal(err)
	}
	want := kernel.NewBitmap(2048)
	want.Set(5)
	wantEqual(t, rotate(t, tr), want)
	wantEqual(t, rotate(t, tr), kernel.NewBitmap(2048))
	wantReliable(t, tr)
}

// TestFourTebibytes tracks the largest device that the design speaks of: the
// last block, and a discard of everything, which is many requests of the
// largest size there is.
func TestFourTebibytes(t *testing.T) {
	const size = 4 << 40
	device, _ := newLoop(t, size)
	tr := track(t, device)
	f := openDirect(t, device)
	blocks := []int64{0, 1<<30 - 1, 1 << 29, 12345678}
	want := kernel.NewBitmap(size / kernel.BlockSize)
	for _, b := range blocks {
		write(t, f, b)
		want.Set(b)
	}
	wantEqual(t, rotate(t, tr), want)
	if err := rangeIoctl(f, blkDiscard, 0, size/kernel.BlockSize); err != nil {
		t.Fatal(err)
	}
	if n := rotate(t, tr).Count(); n != 1<<30 {
		t.Fatalf("%d blocks are marked, want all", n)
	}
	wantReliable(t, tr)
}

func BenchmarkWrite4K(b *testing.B) {
	for _, tracked := range []bool{false, true} {
		name := "Untracked"
		if tracked {
			name = "Tracked"
		}
		b.Run(name, func(b *testing.B) {
			// A file in memory: what a write costs beside the tracking is small.
			file := filepath.Join("/dev/shm", "dsync-bench")
			if err := os.WriteFile(file, nil, 0o600); err != nil {
				b.Fatal(err)
			}
			b.Cleanup(func() { _ = os.Remove(file) })
			if err := os.Truncate(file, 256<<20); err != nil {
				b.Fatal(err)
			}
			device := attachLoop(b, file)
			if tracked {
				track(b, device)
			}
			f, buf := openDirect(b, device), alignedBuffer(kernel.BlockSize)
			ring := newURing(b)
			offsets := make([]int64, uringDepth)
			b.SetBytes(uringDepth * kernel.BlockSize)
			for i := 0; b.Loop(); i++ {
				for j := range offsets {
					offsets[j] = int64((i*uringDepth+j)*7919%65536) * kernel.BlockSize
				}
				ring.write(b, f, buf, offsets)
			}
		})
	}
}

func BenchmarkRotate4TiB(b *testing.B) {
	device, _ := newLoop(b, 4<<40)
	tr := track(b, device)
	for b.Loop() {
		rotate(b, tr)
	}
	var use unix.Rusage
	_ = unix.Getrusage(unix.RUSAGE_SELF, &use)
	b.ReportMetric(float64(use.Maxrss)/1024, "MiB-max-resident")
}
