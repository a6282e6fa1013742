// SPDX-License-Identifier: BSD-2-Clause

package repo

import (
	"errors"
	"fmt"
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
	enc      *zstd.Encoder
	dec      *zstd.Decoder
}

func newCodec(key *crypto.Key, mode Compression) (*codec, error) {
	level := zstd.SpeedDefault
	switch mode {
	case CompressionFastest:
		level = zstd.SpeedFastest
	case CompressionBetter:
		level = zstd.SpeedBetterCompression
	case CompressionMax:
		level = zstd.SpeedBestCompression
	}
	// The MAC and the SHA-256 are checksum enough.
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(level), zstd.WithEncoderCRC(false),
		zstd.WithWindowSize(zstdWindow), zstd.WithEncoderConcurrency(runtime.GOMAXPROCS(0)))
	if err != nil {
		return nil, fmt.Errorf("set up compression: %w", err)
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
		plain = c.enc.EncodeAll(plain, []byte{versionByte})
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

// sealBlob appends the stored form of a blob to dst, using scratch for the
// compressed text, and says what UncompressedLength to note. A blob without
// bytes is never compressed: its length of 0 would say that it is not.
func (c *codec) sealBlob(dst, scratch []byte, t BlobType, plain []byte) (sealed, newScratch []byte, uncompressed int) {
	text := plain
	if len(plain) > 0 && (c.compress || t == TreeBlob) {
		scratch = c.enc.EncodeAll(plain, scratch[:0])
		text, uncompressed = scratch, len(plain)
	}
	return c.key.Seal(dst, text), scratch, uncompressed
}

// openBlob checks and decodes a stored blob. The plaintext is a part of sealed,
// which it overwrites, or lies in dst's memory or in new memory.
func (c *codec) openBlob(dst []byte, b pack.Blob, sealed []byte) ([]byte, error) {
	_, plain, err := c.openText(dst, b, sealed)
	return plain, err
}

// openText is openBlob that also gives the text between sealing and
// compression, a part of sealed: the plaintext itself if it is not compressed.
func (c *codec) openText(dst []byte, b pack.Blob, sealed []byte) (text, plain []byte, err error) {
	if text, err = c.key.OpenInPlace(sealed); err != nil {
		return nil, nil, err
	}
	plain = text
	if b.Compressed() {
		if cap(dst) < int(b.UncompressedLength) {
			dst = make([]byte, 0, b.UncompressedLength)
		}
		if plain, err = c.dec.DecodeAll(text, dst[:0]); err != nil {
			return nil, nil, fmt.Errorf("decompress: %w", err)
		}
		if len(plain) != int(b.UncompressedLength) {
			return nil, nil, fmt.Errorf("decompress: %d bytes instead of %d", len(plain), b.UncompressedLength)
		}
	}
	if Hash(plain) != b.ID {
		return nil, nil, errors.New("the content does not match its ID")
	}
	return text, plain, nil
}
