// SPDX-License-Identifier: BSD-2-Clause

package device

import (
	"os"
	"slices"
	"testing"
	"time"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/snapshot/device/looptest"
)

const mib = 1 << 20

func dataExtents(t *testing.T, path string) []kernel.Extent {
	t.Helper()
	got, err := open(t, path, Options{}).DataExtents(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func wantExtents(t *testing.T, got []kernel.Extent, want ...kernel.Extent) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Fatalf("data at %v, want %v", got, want)
	}
}

func TestDataExtentsOfFileSkipHoles(t *testing.T) {
	image := looptest.File(t, 100*mib+100)
	wantExtents(t, dataExtents(t, image))
	put(t, image, []byte("x"), 0)
	put(t, image, []byte("x"), 10*mib)
	put(t, image, []byte("x"), 100*mib+99)
	wantExtents(t, dataExtents(t, image),
		kernel.Extent{Offset: 0, Length: 4096},
		kernel.Extent{Offset: 10 * mib, Length: 4096},
		kernel.Extent{Offset: 100 * mib, Length: 100})
}

func TestDataExtentsOfSparseLoopDevice(t *testing.T) {
	const size = 4 << 40
	dev := looptest.Device(t, size)
	start := time.Now()
	wantExtents(t, dataExtents(t, dev))
	// A buffered write that nobody has synced is data all the same.
	put(t, dev, []byte("x"), 0)
	put(t, dev, []byte("x"), size-4096)
	put(t, dev, []byte("x"), 3<<40+12345)
	wantExtents(t, dataExtents(t, dev),
		kernel.Extent{Offset: 0, Length: 4096},
		kernel.Extent{Offset: 3<<40 + 12288, Length: 4096},
		kernel.Extent{Offset: size - 4096, Length: 4096})
	t.Logf("scanned 4 TiB twice in %v", time.Since(start))
	looptest.Run(t, "blkdiscard", "-o", "0", "-l", "4096", dev)
	if got := dataExtents(t, dev); len(got) != 2 {
		t.Fatalf("after a discard, data at %v", got)
	}
}

func TestDataExtentsFollowLoopOffsetsAndPartitions(t *testing.T) {
	image := looptest.File(t, 64*mib)
	put(t, image, []byte("x"), 5*mib)
	put(t, image, []byte("x"), 30*mib) // behind the partition
	p1 := looptest.AddPartition(t, looptest.Attach(t, image), 1, looptest.Partition{Start: 2048, Sectors: 16 * 2048})
	wantExtents(t, dataExtents(t, p1), kernel.Extent{Offset: 4 * mib, Length: 4096})
	part := looptest.Attach(t, image, "--offset", "1048576", "--sizelimit", "16777216")
	wantExtents(t, dataExtents(t, part), kernel.Extent{Offset: 4 * mib, Length: 4096})
	// Off the file system's blocks, an extent is widened, never cut.
	odd := looptest.Attach(t, image, "--offset", "1049088")
	wantExtents(t, dataExtents(t, odd),
		kernel.Extent{Offset: 4*mib - 4096, Length: 8192}, kernel.Extent{Offset: 29*mib - 4096, Length: 8192})
}

func TestDataExtentsOfMissingBackingFileAreNotZeros(t *testing.T) {
	image := looptest.File(t, 8*mib)
	dev := looptest.Attach(t, image)
	if err := os.Truncate(image, 5*mib); err != nil {
		t.Fatal(err)
	}
	wantExtents(t, dataExtents(t, dev), kernel.Extent{Offset: 5 * mib, Length: 3 * mib})
}

func TestDataExtentsAreWholeWhereHolesAreNotCertain(t *testing.T) {
	t.Run("LoopOnDevice", func(t *testing.T) {
		below := looptest.Device(t, 8*mib)
		wantExtents(t, dataExtents(t, looptest.Attach(t, below)), kernel.Extent{Offset: 0, Length: 8 * mib})
	})
	t.Run("OtherFileOfThatName", func(t *testing.T) {
		image := looptest.File(t, 8*mib)
		dev := looptest.Attach(t, image)
		if err := os.Remove(image); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(image, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(image, 8*mib); err != nil {
			t.Fatal(err)
		}
		wantExtents(t, dataExtents(t, dev), kernel.Extent{Offset: 0, Length: 8 * mib})
	})
}

func TestSparseExtentsHoldEverythingThatIsNotZero(t *testing.T) {
	for _, fsType := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(fsType, func(t *testing.T) {
			outer := looptest.Device(t, looptest.MinSize)
			looptest.Mkfs(t, fsType, outer)
			dir := looptest.Mount(t, outer)
			image := dir + "/image"
			put(t, image, nil, 0)
			if err := os.Truncate(image, 48*mib); err != nil {
				t.Fatal(err)
			}
			dev := looptest.Attach(t, image)
			model := make([]byte, 48*mib)
			_, rng := random(t, t.TempDir()+"/seed", 1)
			for range 200 {
				n := 1 + rng.IntN(9000)
				off := rng.IntN(len(model) - n)
				chunk := make([]byte, n)
				for i := range chunk {
					chunk[i] = byte(1 + rng.IntN(255))
				}
				copy(model[off:], chunk)
				put(t, dev, chunk, int64(off))
			}
			d := open(t, dev, Options{})
			extents, err := d.DataExtents(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			got := make([]byte, len(model))
			for _, e := range extents {
				if err := d.ReadExtent(t.Context(), got[e.Offset:e.End()], e.Offset); err != nil {
					t.Fatal(err)
				}
			}
			if string(got) != string(model) {
				t.Fatal("something that is not zero lies outside the extents")
			}
			if n := kernel.TotalLength(extents); n > 40*mib {
				t.Fatalf("%d bytes of data: the holes are not used", n)
			}
		})
	}
}
