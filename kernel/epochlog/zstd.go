// SPDX-License-Identifier: BSD-2-Clause

package epochlog

import (
	"errors"
	"fmt"

	"github.com/klauspost/compress/zstd"
)

// compress gives a zstd frame that states its content's size.
func compress(p []byte) []byte {
	// One goroutine: without options that can fail, neither does this.
	w, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithSingleSegment(true),
		zstd.WithEncoderCRC(false)) // the entry has a checksum
	if err != nil {
		return p
	}
	return w.EncodeAll(p, nil)
}

// decompress reads one frame of at most limit bytes of content, and takes no
// more memory than that for one that claims to hold more.
func decompress(p []byte, limit int) ([]byte, error) {
	var h zstd.Header
	if err := h.Decode(p); err != nil || h.Skippable || !h.HasFCS {
		return nil, errors.New("its zstd frame is damaged")
	}
	if h.FrameContentSize > uint64(limit) {
		return nil, fmt.Errorf("it holds %d bytes, more than the bitmap's %d", h.FrameContentSize, limit)
	}
	r, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(h.FrameContentSize+1<<20))
	if err != nil {
		return nil, fmt.Errorf("decode zstd: %w", err)
	}
	defer r.Close()
	out, err := r.DecodeAll(p, make([]byte, 0, h.FrameContentSize))
	if err != nil {
		return nil, fmt.Errorf("decode zstd: %w", err)
	}
	if uint64(len(out)) != h.FrameContentSize {
		return nil, errors.New("it holds more than one zstd frame")
	}
	return out, nil
}
