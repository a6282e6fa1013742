// SPDX-License-Identifier: BSD-2-Clause

package stream

import (
	"fmt"

	"github.com/klauspost/compress/zstd"
)

// NewEncoder gives an encoder of which every frame can be read by [Unpacker].
func NewEncoder(level zstd.EncoderLevel, parallel int) (*zstd.Encoder, error) {
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(level), zstd.WithEncoderConcurrency(parallel), zstd.WithEncoderCRC(false),
		zstd.WithWindowSize(1<<20), zstd.WithSingleSegment(true), zstd.WithLowerEncoderMem(true))
	if err != nil {
		return nil, fmt.Errorf("make encoder: %w", err)
	}
	return enc, nil
}
