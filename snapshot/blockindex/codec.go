// SPDX-License-Identifier: BSD-2-Clause

package blockindex

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"math"

	"github.com/dsync-backup/dsync-backup/kernel"
)

const (
	magic      = "DSBI"
	version    = 1
	blockShift = 12
	headerSize = 40
	crcSize    = 4
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Encode writes the index, which must be valid.
func (x *Index) Encode() []byte {
	b := make([]byte, 0, headerSize+crcSize+6*len(x.Extents))
	b = append(b, magic...)
	b = append(b, version, blockShift, 0, 0)
	b = binary.LittleEndian.AppendUint64(b, uint64(x.Start))
	b = binary.LittleEndian.AppendUint64(b, uint64(x.End))
	b = binary.LittleEndian.AppendUint64(b, uint64(x.DataLength))
	b = binary.LittleEndian.AppendUint64(b, uint64(len(x.Extents)))
	pos, data := x.Start, int64(0)
	for _, e := range x.Extents {
		b = binary.AppendUvarint(b, uint64(e.Offset-pos)>>blockShift)
		n := uint64(e.Blocks()) << 1
		if e.Zero {
			b = binary.AppendUvarint(b, n|1)
		} else {
			b = binary.AppendUvarint(b, n)
			b = binary.AppendVarint(b, e.Data-data)
			data = e.Data + e.Length
		}
		pos = e.End()
	}
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

// Decode reads what Encode wrote. Every error wraps ErrDamaged.
func Decode(b []byte) (*Index, error) {
	if len(b) < headerSize+crcSize || string(b[:4]) != magic {
		return nil, fmt.Errorf("%w: no header in %d bytes", ErrDamaged, len(b))
	}
	if b[4] != version || b[5] != blockShift || b[6] != 0 || b[7] != 0 {
		return nil, fmt.Errorf("%w: version %d with blocks of 2^%d bytes is not known to this program: use a newer one", ErrDamaged, b[4], b[5])
	}
	body := b[:len(b)-crcSize]
	if crc32.Checksum(body, castagnoli) != binary.LittleEndian.Uint32(b[len(body):]) {
		return nil, fmt.Errorf("%w: checksum does not match", ErrDamaged)
	}
	head := func(at int) int64 { return int64(binary.LittleEndian.Uint64(b[at:])) }
	x := &Index{Start: head(8), End: head(16), DataLength: head(24)}
	count := binary.LittleEndian.Uint64(b[32:])
	if err := x.Validate(); err != nil {
		return nil, err
	}
	// An extent takes two bytes at least: a wild count must not allocate.
	if count > uint64(len(body)-headerSize)/2 {
		return nil, fmt.Errorf("%w: %d extents cannot fit %d bytes", ErrDamaged, count, len(b))
	}
	if err := x.decodeExtents(body[headerSize:], int(count)); err != nil {
		return nil, err
	}
	return x, nil
}

func (x *Index) decodeExtents(b []byte, count int) error {
	x.Extents = make([]Extent, 0, count)
	pos, data := x.Start, int64(0)
	for range count {
		gap, n1 := binary.Uvarint(b)
		length, n2 := binary.Uvarint(b[max(n1, 0):])
		const most = math.MaxInt64 >> (blockShift + 1)
		if n1 <= 0 || n2 <= 0 || gap > most || length>>1 > most {
			return fmt.Errorf("%w: extent %d of %d cannot be read", ErrDamaged, len(x.Extents), count)
		}
		b = b[n1+n2:]
		e := Extent{Offset: pos + int64(gap)<<blockShift, Zero: length&1 == 1}
		if e.Offset >= x.End {
			return fmt.Errorf("%w: extent at %d lies behind its part", ErrDamaged, e.Offset)
		}
		e.Length = int64(length>>1) << blockShift
		// The last block of a device may be short.
		if over := e.Length - (x.End - e.Offset); over > 0 && over < kernel.BlockSize {
			e.Length -= over
		}
		if !e.Zero {
			d, n := binary.Varint(b)
			if n <= 0 {
				return fmt.Errorf("%w: extent %d of %d cannot be read", ErrDamaged, len(x.Extents), count)
			}
			b = b[n:]
			e.Data = data + d
		}
		if err := x.validateExtent(e, pos); err != nil {
			return err
		}
		x.Extents = append(x.Extents, e)
		pos = e.End()
		if !e.Zero {
			data = e.Data + e.Length
		}
	}
	if len(b) != 0 {
		return fmt.Errorf("%w: %d bytes too many", ErrDamaged, len(b))
	}
	return nil
}
