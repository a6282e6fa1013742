// SPDX-License-Identifier: BSD-2-Clause

package restore

import (
	"maps"
	"slices"
	"sync"

	"github.com/dsync-backup/dsync-backup/kernel"
)

// hold keeps blocks of blobs that are scattered over a window until the blocks
// before them are written, so that both are one write: else a few thousand
// small changes would cut a device's long runs into as many small writes. It
// is filled before the other blobs of the window are fetched.
type hold struct {
	mu     sync.Mutex
	pieces map[int64][]byte // by offset; whole blocks
	bytes  int
	limit  int
}

// scattered reports whether most of what lies between a blob's first and last
// byte on the device comes from elsewhere.
func scattered(n *need) bool {
	var sum int64
	for _, s := range n.segs {
		sum += s.length
	}
	first, last := n.segs[0], n.segs[len(n.segs)-1]
	return last.off+last.length-first.off > 2*sum
}

// put takes a copy of whole blocks, unless there is no room.
func (h *hold) put(off int64, data []byte) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.bytes+len(data) > h.limit {
		return false
	}
	h.pieces[off] = slices.Clone(data)
	h.bytes += len(data)
	return true
}

// take gives up what begins at off, or nil.
func (h *hold) take(off int64) []byte {
	h.mu.Lock()
	defer h.mu.Unlock()
	data := h.pieces[off]
	delete(h.pieces, off)
	h.bytes -= len(data)
	return data
}

// offsets lists what is left, in device order.
func (h *hold) offsets() []int64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Sorted(maps.Keys(h.pieces))
}

// holder is a sink that holds what it can, and passes on the rest.
type holder struct {
	*batcher
	hold *hold
}

func (h holder) blob(segs []segment, plain []byte) error {
	for _, s := range segs {
		data := plain[s.in : s.in+s.length]
		if s.off%kernel.BlockSize == 0 && s.length%kernel.BlockSize == 0 && h.hold.put(s.off, data) {
			continue
		}
		if err := h.segment(s.off, data); err != nil {
			return err
		}
	}
	return nil
}
