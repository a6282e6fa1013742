// SPDX-License-Identifier: BSD-2-Clause

package freeze

import (
	"fmt"
	"io"
	"sync"
)

// HoldOutput passes writes on, except while it holds: then it keeps them in
// memory, up to a bound. Whoever reads our standard output may write it to
// the very file system that is frozen; a full pipe would then stop us, and so
// the thaw. It may be used from many goroutines.
type HoldOutput struct {
	mu      sync.Mutex // held over a write to w
	w       io.Writer
	limit   int
	holding bool
	held    []byte
	lost    int // bytes that did not fit
}

// NewHoldOutput wraps w; at most limit bytes are kept while holding, and what
// comes after them is dropped and counted.
func NewHoldOutput(w io.Writer, limit int) *HoldOutput {
	return &HoldOutput{w: w, limit: limit}
}

// Write never blocks, and never fails, while holding.
func (h *HoldOutput) Write(p []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.holding {
		return h.w.Write(p)
	}
	// A write is kept whole or not at all, so that lines stay lines.
	if h.lost > 0 || len(h.held)+len(p) > h.limit {
		h.lost += len(p)
		return len(p), nil
	}
	h.held = append(h.held, p...)
	return len(p), nil
}

// Hold waits for a write that is under way, and keeps every later one.
func (h *HoldOutput) Hold() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.holding = true
	if h.held == nil {
		h.held = make([]byte, 0, h.limit) // now, not while the memory may be short
	}
}

// Release writes out what was kept, and says how much was dropped.
func (h *HoldOutput) Release() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	held, lost := h.held, h.lost
	h.holding, h.held, h.lost = false, nil, 0
	if len(held) > 0 {
		if _, err := h.w.Write(held); err != nil {
			return fmt.Errorf("write held output: %w", err)
		}
	}
	if lost > 0 {
		return fmt.Errorf("write held output: %d bytes beyond the first %d were dropped during the freeze", lost, h.limit)
	}
	return nil
}
