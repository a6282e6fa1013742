// SPDX-License-Identifier: BSD-2-Clause

package repo

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/repo/crypto"
)

// maxGap is how many unwanted bytes between two blobs are read rather than
// asked for in another request: about what a store sends in the time of one
// round trip.
const maxGap = 128 << 10

// LoadPackBlobs loads some blobs of one pack with as few requests as is
// sensible, in the order of their offsets, and calls fn with each, checked. If a
// part of the pack cannot be read, each blob around it is read by itself. A blob
// that is bad in this pack is looked for in others; if there is no good
// copy fn gets the error, and decides by what it returns whether to go on. The
// bytes are good only during the call. fn is called from one goroutine at a
// time, and exactly once for each blob unless it returns an error or ctx is
// done. Memory: the largest of the blobs, as stored and as plaintext. blobs is
// sorted in place.
func (r *Repository) LoadPackBlobs(ctx context.Context, id ID, blobs []BlobLocation, fn func(BlobHandle, []byte, error) error) error {
	p := &packReader{repo: r, id: id, fn: func(b BlobLocation, _ *blobText, plain []byte, err error) error {
		return fn(b.Handle, plain, err)
	}}
	return p.read(ctx, blobs)
}

// readPackTexts is LoadPackBlobs for an fn that also gets the text as it was before
// it was sealed; nil if the blob came from another pack.
func (r *Repository) readPackTexts(ctx context.Context, id ID, blobs []BlobLocation, fn packFunc) error {
	p := &packReader{repo: r, id: id, fn: fn, texts: true}
	return p.read(ctx, blobs)
}

func (p *packReader) read(ctx context.Context, blobs []BlobLocation) error {
	slices.SortFunc(blobs, func(a, b BlobLocation) int { return cmp.Compare(a.Offset, b.Offset) })
	for len(blobs) > 0 {
		n := spanLength(blobs)
		if err := p.readSpan(ctx, blobs[:n]); err != nil {
			return err
		}
		blobs = blobs[n:]
	}
	return nil
}

// spanLength is how many blobs from the front are read with one request.
func spanLength(blobs []BlobLocation) int {
	end := uint64(blobs[0].Offset) + uint64(blobs[0].Length)
	for i, b := range blobs[1:] {
		if uint64(b.Offset) < end || uint64(b.Offset) > end+maxGap {
			return i + 1
		}
		end = uint64(b.Offset) + uint64(b.Length)
	}
	return len(blobs)
}

type packFunc func(b BlobLocation, text *blobText, plain []byte, err error) error

// blobText is a blob between compression and sealing: the plaintext itself if it is
// not compressed.
type blobText struct {
	data []byte
	sum  uint32 // plainSum of the data before they were decoded and compared with the ID
}

type packReader struct {
	repo          *Repository
	id            ID
	fn            packFunc
	texts         bool // fn wants them
	sealed, plain []byte
}

// readSpan streams a stretch of the pack. The backend may call the reading
// function again after a failure: it then skips what fn has seen.
func (p *packReader) readSpan(ctx context.Context, blobs []BlobLocation) error {
	// fn's error must not look like one of the store, which would be retried.
	var fnErr error
	done := 0
	start := int64(blobs[0].Offset)
	last := blobs[len(blobs)-1]
	length := int64(last.Offset) + int64(last.Length) - start
	err := p.repo.be.Load(ctx, packHandle(p.id), int(length), start, func(rd io.Reader) error {
		at := start
		for done < len(blobs) && fnErr == nil {
			b := blobs[done]
			if _, err := io.CopyN(io.Discard, rd, int64(b.Offset)-at); err != nil {
				return err
			}
			p.sealed = grow(p.sealed, int(b.Length))
			if _, err := io.ReadFull(rd, p.sealed); err != nil {
				return err
			}
			at = int64(b.Offset) + int64(b.Length)
			done++
			fnErr = p.deliver(ctx, b)
		}
		return nil
	})
	switch {
	case fnErr != nil:
		return fnErr
	case ctx.Err() != nil:
		return fmt.Errorf("read pack %s: %w", p.id.Str(), ctx.Err())
	case err == nil:
		return nil
	}
	// What is wrong with one place of the pack must not cost the blobs beside it.
	alone := len(blobs) > 1 && ofOnePlace(err)
	for _, b := range blobs[done:] {
		var plain []byte
		lost := fmt.Errorf("load %s from pack %s: %w", b.Handle, p.id.Str(), err)
		if alone {
			if plain, lost = p.repo.loadAt(ctx, b.Handle, KindData, p.here(b)); lost != nil && !ofOnePlace(lost) {
				alone, err = false, lost
			}
		}
		if lost == nil {
			lost = p.fn(b, nil, plain, nil)
		} else {
			lost = p.elsewhere(ctx, b, lost)
		}
		if lost != nil {
			return lost
		}
	}
	return nil
}

// ofOnePlace says that another range of the pack may be had. A store that does
// not answer, or has lost the pack, need not be asked for each blob.
func ofOnePlace(err error) bool {
	if errors.Is(err, backend.ErrNotExist) || errors.Is(err, backend.ErrNoStore) {
		return false
	}
	return errors.Is(err, backend.ErrPermanent) || errors.Is(err, ErrDamaged)
}

// here is where this pack has the blob.
func (p *packReader) here(b BlobLocation) Location {
	return Location{Pack: p.id, Offset: b.Offset, Length: b.Length, UncompressedLength: b.UncompressedLength}
}

// deliver checks the sealed blob just read and passes it on.
func (p *packReader) deliver(ctx context.Context, b BlobLocation) error {
	if b.Compressed() {
		p.plain = grow(p.plain, int(b.UncompressedLength))
	}
	text, plain, err := p.open(b)
	if err == nil {
		return p.fn(b, text, plain, nil)
	}
	// Once more, since the damage may have happened on the way, then elsewhere.
	plain, err = p.repo.loadAt(ctx, b.Handle, KindData, p.here(b))
	if err == nil {
		return p.fn(b, nil, plain, nil)
	}
	return p.elsewhere(ctx, b, err)
}

func (p *packReader) open(b BlobLocation) (text *blobText, plain []byte, err error) {
	c := p.repo.codec
	if !p.texts {
		plain, err = c.openBlob(p.plain, b, p.sealed)
		return nil, plain, err
	}
	data, err := c.key.OpenInPlace(p.sealed)
	if err != nil {
		return nil, nil, err
	}
	text = &blobText{data: data, sum: plainSum(data)}
	plain, err = c.decode(p.plain, b, data)
	return text, plain, err
}

// elsewhere looks in other packs for a blob that this one did not give, for
// the reason err.
func (p *packReader) elsewhere(ctx context.Context, b BlobLocation, err error) error {
	others := slices.DeleteFunc(p.repo.Locations(b.Handle), func(l Location) bool { return l.Pack == p.id })
	var plain []byte
	if len(others) > 0 {
		p.repo.log.Warn("trying another copy of a blob", "error", err)
		var otherErr error
		if plain, otherErr = p.repo.loadFrom(ctx, b.Handle, KindData, others); otherErr == nil {
			err = nil
		} else {
			err = fmt.Errorf("%w; %w", err, otherErr)
		}
	}
	if ctx.Err() != nil {
		return fmt.Errorf("read pack %s: %w", p.id.Str(), ctx.Err())
	}
	return p.fn(b, nil, plain, err)
}

// grow returns a slice of n bytes, in buf's memory if it is large enough.
func grow(buf []byte, n int) []byte {
	if cap(buf) < n {
		return make([]byte, n, n+crypto.Overhead)
	}
	return buf[:n]
}
