// SPDX-License-Identifier: BSD-2-Clause

package repo

import (
	"context"
	"crypto/rand"
	"fmt"
	"sync"

	"github.com/dsync-backup/dsync-backup/repo/pack"
)

const (
	// uploadMemory bounds the full packs in memory that wait for the store or
	// are on their way, in bytes; a larger pack goes alone.
	uploadMemory = 48 << 20

	// twoPacksMax is the largest pack size at which data is spread over two
	// open packs.
	twoPacksMax = 32 << 20
)

// packer gathers the blobs of one kind into packs. Data is spread at random
// over two open packs, as restic does since 0.18: whoever watches the store then
// learns less about where files were cut, which could give away the chunker's
// secret polynomial (Alexeev, Percival and Zhang, "Chunking Attacks on File
// Backup Services using Content-Defined Chunking", 2025).
type packer struct {
	w    *Writer
	kind Kind

	mu   sync.Mutex
	open []*pack.Builder
}

func newPacker(w *Writer, kind Kind, packSize int) *packer {
	n := 1
	if kind == KindData && packSize <= twoPacksMax {
		n = 2
	}
	return &packer{w: w, kind: kind, open: make([]*pack.Builder, n)}
}

// add puts a sealed blob into a pack, and sends off the pack that has no room
// for it. It holds the lock while it waits for memory, so that nobody starts
// yet another pack meanwhile.
func (p *packer) add(ctx context.Context, h BlobHandle, sealed []byte, uncompressed int) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	slot := 0
	if len(p.open) > 1 {
		var b [1]byte
		_, _ = rand.Read(b[:])
		slot = int(b[0]) % len(p.open)
	}
	limit := p.w.repo.opts.PackSize
	need := len(sealed) + pack.EntrySize(pack.Blob{UncompressedLength: uint32(uncompressed)})
	if b := p.open[slot]; b != nil && (b.Size()+need > limit || b.Len() >= pack.MaxBlobs) {
		p.open[slot] = nil
		if err := p.w.send(ctx, p.kind, b); err != nil {
			return err
		}
	}
	if p.open[slot] == nil {
		p.open[slot] = pack.NewBuilder(p.w.takeBuffer(), limit)
	}
	p.open[slot].Add(h, sealed, uncompressed)
	return nil
}

// flush sends off what is gathered, in one pack if it fits.
func (p *packer) flush(ctx context.Context) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	var last *pack.Builder
	for i, b := range p.open {
		p.open[i] = nil
		switch {
		case b == nil:
		case last == nil:
			last = b
		case last.Size()+b.Size() <= p.w.repo.opts.PackSize && last.Len()+b.Len() <= pack.MaxBlobs:
			last.Merge(b)
			p.w.giveBuffer(b.Buffer())
		default:
			if err := p.w.send(ctx, p.kind, b); err != nil {
				return err
			}
		}
	}
	if last == nil {
		return nil
	}
	return p.w.send(ctx, p.kind, last)
}

// send finishes a pack and uploads it in the background, as soon as the packs
// in flight leave room for it.
func (w *Writer) send(ctx context.Context, kind Kind, b *pack.Builder) error {
	weight := min(int64(b.Size()), uploadMemory)
	if err := w.memory.Acquire(ctx, weight); err != nil {
		return fmt.Errorf("wait for room to upload a pack: %w", err)
	}
	w.uploads.Add(1)
	go func() {
		defer w.uploads.Done()
		defer w.memory.Release(weight)
		if err := w.upload(kind, b); err != nil {
			w.fail(err)
		}
	}()
	return nil
}

func (w *Writer) upload(kind Kind, b *pack.Builder) error {
	if err := w.ready(w.ctx); err != nil {
		return err
	}
	if err := w.connections.Acquire(w.ctx, 1); err != nil {
		return context.Cause(w.ctx)
	}
	defer w.connections.Release(1)
	data, blobs, err := b.Finish(w.repo.key)
	if err != nil {
		return err
	}
	id := Hash(data)
	if err := w.repo.be.Save(w.ctx, packHandle(id), data); err != nil {
		return fmt.Errorf("save pack %s: %w", id.Str(), err)
	}
	w.countPack(kind, len(data))
	w.giveBuffer(data)
	return w.indexPack(id, blobs)
}

// takeBuffer and giveBuffer pass the memory of finished packs on to new ones,
// so that a long backup makes no garbage of that size: the collector would let
// the heap grow to twice what is in use.
func (w *Writer) takeBuffer() []byte {
	w.freeMu.Lock()
	defer w.freeMu.Unlock()
	n := len(w.free)
	if n == 0 {
		return nil
	}
	buf := w.free[n-1]
	w.free = w.free[:n-1]
	return buf
}

func (w *Writer) giveBuffer(buf []byte) {
	w.freeMu.Lock()
	defer w.freeMu.Unlock()
	w.free = append(w.free, buf)
}
