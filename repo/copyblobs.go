// SPDX-License-Identifier: BSD-2-Clause

package repo

import (
	"context"
	"fmt"

	"github.com/dsync-backup/dsync-backup/repo/crypto"
	"github.com/dsync-backup/dsync-backup/repo/pack"
)

// CopyBlobs stores blobs of a pack again, in new packs, though the repository
// has them. Each is decrypted, decompressed and hashed before it is stored; a
// bad one is taken from another pack that has it, and if there is none that is
// the error. What is compressed stays as it is compressed, unless compress asks
// to compress anew; it is encrypted anew in any case, since bytes that two packs
// share would tell where blobs begin. As with SaveBlob, nothing is durable
// before Flush. Memory: the largest of the blobs, a few times. blobs is sorted
// in place.
func (w *Writer) CopyBlobs(ctx context.Context, from ID, blobs []BlobLocation, kind func(BlobHandle) Kind, compress bool) error {
	if err := w.Err(); err != nil {
		return fmt.Errorf("copy blobs: %w", err)
	}
	err := w.repo.readPackTexts(ctx, from, blobs, func(b BlobLocation, text *blobText, plain []byte, err error) error {
		switch {
		case err != nil:
			return err
		case text == nil || !b.Compressed() && (compress || b.Type == TreeBlob):
			sum := plainSum(plain)
			if Hash(plain) != b.ID { // once more, now that what it is has a sum
				return fmt.Errorf("copy %s: it changed in memory (bad memory?)", b.Handle)
			}
			_, err = w.store(ctx, kind(b.Handle), b.Handle, plain, sum)
		default:
			err = w.storeText(ctx, kind(b.Handle), b, text, len(plain))
		}
		return err
	})
	if err != nil {
		w.fail(err)
		return fmt.Errorf("copy blobs of pack %s: %w", from.Str(), err)
	}
	return nil
}

// storeText seals and packs the text of a blob that has been checked. What it sealed is opened
// again and compared with the sum that the text had before the check, so that a bit which flips
// at any time after that is noticed.
func (w *Writer) storeText(ctx context.Context, kind Kind, b BlobLocation, text *blobText, plainSize int) error {
	s := w.scratch.Get().(*scratch)
	defer func() {
		if cap(s.sealed) <= maxScratch {
			w.scratch.Put(s)
		}
	}()
	key := w.repo.codec.key
	s.sealed = key.Seal(grow(s.sealed, len(text.data)+crypto.Overhead)[:0], text.data)
	again, err := key.Open(s.compressed[:0], s.sealed)
	if err != nil {
		return fmt.Errorf("check %s before storing it (bad memory?): %w", b.Handle, err)
	}
	s.compressed = again
	if plainSum(again) != text.sum {
		return fmt.Errorf("check %s before storing it (bad memory?): what was sealed is not what was read", b.Handle)
	}
	if err := w.packers[kind].add(ctx, b.Handle, s.sealed, int(b.UncompressedLength)); err != nil {
		return fmt.Errorf("save %s: %w", b.Handle, err)
	}
	w.statsMu.Lock()
	defer w.statsMu.Unlock()
	w.stats[kind].Blobs++
	w.stats[kind].PlainBytes += int64(plainSize)
	return nil
}

// packSize is how long a pack of these blobs is, in bytes.
func packSize(blobs []pack.Blob) int64 {
	size := int64(pack.Overhead)
	for _, b := range blobs {
		size += int64(b.Length) + int64(pack.EntrySize(b))
	}
	return size
}
