// SPDX-License-Identifier: BSD-2-Clause

package moduletest

import (
	"fmt"
	"math/rand/v2"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel"
)

// What is marked equals what was written, block for block, for every kind of
// write, at any alignment, up to a last block that is short; reads and flushes
// mark nothing. All ways to read a bitmap agree.
func TestTheBitmapEqualsTheModel(t *testing.T) {
	// More than one bit of the summary, and an end inside of a block and a word.
	const size = 300<<20 + 3*sector
	d := onLoop(t, "exact", size)
	f := d.open(os.O_RDWR | unix.O_DIRECT)
	synced := d.open(os.O_RDWR | unix.O_DIRECT | unix.O_DSYNC)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	blocks := kernel.BlocksOf(size)
	rounds := 6
	if os.Getenv("SOAK") != "" {
		rounds = 50
	}
	for round := range rounds {
		model := kernel.NewBitmap(blocks)
		for range 150 {
			length := sector * (1 + rng.Int64N(64))
			switch rng.IntN(4) {
			case 0:
				length = block * (1 + rng.Int64N(16))
			case 1:
				length = sector
			}
			start := sector * rng.Int64N((size-length)/sector+1)
			if rng.IntN(3) == 0 {
				start = start / block * block
			}
			if rng.IntN(20) == 0 {
				start = size - length // the end
			}
			var err error
			mark := true
			switch rng.IntN(8) {
			case 0:
				_, err = f.ReadAt(aligned(length), start)
				mark = false
			case 1:
				err, mark = f.Sync(), false
			case 2:
				_, err = synced.WriteAt(aligned(length), start) // FUA, or a flush after
			case 3:
				err = rangeIoctl(f, unix.BLKDISCARD, start, length)
			case 4:
				length = min(length*200, size-start)
				err = rangeIoctl(f, unix.BLKDISCARD, start, length)
			case 5:
				err = rangeIoctl(f, unix.BLKZEROOUT, start, length)
			default:
				_, err = f.WriteAt(aligned(length), start)
			}
			if err != nil {
				t.Fatal(err)
			}
			if mark {
				model.SetRange(start/block, (start+length-1)/block)
			}
		}
		same(t, "active", d.bitmap("active"), model)
		same(t, "active by holes", d.byHoles("active"), model)
		if got := d.number("dirty"); got != model.Count() {
			t.Errorf("dirty is %d, not %d", got, model.Count())
		}
		same(t, "frozen", d.rotate(), model)
		same(t, "frozen by holes", d.byHoles("frozen"), model)
		same(t, "active after a rotation", d.bitmap("active"), kernel.NewBitmap(blocks))
		d.put(1, blocks-2)
		model.SetRange(1, 1)
		model.SetRange(blocks-2, blocks-2)
		same(t, "blocks", d.listed(), model)
		d.ack()
		same(t, "active after ack", d.bitmap("active"), blocksOf(blocks, 1, blocks-2))
		d.turn()
		if t.Failed() {
			t.Fatalf("in round %d", round)
		}
	}
	d.want("state valid", "dirty 0", "pending -", fmt.Sprintf("blocks %d", blocks), fmt.Sprintf("sectors %d", size/sector))
}

// The message mark marks the blocks that its sectors touch.
func TestMarkMarksWhatItSays(t *testing.T) {
	const size = 300 << 20
	d := onLoop(t, "marked", size)
	for _, r := range [][2]int64{{0, 1}, {7, 2}, {8, 8}, {9, 6}, {0, size / sector}, {32768*8 - 1, 2}, {size/sector - 1, 1}, {64 * 8, 64 * 8 * 3}, {100, 300000}} {
		d.tell("mark %d %d", r[0], r[1])
		model := kernel.NewBitmap(size / block)
		model.SetRange(r[0]/8, (r[0]+r[1]-1)/8)
		same(t, fmt.Sprint(r), d.turn(), model)
	}
}

// A piece of a bitmap reads as the same piece of the whole.
func TestBitmapsAreReadInPieces(t *testing.T) {
	const size = 2 << 30
	d := onLoop(t, "pieces", size)
	rng := rand.New(rand.NewPCG(1, 2))
	for range 500 {
		d.tell("mark %d %d", rng.Int64N(size/sector-100), 1+rng.Int64N(100))
	}
	whole, err := os.ReadFile(d.file("active"))
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(d.file("active"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for range 500 {
		at := rng.IntN(len(whole) + 10)
		piece := make([]byte, 1+rng.IntN(40000))
		n, _ := f.ReadAt(piece, int64(at))
		if want := min(len(piece), max(0, len(whole)-at)); n != want {
			t.Fatalf("%d bytes at %d: got %d, want %d", len(piece), at, n, want)
		}
		if n > 0 && string(piece[:n]) != string(whole[at:at+n]) {
			t.Fatalf("%d bytes at %d differ", n, at)
		}
	}
	if _, err := f.Seek(-1, 0); err == nil {
		t.Error("a seek before the beginning worked")
	}
}
