// SPDX-License-Identifier: BSD-2-Clause

package repo

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"

	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/repo/pack"
)

// Kind says what a blob is to this program, which decides what packs it goes
// to and whether the cache keeps it.
type Kind uint8

// The kinds of blobs.
const (
	KindData Kind = iota // bulk data: never cached
	KindMeta             // data blobs that are small metadata of ours: packs of their own, cached
	KindTree             // directories: packs of their own, as the format asks, cached
	kinds
)

func (k Kind) String() string {
	switch k {
	case KindData:
		return "data"
	case KindMeta:
		return "metadata"
	}
	return "tree"
}

// BlobType is the type under which blobs of the kind are stored.
func (k Kind) BlobType() BlobType {
	if k == KindTree {
		return TreeBlob
	}
	return DataBlob
}

func (k Kind) cached() bool { return k != KindData }

// LoadBlob returns a blob's plaintext, checked. If one copy is bad it tries the
// others. Errors: [ErrBlobNotFound]; one that names blob and pack, and wraps
// [ErrDamaged] if what the pack holds is not the blob.
func (r *Repository) LoadBlob(ctx context.Context, h BlobHandle, kind Kind) ([]byte, error) {
	locations := r.Locations(h)
	if len(locations) == 0 {
		return nil, fmt.Errorf("load %s: %w", h, ErrBlobNotFound)
	}
	if kind.cached() {
		if plain, ok := r.loadCachedBlob(h); ok {
			return plain, nil
		}
	}
	return r.loadFrom(ctx, h, kind, locations)
}

// loadFrom tries the given places of a blob in turn.
func (r *Repository) loadFrom(ctx context.Context, h BlobHandle, kind Kind, locations []Location) (_ []byte, err error) {
	for i, loc := range locations {
		var plain []byte
		if plain, err = r.loadAt(ctx, h, kind, loc); err == nil {
			return plain, nil
		}
		if ctx.Err() != nil {
			return nil, err
		}
		if i < len(locations)-1 {
			r.log.Warn("trying another copy of a blob", "error", err)
		}
	}
	return nil, err
}

func (r *Repository) loadAt(ctx context.Context, h BlobHandle, kind Kind, loc Location) ([]byte, error) {
	blob := blobAt(h, loc)
	sealed := make([]byte, loc.Length)
	// Damage on the way here is not there the second time.
	for attempt := 0; ; attempt++ {
		err := r.be.Load(ctx, packHandle(loc.Pack), len(sealed), int64(loc.Offset), func(rd io.Reader) error {
			_, err := io.ReadFull(rd, sealed)
			return err
		})
		if err != nil {
			return nil, fmt.Errorf("load %s from pack %s: %w", h, loc.Pack.Str(), err)
		}
		var entry []byte
		if kind.cached() && r.cache != nil {
			entry = cacheEntry(blob, sealed)
		}
		plain, err := r.codec.openBlob(nil, blob, sealed)
		if err == nil {
			if entry != nil {
				r.cache.save(blobName(h), entry)
			}
			return plain, nil
		}
		if attempt > 0 {
			return nil, fmt.Errorf("load %s from pack %s: %w: %w", h, loc.Pack.Str(), ErrDamaged, err)
		}
	}
}

func packHandle(id ID) backend.Handle {
	return backend.Handle{Type: backend.PackFile, Name: id.String()}
}

// cacheEntry is what the cache holds of a blob: the length of its plaintext if
// it is compressed, else 0, in four bytes, and the blob as stored.
func cacheEntry(b pack.Blob, sealed []byte) []byte {
	entry := make([]byte, 4, 4+len(sealed))
	binary.LittleEndian.PutUint32(entry, b.UncompressedLength)
	return append(entry, sealed...)
}

func (r *Repository) loadCachedBlob(h BlobHandle) ([]byte, bool) {
	entry, ok := r.cache.load(blobName(h))
	if !ok {
		return nil, false
	}
	if len(entry) > 4 {
		b := pack.Blob{Handle: h, UncompressedLength: binary.LittleEndian.Uint32(entry)}
		if plausible(b, len(entry)) {
			if plain, err := r.codec.openBlob(nil, b, entry[4:]); err == nil {
				return plain, true
			}
		}
	}
	r.cache.remove(blobName(h))
	return nil, false
}

// plausible keeps a damaged length in a cache entry from asking for gigabytes:
// zstd does not shrink what we cache this far.
func plausible(b pack.Blob, stored int) bool {
	return int64(b.UncompressedLength) <= 64<<20 || int64(b.UncompressedLength) <= int64(stored)*1000
}

// ListPack reads the header of a pack of size bytes: what blobs it says it
// holds, whatever the index says.
func (r *Repository) ListPack(ctx context.Context, id ID, size int64) ([]BlobLocation, error) {
	blobs, err := pack.ReadHeader(r.key, size, func(p []byte, offset int64) error {
		return r.be.Load(ctx, packHandle(id), len(p), offset, func(rd io.Reader) error {
			_, err := io.ReadFull(rd, p)
			return err
		})
	})
	if err != nil {
		return nil, fmt.Errorf("list pack %s: %w", id.Str(), err)
	}
	return blobs, nil
}
