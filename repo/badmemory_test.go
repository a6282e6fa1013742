// SPDX-License-Identifier: BSD-2-Clause

package repo

import (
	"bytes"
	"strings"
	"testing"

	"github.com/dsync-backup/dsync-backup/repo/pack"
)

// What changes in memory at any time between its first sum and the store is noticed before it is
// stored: one bit of the data, of the compressed text or of what is sealed.
func TestBadMemoryIsNoticedBeforeABlobIsStored(t *testing.T) {
	rng := newRand(t)
	for _, mode := range []Compression{CompressionAuto, CompressionOff} {
		r, _ := newRepo(t, Options{Compression: mode})
		w := r.NewWriter(t.Context(), WriterOptions{})
		for range 20 {
			data := bytes.Repeat(randomBytes(rng, 1+rng.IntN(5000)), 1+rng.IntN(50))
			sum, h := plainSum(data), BlobHandle{Type: DataBlob, ID: Hash(data)}
			flipped := bytes.Clone(data)
			flipped[rng.IntN(len(data))] ^= 1 << rng.IntN(8)
			if _, err := w.store(t.Context(), KindData, h, flipped, sum); err == nil || !strings.Contains(err.Error(), "bad memory") {
				t.Fatalf("data of %d bytes that changed were stored: %v", len(data), err)
			}
			var s scratch
			n := r.codec.sealBlob(&s, KindData, data)
			blob := pack.Blob{Handle: h, Length: uint32(len(s.sealed)), UncompressedLength: uint32(n)}
			if err := r.codec.checkBlob(&s, blob, sum, false); err != nil {
				t.Fatal(err)
			}
			wrong := blob
			wrong.ID[rng.IntN(32)] ^= 1 << rng.IntN(8)
			if err := r.codec.checkBlob(&s, wrong, sum, true); err == nil {
				t.Fatal("a wrong ID passed for the right one")
			}
			if _, err := w.store(t.Context(), KindMeta, wrong.Handle, data, sum); err == nil {
				t.Fatal("metadata were stored under a wrong ID")
			}
			s.sealed[rng.IntN(len(s.sealed))] ^= 1 << rng.IntN(8)
			if err := r.codec.checkBlob(&s, blob, sum, false); err == nil {
				t.Fatal("what is sealed was changed, and passed for good")
			}
			// What the compressor made was wrong, and was sealed as such.
			r.codec.sealBlob(&s, KindData, flipped)
			if err := r.codec.checkBlob(&s, blob, sum, false); err == nil {
				t.Fatal("other data were sealed, and passed for good")
			}
		}
		w.Abort()
	}
}

// The same for what a prune packs anew: the text that it read, checked and seals as it is.
func TestBadMemoryIsNoticedBeforeABlobIsPackedAnew(t *testing.T) {
	rng := newRand(t)
	r, _ := newRepo(t, Options{})
	w := r.NewWriter(t.Context(), WriterOptions{})
	defer w.Abort()
	for range 20 {
		data := bytes.Repeat(randomBytes(rng, 1+rng.IntN(5000)), 1+rng.IntN(50))
		b := BlobLocation{Handle: BlobHandle{Type: DataBlob, ID: Hash(data)}, UncompressedLength: uint32(len(data))}
		text := r.codec.enc.file(data, nil)
		good := &blobText{data: text, sum: plainSum(text)}
		if err := w.storeText(t.Context(), KindData, b, good, len(data)); err != nil {
			t.Fatal(err)
		}
		bad := &blobText{data: bytes.Clone(text), sum: good.sum}
		bad.data[rng.IntN(len(text))] ^= 1 << rng.IntN(8)
		if err := w.storeText(t.Context(), KindData, b, bad, len(data)); err == nil || !strings.Contains(err.Error(), "bad memory") {
			t.Fatalf("text of %d bytes that changed was stored: %v", len(text), err)
		}
	}
}
