// SPDX-License-Identifier: BSD-2-Clause

package bpf

import (
	"fmt"
	"math/bits"
	"os"
	"sync/atomic"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel"
)

// words is a bitmap of the kernel side, mapped into this process: the very
// memory in which the programs set bits.
type words struct {
	mapping []byte
	w       []uint64
}

func mapWords(m *ebpf.Map) (*words, error) {
	n := int(m.MaxEntries())
	page := os.Getpagesize()
	b, err := unix.Mmap(m.FD(), 0, (n*8+page-1)/page*page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map the kernel's bitmap: %w", err)
	}
	return &words{b, unsafe.Slice((*uint64)(unsafe.Pointer(&b[0])), n)}, nil
}

func (w *words) close() { _ = unix.Munmap(w.mapping) }

// windowWords is how much of a bitmap is mapped at a time to be read, in words:
// 8 MiB. Of a bitmap of 128 MiB, more would only count as this process's memory.
const windowWords = 1 << 20

// readWindows hands out the words of one or two bitmaps of the same length, a
// window at a time; first is the number of its first word.
func readWindows(maps []*ebpf.Map, fn func(first int, w [][]uint64)) error {
	page := os.Getpagesize()
	n := int(maps[0].MaxEntries())
	for first := 0; first < n; first += windowWords {
		have := min(windowWords, n-first)
		var views [][]uint64
		err := func() error {
			for _, m := range maps {
				b, err := unix.Mmap(m.FD(), int64(first)*8, (have*8+page-1)/page*page, unix.PROT_READ, unix.MAP_SHARED)
				if err != nil {
					return fmt.Errorf("map the kernel's bitmap: %w", err)
				}
				defer func() { _ = unix.Munmap(b) }()
				views = append(views, unsafe.Slice((*uint64)(unsafe.Pointer(&b[0])), have))
			}
			fn(first, views)
			return nil
		}()
		if err != nil {
			return err
		}
	}
	return nil
}

// addMap unites a bitmap of the kernel's into b.
func addMap(b *kernel.Bitmap, m *ebpf.Map) error {
	n := b.Words()
	return readWindows([]*ebpf.Map{m}, func(first int, w [][]uint64) {
		for i := range min(len(w[0]), n-first) {
			if v := atomic.LoadUint64(&w[0][i]); v != 0 {
				b.OrWord(first+i, v)
			}
		}
	})
}

// countUnion is how many of the first blocks are marked in either bitmap.
func countUnion(maps [2]*ebpf.Map, blocks int64) (count int64, err error) {
	err = readWindows(maps[:], func(first int, w [][]uint64) {
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

// set marks blocks from first to last, both included, beside the programs that
// may be doing the same.
func (w *words) set(first, last int64) {
	for i := first / 64; i <= last/64; i++ {
		mask := ^uint64(0)
		if i == first/64 {
			mask &= ^uint64(0) << (first % 64)
		}
		if i == last/64 {
			mask &= ^uint64(0) >> (63 - last%64)
		}
		atomic.OrUint64(&w.w[i], mask)
	}
}

// clear wipes a bitmap that no program writes to any more. To look is cheaper
// than to write, and most words are clear.
func (w *words) clear() {
	for i, v := range w.w {
		if v != 0 {
			w.w[i] = 0
		}
	}
}
