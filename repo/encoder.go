// SPDX-License-Identifier: BSD-2-Clause

package repo

import (
	"runtime"

	"github.com/klauspost/compress/zstd"
)

// encoder makes zstd frames (RFC 8878) with the length of their content, unless that is tiny,
// and without a checksum: the MAC and the SHA-256 are enough. It may be used by many at once.
type encoder interface {
	// encode appends the frame of plain to dst.
	encode(plain, dst []byte) []byte
}

// level is how much time an encoder takes to find more.
type level int

const (
	levelFastest level = iota
	levelDefault       // of restic
	levelBetter
	levelBest
	levels
)

// goEncoder is the encoder that restic has, too.
type goEncoder struct{ *zstd.Encoder }

func newGoEncoder(l level) (encoder, error) {
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest+zstd.EncoderLevel(l)), zstd.WithEncoderCRC(false),
		zstd.WithWindowSize(zstdWindow), zstd.WithEncoderConcurrency(runtime.GOMAXPROCS(0)))
	return goEncoder{enc}, err
}

func (e goEncoder) encode(plain, dst []byte) []byte { return e.EncodeAll(plain, dst) }
