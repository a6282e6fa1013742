// SPDX-License-Identifier: BSD-2-Clause

package systemtest

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/snapshot"
	"github.com/dsync-backup/dsync-backup/snapshot/device"
)

// grandfather is a policy as people have it.
var grandfather = []string{"--keep-hourly", "24", "--keep-daily", "7", "--keep-weekly", "4", "--keep-monthly", "12"}

// probed is what may be read of a device beside what changed, to know what it is: its
// superblock, with what the kernel reads ahead.
const probed = 256 << 10

// years is a device that is backed up each hour of a simulated clock. A block's
// content is named by a number: 0 is zeros, and any other makes it.
type years struct {
	*env
	r     *rand.Rand
	seed  uint64
	words []byte
	disk  *disk
	f     *os.File
	clock time.Time

	blocks []uint32            // what the device holds now
	next   uint32              // the newest content
	kept   map[string][]uint32 // what each snapshot has to give
	order  []string            // their IDs, oldest first

	hours                                      int
	least, merged, copied, dirty, read, stored int64 // since the first
	layers                                     int   // the most

	forgotten, pruned map[bool]int // snapshots and packs that ours (true) and restic removed
}

func newYears(e *env, size int64) *years {
	e.t.Helper()
	y := &years{
		env: e, r: random(e.t), clock: time.Date(2024, 1, 1, 0, 30, 0, 0, time.Local),
		blocks: make([]uint32, size/kernel.BlockSize), kept: map[string][]uint32{},
		forgotten: map[bool]int{}, pruned: map[bool]int{},
	}
	y.seed, y.words = y.r.Uint64(), newContent(y.r, true).words
	y.disk = newDisk(e.t, size)
	y.f = direct(e.t, y.disk.path)
	for i := range y.blocks {
		y.next++
		y.blocks[i] = y.next
	}
	y.write(kernel.Extent{Length: size})
	return y
}

// content is that of a block, by its number.
func (y *years) content(b []byte, number uint32) {
	if number == 0 {
		clear(b)
		return
	}
	c := content{r: rand.New(rand.NewPCG(y.seed, uint64(number))), words: y.words}
	c.fill(b)
}

// write brings a range of the device to what blocks say.
func (y *years) write(e kernel.Extent) {
	y.t.Helper()
	buf := device.AlignedBuffer(1 << 20)
	for e.Length > 0 {
		n := min(e.Length, int64(len(buf)))
		for at := int64(0); at < n; at += kernel.BlockSize {
			y.content(buf[at:at+kernel.BlockSize], y.blocks[(e.Offset+at)/kernel.BlockSize])
		}
		if _, err := y.f.WriteAt(buf[:n], e.Offset); err != nil {
			y.t.Fatal(err)
		}
		e.Offset, e.Length = e.Offset+n, e.Length-n
	}
}

// hour is the load of an hour: about 1 % of the device is written, in runs of up
// to 16 blocks. Nine of ten lie in the tenth of the device that is hot (every
// tenth stretch of 1 MiB), the others anywhere; some are zeros. It returns what
// was written.
func (y *years) hour() (ranges []kernel.Extent) {
	y.t.Helper()
	const stretch = 1 << 20 / kernel.BlockSize
	total := int64(len(y.blocks))
	written := map[int64]bool{}
	for int64(len(written)) < total/100 {
		at := y.r.Int64N(total)
		if y.r.IntN(10) > 0 {
			hot := max(1, total/stretch/10)
			at = y.r.Int64N(hot)*10*stretch + y.r.Int64N(stretch)
		}
		n := 1 + y.r.Int64N(1+y.r.Int64N(16))
		zero := y.r.IntN(20) == 0
		for i := at; i < min(at+n, total); i++ {
			y.next++
			y.blocks[i], written[i] = y.next, true
			if zero {
				y.blocks[i] = 0
			}
		}
	}
	for i := range written {
		ranges = append(ranges, kernel.Extent{Offset: i * kernel.BlockSize, Length: kernel.BlockSize})
	}
	ranges = kernel.Align(ranges, total*kernel.BlockSize)
	for _, e := range ranges {
		y.write(e)
	}
	return ranges
}

