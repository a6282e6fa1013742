// SPDX-License-Identifier: BSD-2-Clause

package fingerprint

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"

	"golang.org/x/sync/errgroup"
)

// Source reads a device past the page cache; a Device of snapshot/device is one.
// ReadExtent fills buf with the bytes from off on, whatever their alignment, and
// may be called from several goroutines.
type Source interface {
	ReadExtent(ctx context.Context, buf []byte, off int64) error
}

// ReaderAt makes a Source of an image file, or of memory.
func ReaderAt(r io.ReaderAt) Source { return readerAt{r} }

type readerAt struct{ r io.ReaderAt }

func (r readerAt) ReadExtent(ctx context.Context, buf []byte, off int64) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	n, err := r.r.ReadAt(buf, off)
	if n == len(buf) {
		return nil
	}
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("read bytes %d to %d: %w", off, off+int64(len(buf))-1, err)
}

// span is a range of the device in bytes.
type span struct{ off, len int64 }

func (s span) end() int64 { return s.off + s.len }

// clip is the part of s that lies in t.
func (s span) clip(t span) span {
	off := max(s.off, t.off)
	return span{off, max(min(s.end(), t.end())-off, 0)}
}

const (
	sampleBlock  = 4096
	sampleBlocks = 2048
	sampleDepth  = 16 // reads at a time
)

// sample reads blocks that the key chooses, in the order of the device.
func sample(ctx context.Context, src Source, size int64, key Key) (d Digest, err error) {
	blocks := uint64((size + sampleBlock - 1) / sampleBlock)
	chosen := make([]int64, min(sampleBlocks, blocks))
	random := rand.NewChaCha8(key)
	for i := range chosen {
		chosen[i] = int64(random.Uint64() % blocks)
	}
	slices.Sort(chosen)
	data := make([][]byte, len(chosen))
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(sampleDepth)
	for i, n := range chosen {
		group.Go(func() error {
			off := n * sampleBlock
			data[i] = make([]byte, min(sampleBlock, size-off))
			return src.ReadExtent(ctx, data[i], off)
		})
	}
	if err := group.Wait(); err != nil {
		return d, err
	}
	h := hmac.New(sha256.New, key[:])
	for _, b := range data {
		h.Write(b)
	}
	return Digest(h.Sum(nil)), nil
}
