// SPDX-License-Identifier: BSD-2-Clause

package systemtest

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/snapshot"
	"github.com/dsync-backup/dsync-backup/snapshot/device"
)

// compressed is what the data takes when 1 MiB pieces of it are compressed by
// themselves, as the repository compresses them. What does not get smaller
// counts as it is.
func compressed(t testing.TB, data []byte) (n int64) {
	t.Helper()
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedDefault), zstd.WithEncoderCRC(false), zstd.WithWindowSize(1<<20))
	if err != nil {
		t.Fatal(err)
	}
	defer enc.Close()
	for len(data) > 0 {
		piece := data[:min(len(data), 1<<20)]
		data = data[len(piece):]
		n += int64(min(len(enc.EncodeAll(piece, nil)), len(piece)))
	}
	return n
}

// bounded checks invariant I6 of one backup, by its summary and by how much
// the repository grew. reads is what it may read at most.
func bounded(t *testing.T, s snapshot.Summary, dirty []byte, grown, reads int64) {
	t.Helper()
	least := compressed(t, dirty)
	bound := int64(float64(least)*1.02) + 64<<10
	added, merged := s.DataAddedPacked+s.MetadataAddedPacked, s.MergeAddedPacked
	t.Logf("dirty %d bytes (compressed alone %d, %.2f:1), read %d; data %d + metadata %d = %d stored (%+.2f %%), merging %d, grown by %d; bound %d; %.2f s",
		len(dirty), least, float64(len(dirty))/float64(least), s.BytesRead, s.DataAddedPacked, s.MetadataAddedPacked,
		added, 100*float64(added-least)/float64(least), merged, grown, bound, s.DurationSeconds)
	if s.DirtyBytes != int64(len(dirty)) {
		t.Errorf("dirty_bytes is %d, %d bytes were written", s.DirtyBytes, len(dirty))
	}
	if s.BytesRead > reads {
		t.Errorf("read %d bytes, at most %d are allowed", s.BytesRead, reads)
	}
	if added > bound {
		t.Errorf("the summary says that %d bytes were added, the bound is %d", added, bound)
	}
	// It is bounded over many backups. What it merges here is little more than this backup's own.
	if merged > least*8/100+64<<10 {
		t.Errorf("merging layers added %d bytes to %d", merged, least)
	}
	// What compresses in C may find a little more than what compressed alone is measured by.
	if grown < least*97/100 {
		t.Errorf("the repository grew by %d bytes, less than what was to be stored, %d: something is missing", grown, least)
	}
	if diff := grown - added - merged; diff < -1024 || diff > 1024 {
		t.Errorf("the summary says %d bytes were added and %d by merging, the repository grew by %d", added, merged, grown)
	}
}

func tenthMore(n int) int64 { return int64(n) * 11 / 10 }

// grownBackup backs up and says how much the repository grew.
func (e *env) grownBackup(args ...string) (snapshot.Summary, int64) {
	e.t.Helper()
	before := stored(e.t, e.repo)
	s := e.backup(args...)
	return s, stored(e.t, e.repo) - before
}

// base is how much of a device holds data before the first backup.
func base() int64 { return int64(count(4<<10, 64)) << 20 }

func TestIncrementalOfOnePercentCostsWhatChanged(t *testing.T) {
	for name, compressible := range map[string]bool{"Compressible": true, "Random": false} {
		t.Run(name, func(t *testing.T) {
			const size = 4 << 30
			r := random(t)
			c := newContent(r, compressible)
			e, d := lightEnv(t), newDisk(t, size)
			f := direct(t, d.path)
			fillRange(t, f, c, 0, base())
			d.track(e)
			e.backup(d.path)

			blocks := someBlocks(r, size, size/kernel.BlockSize/100)
			dirty := writeBlocks(t, f, c, blocks)
			s, grown := e.grownBackup(d.path)
			if s.Changes != snapshot.ChangesTracker {
				t.Fatalf("changes are from %s: %s", s.Changes, s.FallbackReason)
			}
			bounded(t, s, dirty, grown, tenthMore(len(dirty)))
			sameSparse(t, d.file, e.restored("latest"))
			if compressible {
				e.check()
			}
		})
	}
}