// back makes the backup of an hour and holds it to I6.
func (y *years) back() {
	y.t.Helper()
	at := "--time=" + y.clock.Format("2006-01-02 15:04:05")
	y.clock = y.clock.Add(time.Hour)
	var s snapshot.Summary
	if len(y.order) == 0 {
		s = y.backup(at, y.disk.path)
		y.stored = s.DataAddedPacked
	} else {
		y.hours++
		ranges := y.hour()
		var list bytes.Buffer
		enc := json.NewEncoder(&list)
		for _, e := range ranges {
			if err := enc.Encode(e); err != nil {
				y.t.Fatal(err)
			}
		}
		file := filepath.Join(y.t.TempDir(), "ranges")
		if err := os.WriteFile(file, list.Bytes(), 0o644); err != nil {
			y.t.Fatal(err)
		}
		var grown int64
		before := y.disk.bytesRead()
		s, grown = y.grownBackup(at, "--changes", file, y.disk.path)
		y.bounds(s, ranges, grown, y.disk.bytesRead()-before)
	}
	y.kept[s.SnapshotID.String()] = slices.Clone(y.blocks)
	y.order = append(y.order, s.SnapshotID.String())
}

// bounds checks I6 of one backup, and that the chain is short. read is what the
// device says was read of it.
func (y *years) bounds(s snapshot.Summary, ranges []kernel.Extent, grown, read int64) {
	y.t.Helper()
	total := kernel.TotalLength(ranges)
	dirty := make([]byte, 0, total)
	for _, e := range ranges {
		for at := e.Offset; at < e.End(); at += kernel.BlockSize {
			if n := y.blocks[at/kernel.BlockSize]; n != 0 {
				dirty = dirty[:len(dirty)+kernel.BlockSize]
				y.content(dirty[len(dirty)-kernel.BlockSize:], n)
			}
		}
	}
	least := compressed(y.t, dirty)
	added := s.DataAddedPacked + s.MetadataAddedPacked
	if s.Changes != snapshot.ChangesRanges || s.DirtyBytes != total {
		y.t.Fatalf("hour %d: %d bytes were written: %+v", y.hours, total, s)
	}
	if bound := least*102/100 + 64<<10; added > bound {
		y.t.Errorf("hour %d: %d bytes were added for %d that compress to %d, the bound is %d", y.hours, added, len(dirty), least, bound)
	}
	if s.CopiedForwardBytes > total/4 || s.CopiedForwardPacked > s.CopiedForwardBytes+4096 {
		y.t.Errorf("hour %d: %d bytes were copied forward, as %d, of %d that changed", y.hours, s.CopiedForwardBytes, s.CopiedForwardPacked, total)
	}
	if sum := added + s.MergeAddedPacked + s.CopiedForwardPacked; sum < grown-1024 || sum > grown+1024 {
		y.t.Errorf("hour %d: the repository grew by %d, and the summary says %d: %+v", y.hours, grown, sum, s)
	}
	if most := total + total/4 + probed; s.BytesRead > total || read > most {
		y.t.Errorf("hour %d: %d bytes were read of the device, %d by the summary, of %d that changed; at most %d are allowed", y.hours, read, s.BytesRead, total, most)
	}
	if s.Layers > 16 {
		y.t.Errorf("hour %d: %d layers", y.hours, s.Layers)
	}
	y.layers = max(y.layers, s.Layers)
	y.least, y.merged = y.least+least, y.merged+s.MergeAddedPacked
	y.copied, y.dirty, y.stored = y.copied+s.CopiedForwardBytes, y.dirty+total, y.stored+added
	y.read += read
}

// retain forgets and prunes, with ours or with restic.
func (y *years) retain(ours bool) {
	y.t.Helper()
	packs := y.files("data")
	if ours {
		y.must(append([]string{"-q", "forget", "--prune"}, grandfather...)...)
	} else {
		y.restic("0.18", append([]string{"forget", "--prune"}, grandfather...)...)
	}
	ids := y.snapshotIDs()
	y.forgotten[ours] += len(y.order) - len(ids)
	for _, p := range packs {
		if _, err := os.Stat(p); err != nil {
			y.pruned[ours]++
		}
	}
	gone := func(id string) bool { return !slices.Contains(ids, id) }
	y.order = slices.DeleteFunc(y.order, gone)
	for id := range y.kept {
		if gone(id) {
			delete(y.kept, id)
		}
	}
	if len(ids) != len(y.order) {
		y.t.Fatalf("%d snapshots are there, %d are known", len(ids), len(y.order))
	}
}

// right has stock restic read everything, and has n random snapshots given back:
// the first by restore, the others by dump.
func (y *years) right(n int) {
	y.t.Helper()
	y.restic("0.18", "check", "--read-data")
	for i, k := range y.r.Perm(len(y.order))[:min(n, len(y.order))] {
		if id := y.order[k]; i == 0 {
			y.restores(id)
		} else {
			y.dumps(id)
		}
	}
}

func (y *years) restores(id string) {
	y.t.Helper()
	file := y.restored(id)
	f, err := os.Open(file)
	if err != nil {
		y.t.Fatal(err)
	}
	y.same(id, f)
	if err := errors.Join(f.Close(), os.Remove(file)); err != nil {
		y.t.Fatal(err)
	}
}

