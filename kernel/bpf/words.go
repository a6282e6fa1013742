// SPDX-License-Identifier: BSD-2-Clause

package bpf

import (
	"fmt"
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

// addTo unites the kernel's bitmap into b.
func (w *words) addTo(b *kernel.Bitmap) {
	for i, dst := 0, b.Words(); i < len(dst); i++ {
		dst[i] |= atomic.LoadUint64(&w.w[i])
	}
	b.Trim()
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

// clear wipes a bitmap that no program writes to any more.
func (w *words) clear() { clear(w.w) }