func TestFewBlocksOfAHugeSparseDeviceCostWhatChanged(t *testing.T) {
	const size = 4 << 40
	r := random(t)
	c := newContent(r, true)
	e, d := lightEnv(t), newDisk(t, size)
	f := direct(t, d.path)
	first := writeBlocks(t, f, c, someBlocks(r, size, 100))
	d.track(e)
	full := e.backup(d.path)
	t.Logf("full backup of 4 TiB with %d bytes of data: read %d, %.2f s", len(first), full.BytesRead, full.DurationSeconds)
	if full.Changes != snapshot.ChangesFull || full.BytesRead > tenthMore(len(first)) {
		t.Errorf("changes %s: read %d bytes of a device with %d bytes of data: holes are to be skipped", full.Changes, full.BytesRead, len(first))
	}

	dirty := writeBlocks(t, f, c, someBlocks(r, size, 2000))
	s, grown := e.grownBackup(d.path)
	if s.Changes != snapshot.ChangesTracker {
		t.Fatalf("changes are from %s: %s", s.Changes, s.FallbackReason)
	}
	bounded(t, s, dirty, grown, tenthMore(len(dirty)))
	sameSparse(t, d.file, e.restored("latest"))
	e.restic("0.18", "check", "--read-data")
}

func TestChangedRangesFromAFileCostWhatChanged(t *testing.T) {
	const size = 1 << 30
	r := random(t)
	c := newContent(r, true)
	e, d := lightEnv(t), newDisk(t, size)
	f := direct(t, d.path)
	fillRange(t, f, c, 0, 64<<20)
	e.backup(d.path)

	blocks := someBlocks(r, size, 2000)
	dirty := writeBlocks(t, f, c, blocks)
	var list bytes.Buffer
	for _, i := range r.Perm(len(blocks)) { // in any order, and not aligned
		fmt.Fprintf(&list, "{\"offset\":%d,\"length\":%d}\n", blocks[i]*kernel.BlockSize+512, 1024)
	}
	ranges := filepath.Join(t.TempDir(), "ranges")
	if err := os.WriteFile(ranges, list.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	s, grown := e.grownBackup(d.path, "--changes", ranges)
	if s.Changes != snapshot.ChangesRanges {
		t.Fatalf("changes are from %s", s.Changes)
	}
	bounded(t, s, dirty, grown, tenthMore(len(dirty)))
	sameSparse(t, d.file, e.restored("latest"))
}

func TestCompareOfAnImageStoresOnlyWhatChanged(t *testing.T) {
	const size = 256 << 20
	r := random(t)
	c := newContent(r, true)
	e := lightEnv(t)
	image := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(image, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, size); err != nil {
		t.Fatal(err)
	}
	f := direct(t, image)
	fillRange(t, f, c, 0, size/2)
	e.backup(image)

	blocks := someBlocks(r, size, 2000)
	dirty := writeBlocks(t, f, c, blocks)
	// Blocks that are written with what they held have not changed.
	same := device.AlignedBuffer(1 << 20)
	if _, err := f.ReadAt(same, 8<<20); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(same, 8<<20); err != nil {
		t.Fatal(err)
	}
	s, grown := e.grownBackup(image)
	if s.Changes != snapshot.ChangesCompare || s.FallbackReason != "" {
		t.Fatalf("changes are from %s: %q", s.Changes, s.FallbackReason)
	}
	bounded(t, s, dirty, grown, size)
	if s.BytesRead < size/2 {
		t.Errorf("read %d bytes: to compare, all the data are to be read", s.BytesRead)
	}
	sameSparse(t, image, e.restored("latest"))
}
