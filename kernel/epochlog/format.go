// SPDX-License-Identifier: BSD-2-Clause

package epochlog

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/dsync-backup/dsync-backup/kernel"
)

// The layout of an entry; see docs/epoch-log.md.
const (
	magic      = "DSYNCEPO"
	version    = 1
	headerSize = 80

	encodingRuns = 0 // lengths of clean and marked runs, alternating, as varints
	encodingRaw  = 1 // the bitmap's words
	// Added to either of them: a zstd frame of it.
	encodingZstd = 2

	maxBlocks = 1 << 37 // 512 TiB
)

// Encode gives the bytes of an ended epoch, in the shortest of the encodings.
func Encode(e kernel.Epoch) []byte {
	blocks, words := e.Bitmap.Blocks(), e.Bitmap.Words()
	out := make([]byte, headerSize, headerSize+4096)
	out, runs := appendRuns(out, e.Bitmap, headerSize+8*words)
	encoding := encodingRuns
	if !runs {
		encoding = encodingRaw
		out = out[:headerSize]
		for i := range words {
			out = binary.LittleEndian.AppendUint64(out, e.Bitmap.Word(i))
		}
	}
	if z := compress(out[headerSize:]); len(z) < len(out)-headerSize {
		encoding |= encodingZstd
		out = append(out[:headerSize], z...)
	}
	copy(out, magic)
	le := binary.LittleEndian
	le.PutUint32(out[8:], version)
	le.PutUint32(out[12:], kernel.BlockSize)
	copy(out[16:], e.Position.Tracker[:])
	le.PutUint64(out[32:], e.Position.Epoch)
	copy(out[40:], e.Position.Nonce[:])
	le.PutUint64(out[56:], uint64(blocks))
	le.PutUint32(out[64:], uint32(encoding))
	le.PutUint64(out[72:], uint64(len(out)-headerSize))
	sum := sha256.Sum256(out)
	return append(out, sum[:]...)
}

// appendRuns gives up, and says so, when out grows past limit bytes.
func appendRuns(out []byte, b *kernel.Bitmap, limit int) ([]byte, bool) {
	for at := int64(0); ; {
		set := b.NextSet(at)
		if set == b.Blocks() {
			return out, true
		}
		end := b.NextClear(set)
		out = binary.AppendUvarint(out, uint64(set-at))
		out = binary.AppendUvarint(out, uint64(end-set))
		if len(out) > limit {
			return out, false
		}
		at = end
	}
}

// Decode reads an entry. Any deviation from what Encode writes is an error.
func Decode(data []byte) (kernel.Epoch, error) {
	h, payload, err := decodeHeader(data)
	if err != nil {
		return kernel.Epoch{}, err
	}
	b := kernel.NewBitmap(h.blocks)
	if err := h.addTo(b, payload); err != nil {
		return kernel.Epoch{}, err
	}
	return kernel.Epoch{Position: h.position, Bitmap: b}, nil
}

// addTo unites an entry's bitmap into b, of which it must be the size. With an
// error, b may hold a part of it.
func (h header) addTo(b *kernel.Bitmap, payload []byte) (err error) {
	if h.encoding&encodingZstd != 0 {
		payload, err = decompress(payload, 8*b.Words())
	}
	switch h.encoding &^ encodingZstd {
	case encodingRuns:
		if err == nil {
			err = addRuns(b, payload)
		}
	case encodingRaw:
		if err == nil {
			err = addRaw(b, payload)
		}
	default:
		err = fmt.Errorf("unknown encoding %d", h.encoding)
	}
	if err != nil {
		return fmt.Errorf("decode epoch %d: %w", h.position.Epoch, err)
	}
	return nil
}

type header struct {
	position kernel.Position
	blocks   int64
	encoding uint32
}

// decodeHeader checks an entry but for its bitmap.
func decodeHeader(data []byte) (h header, payload []byte, err error) {
	if len(data) < headerSize+sha256.Size {
		return h, nil, fmt.Errorf("it is truncated to %d bytes", len(data))
	}
	le := binary.LittleEndian
	if string(data[:8]) != magic {
		return h, nil, errors.New("it is not an epoch log entry")
	}
	if v := le.Uint32(data[8:]); v != version {
		return h, nil, fmt.Errorf("it has format version %d; this program reads version %d", v, version)
	}
	body := data[:len(data)-sha256.Size]
	if sha256.Sum256(body) != [sha256.Size]byte(data[len(body):]) {
		return h, nil, errors.New("its checksum does not match")
	}
	payload = body[headerSize:]
	blocks := le.Uint64(data[56:])
	if le.Uint32(data[12:]) != kernel.BlockSize || blocks > maxBlocks ||
		le.Uint32(data[68:]) != 0 || le.Uint64(data[72:]) != uint64(len(payload)) {
		return h, nil, errors.New("its header is damaged")
	}
	h.blocks, h.encoding = int64(blocks), le.Uint32(data[64:])
	copy(h.position.Tracker[:], data[16:])
	h.position.Epoch = le.Uint64(data[32:])
	copy(h.position.Nonce[:], data[40:])
	return h, payload, nil
}

func addRuns(b *kernel.Bitmap, p []byte) error {
	at := uint64(0)
	limit := uint64(b.Blocks())
	for first := true; len(p) > 0; first = false {
		var run [2]uint64 // clean, marked
		for i := range run {
			v, n := binary.Uvarint(p)
			// A longer spelling of the same number ends in a zero byte.
			if n <= 0 || n > 1 && p[n-1] == 0 {
				return errors.New("a run's length is damaged")
			}
			run[i], p = v, p[n:]
		}
		if run[0] == 0 && !first || run[1] == 0 || run[0] > limit-at || run[1] > limit-at-run[0] {
			return fmt.Errorf("the run at block %d is damaged", at)
		}
		at += run[0]
		b.SetRange(int64(at), int64(at+run[1]-1))
		at += run[1]
	}
	return nil
}

func addRaw(b *kernel.Bitmap, p []byte) error {
	words := b.Words()
	if len(p) != 8*words {
		return fmt.Errorf("its bitmap has %d bytes instead of %d", len(p), 8*words)
	}
	if r := b.Blocks() % 64; r != 0 && binary.LittleEndian.Uint64(p[len(p)-8:])>>r != 0 {
		return errors.New("it marks blocks behind the end of the device")
	}
	for i := range words {
		b.OrWord(i, binary.LittleEndian.Uint64(p[8*i:]))
	}
	return nil
}
