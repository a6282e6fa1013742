// SPDX-License-Identifier: BSD-2-Clause

//go:build cgo

package repo

import (
	"fmt"
	"runtime"

	"github.com/DataDog/zstd"
)

// Encoder says what compresses.
const Encoder = "zstd's reference implementation"

// cEncoder is zstd's reference implementation, in C: faster than what there is in Go
// (BenchmarkEncoders), and no larger (TestTheEncodersAgree). It only ever writes frames. Each of them is read
// again, in Go, before it is stored; what comes from a store never gets here.
type cEncoder struct {
	level int
	idle  chan zstd.Ctx // contexts keep their tables, some MiB, from one blob to the next
}

func newEncoder(l level) (encoder, error) {
	return &cEncoder{[levels]int{1, 3, 7, 12}[l], make(chan zstd.Ctx, runtime.GOMAXPROCS(0))}, nil
}

func (e *cEncoder) encode(plain, dst []byte) []byte {
	var ctx zstd.Ctx
	select {
	case ctx = <-e.idle:
	default:
		ctx = zstd.NewCtx()
	}
	n := len(dst)
	frame, err := ctx.CompressLevel(dst[n:], plain, e.level)
	if err != nil {
		// There is no other way to fail than to get no memory, which Go does not survive either.
		panic(fmt.Errorf("compress %d bytes: %w", len(plain), err))
	}
	select {
	case e.idle <- ctx:
	default:
	}
	switch {
	case n == 0:
		return frame
	case cap(dst)-n >= zstd.CompressBound(len(plain)):
		return dst[:n+len(frame)] // it was made in its place
	}
	return append(dst, frame...)
}
