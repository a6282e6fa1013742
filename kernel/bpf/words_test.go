// SPDX-License-Identifier: BSD-2-Clause

package bpf

import (
	"math/rand/v2"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel"
)

// A bitmap of more than one window reads as what was set in it, also at the
// windows' borders and at its end, where bits beyond the last block do not count.
func TestBitmapsAreReadInWindows(t *testing.T) {
	const words = 2*windowWords + 513
	var maps [2]*ebpf.Map
	blocks := int64(words)*64 - 37
	want := kernel.NewBitmap(blocks)
	r := rand.New(rand.NewPCG(8, 1))
	for i := range maps {
		m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: words, Flags: unix.BPF_F_MMAPABLE})
		if err != nil {
			t.Fatal(err)
		}
		defer m.Close()
		maps[i] = m
		some := []int64{0, 63, windowWords*64 - 1, windowWords * 64, 2*windowWords*64 - 1, 2 * windowWords * 64, blocks - 1}[i:]
		for range 1000 {
			some = append(some, r.Int64N(blocks))
		}
		one, marks := kernel.NewBitmap(blocks), kernel.NewBitmap(words*64)
		for _, b := range some {
			marks.Set(b)
			one.Set(b)
		}
		marks.SetRange(blocks, words*64-1) // beyond the end
		if err := mark(m, marks); err != nil {
			t.Fatal(err)
		}
		got := kernel.NewBitmap(blocks)
		if err := addMap(got, m); err != nil {
			t.Fatal(err)
		}
		same(t, got, one)
		if err := want.Or(one); err != nil {
			t.Fatal(err)
		}
	}
	if n, err := countUnion(maps, blocks); err != nil || n != want.Count() {
		t.Errorf("%d blocks are counted, %d are set: %v", n, want.Count(), err)
	}
	same(t, want.Clone(), want)
	if larger := kernel.NewBitmap(words*64 + 1); addMap(larger, maps[0]) == nil || mark(maps[0], larger) == nil {
		t.Error("a bitmap passes for one of a larger device")
	}
	if err := wipeMap(maps[0]); err != nil {
		t.Fatal(err)
	}
	if n, err := countUnion([2]*ebpf.Map{maps[0], maps[0]}, blocks); err != nil || n != 0 {
		t.Errorf("%d blocks are left: %v", n, err)
	}
}

// What is marked in a bitmap is wiped: little of it word by word, much of it in one walk.
func TestWhatIsMarkedIsWiped(t *testing.T) {
	const words = 1 << 17
	blocks := int64(words)*64 - 5
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: words, Flags: unix.BPF_F_MMAPABLE})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	r := rand.New(rand.NewPCG(8, 2))
	for _, step := range []int64{1 << 40, 50_000, 5000, 1500} { // the last one marks more than a few words
		b := kernel.NewBitmap(blocks)
		for i := int64(0); i < blocks; i += 1 + r.Int64N(2*step) {
			b.Set(i)
		}
		b.Set(blocks - 1)
		if err := mark(m, b); err != nil {
			t.Fatal(err)
		}
		if err := wipeWords(m, b); err != nil {
			t.Fatal(err)
		}
		if n, err := countUnion([2]*ebpf.Map{m, m}, blocks); err != nil || n != 0 {
			t.Errorf("of %d blocks %d are left: %v", b.Count(), n, err)
		}
	}
}

func same(t *testing.T, got, want *kernel.Bitmap) {
	t.Helper()
	if got.Words() != want.Words() {
		t.Fatalf("%d words, want %d", got.Words(), want.Words())
	}
	for i := range want.Words() {
		if got.Word(i) != want.Word(i) {
			t.Fatalf("word %d: %x, want %x", i, got.Word(i), want.Word(i))
		}
	}
}
