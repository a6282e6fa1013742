// SPDX-License-Identifier: BSD-2-Clause

package bpf

import (
	"cmp"
	"fmt"
	"io"
	"math/bits"
	"os"
	"slices"
	"sync/atomic"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel"
)

// windowWords is how much of a bitmap of the kernel side is mapped into this process at a time,
// in words: 8 MiB. Of a bitmap of 128 MiB, more would only count as this process's memory.
const windowWords = 1 << 20

// window maps a part of one or more bitmaps, of which first is the number of the first word, and
// hands it out: the very memory in which the programs set bits.
func window(maps []*ebpf.Map, first, protection int, fn func(w [][]uint64)) error {
	page := os.Getpagesize()
	have := min(windowWords, int(maps[0].MaxEntries())-first)
	var views [][]uint64
	for _, m := range maps {
		b, err := unix.Mmap(m.FD(), int64(first)*8, (have*8+page-1)/page*page, protection, unix.MAP_SHARED)
		if err != nil {
			return fmt.Errorf("map the kernel's bitmap: %w", err)
		}
		defer func() { _ = unix.Munmap(b) }()
		views = append(views, unsafe.Slice((*uint64)(unsafe.Pointer(&b[0])), have))
	}
	fn(views)
	return nil
}

// windows hands out the words of one or two bitmaps of the same length, a
// window at a time; first is the number of its first word.
func windows(maps []*ebpf.Map, protection int, fn func(first int, w [][]uint64)) error {
	for first := 0; first < int(maps[0].MaxEntries()); first += windowWords {
		if err := window(maps, first, protection, func(w [][]uint64) { fn(first, w) }); err != nil {
			return err
		}
	}
	return nil
}

// covers fails if the kernel's bitmap m has no place for some of b: those blocks would be missed.
func covers(m *ebpf.Map, b *kernel.Bitmap) error {
	if have := int64(m.MaxEntries()); have < int64(b.Words()) {
		return fmt.Errorf("the kernel's bitmap has %d words, and %d are needed for %d blocks", have, b.Words(), b.Blocks())
	}
	return nil
}

// addMap unites a bitmap of the kernel's into b.
func addMap(b *kernel.Bitmap, m *ebpf.Map) error {
	if err := covers(m, b); err != nil {
		return err
	}
	n := b.Words()
	return windows([]*ebpf.Map{m}, unix.PROT_READ, func(first int, w [][]uint64) {
		for i := range min(len(w[0]), n-first) {
			if v := atomic.LoadUint64(&w[0][i]); v != 0 {
				b.OrWord(first+i, v)
			}
		}
	})
}

// countUnion is how many of the first blocks are marked in either bitmap.
func countUnion(maps [2]*ebpf.Map, blocks int64) (count int64, err error) {
	err = windows(maps[:], unix.PROT_READ, func(first int, w [][]uint64) {
		for i := range w[0] {
			v := atomic.LoadUint64(&w[0][i]) | atomic.LoadUint64(&w[1][i])
			if v == 0 {
				continue
			}
			switch beyond := int64(first+i+1)*64 - blocks; {
			case beyond >= 64:
				continue
			case beyond > 0:
				v &= ^uint64(0) >> beyond
			}
			count += int64(bits.OnesCount64(v))
		}
	})
	return count, err
}

// mark sets in a bitmap of the kernel's what is marked in b, beside the programs that may be
// doing the same.
func mark(m *ebpf.Map, b *kernel.Bitmap) error {
	if err := covers(m, b); err != nil {
		return err
	}
	for i := b.NextSet(0); i < b.Blocks(); {
		first := int(i/64) / windowWords * windowWords
		err := window([]*ebpf.Map{m}, first, unix.PROT_READ|unix.PROT_WRITE, func(w [][]uint64) {
			end := int64(first+len(w[0])) * 64
			for ; i < min(end, b.Blocks()); i = b.NextSet(i/64*64 + 64) {
				atomic.OrUint64(&w[0][int(i/64)-first], b.Word(int(i/64)))
			}
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// wipeMap clears a bitmap that no program writes to any more. To look is cheaper
// than to write, and most words are clear.
func wipeMap(m *ebpf.Map) error {
	return windows([]*ebpf.Map{m}, unix.PROT_READ|unix.PROT_WRITE, func(_ int, w [][]uint64) {
		for i, v := range w[0] {
			if v != 0 {
				w[0][i] = 0
			}
		}
	})
}

const (
	// fewWords is of how many words one, at most, is marked for wipeWords to go to them one
	// by one: each takes as long as so many in a walk over all, or a little longer.
	fewWords  = 32
	wordBatch = 4096
)

// wipeWords clears a bitmap that no program writes to any more, and of which b has
// everything that is marked: if that is little, without a look at the rest.
func wipeWords(m *ebpf.Map, b *kernel.Bitmap) error {
	var keys []uint32
	for i := b.NextSet(0); i < b.Blocks(); i = b.NextSet(i/64*64 + 64) {
		if keys = append(keys, uint32(i/64)); len(keys) > int(m.MaxEntries())/fewWords {
			return wipeMap(m)
		}
	}
	zeros := make([]uint64, min(len(keys), wordBatch))
	for batch := range slices.Chunk(keys, wordBatch) {
		if n, err := m.BatchUpdate(batch, zeros[:len(batch)], nil); err != nil || n != len(batch) {
			return fmt.Errorf("wipe the kernel's bitmap: %d of %d words: %w", n, len(batch), cmp.Or(err, io.ErrShortWrite))
		}
	}
	return nil
}
