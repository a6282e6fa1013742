// SPDX-License-Identifier: BSD-2-Clause

package repo

import (
	"errors"
	"fmt"
	"hash/crc32"
	"runtime"

	"github.com/klauspost/compress/zstd"

	"github.com/dsync-backup/dsync-backup/repo/crypto"
	"github.com/dsync-backup/dsync-backup/repo/pack"
)

// Limits of what is decoded and encoded, in bytes.
const (
	zstdWindow   = 1 << 20 // as long as most blobs; more would only cost memory
	maxPlaintext = 4 << 30 // what a pack can say of a blob's length
	maxBlob      = 1 << 30 // what we write; blobs are meant to be small
)

// codec compresses and seals, and back.
type codec struct {
	key      *crypto.Key
	compress bool // data blobs too
	enc      *compressor
	dec      *zstd.Decoder
}

func newCodec(key *crypto.Key, mode Compression) (*codec, error) {
	enc, err := newCompressor(mode)
	if err != nil {
		return nil, err
	}
	dec, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(runtime.GOMAXPROCS(0)), zstd.WithDecoderMaxMemory(maxPlaintext))
	if err != nil {
		return nil, fmt.Errorf("set up compression: %w", err)
	}
	return &codec{key: key, compress: mode != CompressionOff, enc: enc, dec: dec}, nil
}

// versionByte precedes a compressed file's zstd frame, so that it cannot be
// taken for plain JSON.
const versionByte = 2

func (c *codec) sealFile(plain []byte, version uint) []byte {
	if version >= 2 {
		plain = c.enc.file(plain, []byte{versionByte})
	}
	return c.key.Seal(make([]byte, 0, len(plain)+crypto.Overhead), plain)
}

// openFile decodes a file in place.
func (c *codec) openFile(sealed []byte, version uint) ([]byte, error) {
	plain, err := c.key.OpenInPlace(sealed)
	if err != nil {
		return nil, err
	}
	// What begins like JSON is JSON, from the time before compression.
	if version < 2 || len(plain) == 0 || plain[0] == '{' || plain[0] == '[' {
		return plain, nil
	}
	if plain[0] != versionByte {
		return nil, fmt.Errorf("encoding version %d is not known", plain[0])
	}
	return c.dec.DecodeAll(plain[1:], nil)
}

// sealBlob makes the stored form of a blob in w.sealed, using w's other memory,
// and says what UncompressedLength to note. A blob without bytes is never
// compressed: its length of 0 would say that it is not.
func (c *codec) sealBlob(w *scratch, kind Kind, plain []byte) (uncompressed int) {
	text := plain
	switch {
	case len(plain) == 0:
	case kind == KindTree, kind == KindMeta && c.compress:
		w.compressed = c.enc.file(plain, w.compressed[:0])
		text, uncompressed = w.compressed, len(plain)
	case c.compress:
		w.compressed, w.other = c.enc.blob(plain, w.compressed, w.other)
		text, uncompressed = w.compressed, len(plain)
	}
	// Room for a blob that does not compress, so that few need new memory.
	w.sealed = c.key.Seal(grow(w.sealed, len(plain)+crypto.Overhead)[:0], text)
	return uncompressed
}

// hashEvery is of how many data blobs one, at random, has its ID computed again. That is for a
// processor which computes wrongly; what changes in memory is found by the sum, in each of them.
const hashEvery = 16

// plainSum is a quick checksum of a blob's plaintext: its CRC-32C. It costs a fraction of the
// blob's ID.
func plainSum(plain []byte) uint32 { return crc32.Checksum(plain, castagnoli) }

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// checkBlob opens what sealBlob made, compares it with the sum that the plaintext had before its
// ID was known, and leaves it as it is. With hash, it also computes the ID again.
func (c *codec) checkBlob(w *scratch, b pack.Blob, sum uint32, hash bool) error {
	text, err := c.key.Open(w.compressed[:0], w.sealed)
	if err != nil {
		return err
	}
	w.compressed = text
	w.plain = grow(w.plain, int(b.UncompressedLength))
	plain, err := c.decompress(w.plain, b, text)
	if err == nil && plainSum(plain) != sum {
		err = errors.New("what was sealed is not what it was given")
	}
	if err == nil && hash && Hash(plain) != b.ID {
		err = errors.New("hashed again, it has another ID")
	}
	return err
}

// openBlob checks and decodes a stored blob. The plaintext is a part of sealed,
// which it overwrites, or lies in dst's memory or in new memory.
func (c *codec) openBlob(dst []byte, b pack.Blob, sealed []byte) ([]byte, error) {
	text, err := c.key.OpenInPlace(sealed)
	if err != nil {
		return nil, err
	}
	return c.decode(dst, b, text)
}

// decode decompresses a blob's text, if it is compressed, and compares it with
// the blob's ID.
func (c *codec) decode(dst []byte, b pack.Blob, text []byte) (plain []byte, err error) {
	if plain, err = c.decompress(dst, b, text); err != nil {
		return nil, err
	}
	if Hash(plain) != b.ID {
		return nil, errors.New("the content does not match its ID")
	}
	return plain, nil
}

// decompress decompresses a blob's text, if it is compressed.
func (c *codec) decompress(dst []byte, b pack.Blob, text []byte) (plain []byte, err error) {
	if !b.Compressed() {
		return text, nil
	}
	if cap(dst) < int(b.UncompressedLength) {
		dst = make([]byte, 0, b.UncompressedLength)
	}
	if plain, err = c.dec.DecodeAll(text, dst[:0]); err != nil {
		return nil, fmt.Errorf("decompress: %w", err)
	}
	if len(plain) != int(b.UncompressedLength) {
		return nil, fmt.Errorf("decompress: %d bytes instead of %d", len(plain), b.UncompressedLength)
	}
	return plain, nil
}