func (y *years) dumps(id string) {
	y.t.Helper()
	cmd := y.command("-q", "dump", id)
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		y.t.Fatal(err)
	}
	y.same(id, out)
	if err := cmd.Wait(); err != nil {
		y.t.Fatalf("dump %s: %v", id, err)
	}
}

// same fails the test if an image is not what the device held.
func (y *years) same(id string, image io.Reader) {
	y.t.Helper()
	got, want := make([]byte, kernel.BlockSize), make([]byte, kernel.BlockSize)
	for i, number := range y.kept[id] {
		if _, err := io.ReadFull(image, got); err != nil {
			y.t.Fatalf("snapshot %s: %v", id, err)
		}
		if y.content(want, number); !bytes.Equal(got, want) {
			y.t.Fatalf("snapshot %s: block %d is not as it was (content %d)", id, i, number)
		}
	}
	if n, _ := io.Copy(io.Discard, image); n > 0 {
		y.t.Fatalf("snapshot %s: %d bytes too many", id, n)
	}
}

// live is what the distinct blocks of all kept snapshots compress to, those of
// each that no older one has, in device order.
func (y *years) live() (packed, plain int64) {
	seen := map[uint32]bool{0: true}
	data := make([]byte, 0, 16<<20)
	for _, id := range y.order {
		for _, number := range y.kept[id] {
			if !seen[number] {
				seen[number] = true
				data = data[:len(data)+kernel.BlockSize]
				y.content(data[len(data)-kernel.BlockSize:], number)
			}
			if len(data) == cap(data) {
				packed, plain, data = packed+compressed(y.t, data), plain+int64(len(data)), data[:0]
			}
		}
		packed, plain, data = packed+compressed(y.t, data), plain+int64(len(data)), data[:0]
	}
	return packed, plain
}

// pass runs hours of it, a day at a time.
func (y *years) pass(hours int, ours func() bool, restores int) {
	y.t.Helper()
	y.back()
	for h := 1; h <= hours; h++ {
		y.back()
		if h%24 == 0 || h == hours {
			y.retain(ours())
		}
		if h*10/hours > (h-1)*10/hours {
			y.right(restores)
		}
		if y.t.Failed() {
			y.t.FailNow()
		}
	}
	packed, plain := y.live()
	size := stored(y.t, y.repo)
	y.t.Logf("%d hours: at most %d layers; %d snapshots are kept, with %d MiB that compress to %d MiB; the repository has %d MiB: %.2f times that",
		y.hours, y.layers, len(y.order), plain>>20, packed>>20, size>>20, float64(size)/float64(packed))
	y.t.Logf("ours removed %d snapshots and %d packs, restic %d and %d", y.forgotten[true], y.pruned[true], y.forgotten[false], y.pruned[false])
	y.t.Logf("for %d MiB that compress to %d MiB, merging added %.1f %%, copied forward were %.1f %%, read were %.1f %%",
		y.dirty>>20, y.least>>20, 100*float64(y.merged)/float64(y.least), 100*float64(y.copied)/float64(y.dirty), 100*float64(y.read)/float64(y.dirty))
	if float64(size) > 1.6*float64(packed) {
		y.t.Errorf("the repository has %d bytes, more than 1.6 times %d", size, packed)
	}
	if y.merged > y.least*8/100 {
		y.t.Errorf("merging added %d bytes to %d", y.merged, y.least)
	}
}

// TestYearsOfBackups: see docs/retention.md.
func TestYearsOfBackups(t *testing.T) {
	t.Parallel()
	y := newYears(lightEnv(t), int64(count(2<<10, 256))<<20)
	y.pass(count(1000, 120), func() bool { return true }, 5)
}

// TestYearsOfBackupsWithRestic: stock restic does each forget and prune, or the
// two take turns.
func TestYearsOfBackupsWithRestic(t *testing.T) {
	t.Parallel()
	for _, turns := range []bool{false, true} {
		t.Run(map[bool]string{false: "ResticOnly", true: "Turns"}[turns], func(t *testing.T) {
			y := newYears(lightEnv(t), int64(count(2<<10, 64))<<20)
			ours, days := false, 0
			y.pass(count(1000, 60), func() bool {
				// At random, but of the second and third day, the fourth and fifth and so
				// on each has one: on the first there is nothing to forget yet.
				if days++; turns && days%2 == 1 && days > 1 {
					ours = !ours
				} else if turns {
					ours = y.r.IntN(2) == 0
				}
				return ours
			}, 2)
			for _, who := range []bool{false, true} {
				if did := y.forgotten[who] > 0 && y.pruned[who] > 0; did != (turns || !who) {
					t.Errorf("ours %t: %d snapshots and %d packs were removed", who, y.forgotten[who], y.pruned[who])
				}
			}
		})
	}
}
