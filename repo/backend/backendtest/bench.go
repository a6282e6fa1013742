// SPDX-License-Identifier: BSD-2-Clause

package backendtest

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"sync/atomic"
	"testing"

	"github.com/dsync-backup/dsync-backup/repo/backend"
)

// packSize is the size of restic's packs, in bytes.
const packSize = 16 << 20

// Benchmark measures a store with packs, with as many calls in flight as it
// asks for.
func Benchmark(b *testing.B, s Store) {
	be := created(b, s)
	data := Bytes(Rand(b), packSize)
	h := save(b, be, backend.PackFile, data)
	b.Run("Save", func(b *testing.B) {
		var n atomic.Uint64
		inFlight(b, be, packSize, func() error {
			mine := bytes.Clone(data)
			binary.LittleEndian.PutUint64(mine, n.Add(1))
			mh := HandleOf(backend.PackFile, mine[:8]) // any unique name will do
			if err := be.Save(context.Background(), mh, mine); err != nil {
				return err
			}
			return be.Remove(context.Background(), mh)
		})
	})
	b.Run("Load", func(b *testing.B) {
		inFlight(b, be, packSize, func() error { return drain(be, h, 0, 0) })
	})
	b.Run("LoadRange", func(b *testing.B) {
		var n atomic.Int64
		const length = 1 << 20
		inFlight(b, be, length, func() error { return drain(be, h, length, n.Add(length)%(packSize-length)) })
	})
}

func drain(be backend.Backend, h backend.Handle, length int, offset int64) error {
	return be.Load(context.Background(), h, length, offset, func(r io.Reader) error {
		_, err := io.Copy(io.Discard, r)
		return err
	})
}

func inFlight(b *testing.B, be backend.Backend, size int64, call func() error) {
	b.Helper()
	b.SetBytes(size)
	b.SetParallelism(be.Connections())
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if err := call(); err != nil {
				b.Error(err)
				return
			}
		}
	})
}
