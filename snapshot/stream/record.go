// SPDX-License-Identifier: BSD-2-Clause

package stream

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash"

	"github.com/klauspost/compress/zstd"
	"github.com/minio/highwayhash"

	"github.com/dsync-backup/dsync-backup/kernel"
)

// The bounds of a record, in bytes and runs.
const (
	MaxData = 1 << 20
	MaxRuns = 4096

	maxRunBytes = MaxRuns * binary.MaxVarintLen64
	maxBody     = MaxData + maxRunBytes
	recordSize  = 64 // of a record's head
	recordSum   = 16
)

// Type is the type of a record.
type Type uint32

// The types.
const (
	typeBlocks Type = 1
	typeRound  Type = 2
	typeEnd    Type = 3
	typeAbort  Type = 4 // what writes the stream gave up: the body says why
)

const (
	encodingPlain = 0
	encodingZstd  = 1
)

// RunKind says what a run of blocks holds.
type RunKind uint8

// The kinds.
const (
	Data      RunKind = 0 // bytes, in the record (in a stream of sums: their sums)
	Zeros     RunKind = 1
	Unchanged RunKind = 2 // the target has them
	runKinds          = 3
)

// Run is a run of whole blocks; the device's last may be short.
type Run struct {
	Kind   RunKind
	Length int64 // in bytes of the device
}

// Blocks is what a record of blocks says: the runs follow one another from
// Offset on, and Data holds the bytes of those that have any.
type Blocks struct {
	Offset int64
	Runs   []Run
	Data   []byte
}

// Length is how much of the device it deals with.
func (b Blocks) Length() (n int64) {
	for _, r := range b.Runs {
		n += r.Length
	}
	return n
}

// head is the fixed beginning of a record.
type head struct {
	typ      Type
	encoding uint32
	seq      uint64
	offset   int64
	length   int64
	stored   uint32 // bytes of the body in the stream
	unpacked uint32 // and of what it holds
	data     uint32 // of that, Blocks.Data; the runs follow
	sum      [recordSum]byte
}

func (h head) put(b []byte) {
	le := binary.LittleEndian
	le.PutUint32(b, uint32(h.typ))
	le.PutUint32(b[4:], h.encoding)
	le.PutUint64(b[8:], h.seq)
	le.PutUint64(b[16:], uint64(h.offset))
	le.PutUint64(b[24:], uint64(h.length))
	le.PutUint32(b[32:], h.stored)
	le.PutUint32(b[36:], h.unpacked)
	le.PutUint32(b[40:], h.data)
	le.PutUint32(b[44:], 0)
	copy(b[recordSize-recordSum:], h.sum[:])
}

func headAt(b []byte) (h head, ok bool) {
	le := binary.LittleEndian
	h = head{
		typ: Type(le.Uint32(b)), encoding: le.Uint32(b[4:]), seq: le.Uint64(b[8:]),
		offset: int64(le.Uint64(b[16:])), length: int64(le.Uint64(b[24:])),
		stored: le.Uint32(b[32:]), unpacked: le.Uint32(b[36:]), data: le.Uint32(b[40:]),
	}
	copy(h.sum[:], b[recordSize-recordSum:])
	return h, le.Uint32(b[44:]) == 0
}

// sumRecord is the sum of a record, of which raw is all: HighwayHash-128, with
// the stream's ID as its key, of everything but the sum itself.
func sumRecord(id *ID, raw []byte) [recordSum]byte {
	h, err := highwayhash.New128(id[:])
	if err != nil {
		panic(err) // the key has the length that it must have
	}
	_, _ = h.Write(raw[:recordSize-recordSum])
	_, _ = h.Write(raw[recordSize:])
	return [recordSum]byte(h.Sum(nil))
}

// seal puts head and sum before a body that raw already holds.
func seal(id *ID, raw []byte, h head) []byte {
	h.stored = uint32(len(raw) - recordSize)
	h.put(raw)
	sum := sumRecord(id, raw)
	copy(raw[recordSize-recordSum:], sum[:])
	return raw
}

// Packer makes records of one stream. It may be used from many goroutines.
type Packer struct {
	id  ID
	enc *zstd.Encoder // nil: nothing is compressed
}

// NewPacker packs for the stream of a header. The encoder may be shared; nil
// compresses nothing.
func NewPacker(h Header, enc *zstd.Encoder) *Packer { return &Packer{h.ID, enc} }

// Pack appends the record with a number to dst, which is empty and may have
// capacity to use. scratch is memory that it may use and returns.
func (p *Packer) Pack(dst, scratch []byte, seq uint64, b Blocks) (raw, used []byte, err error) {
	if len(b.Runs) == 0 || len(b.Runs) > MaxRuns || len(b.Data) > MaxData {
		return nil, scratch, fmt.Errorf("pack a record of %d runs and %d bytes: not possible", len(b.Runs), len(b.Data))
	}
	body := append(scratch[:0], b.Data...)
	for _, r := range b.Runs {
		blocks := kernel.BlocksOf(r.Length)
		body = binary.AppendUvarint(body, uint64(blocks)*runKinds+uint64(r.Kind))
	}
	h := head{
		typ: typeBlocks, seq: seq, offset: b.Offset, length: b.Length(),
		unpacked: uint32(len(body)), data: uint32(len(b.Data)),
	}
	dst = append(dst[:0], make([]byte, recordSize)...)
	if p.enc != nil {
		dst = p.enc.EncodeAll(body, dst)
		h.encoding = encodingZstd
	}
	if p.enc == nil || len(dst)-recordSize >= len(body) {
		dst = append(dst[:recordSize], body...)
		h.encoding = encodingPlain
	}
	return seal(&p.id, dst, h), body, nil
}

// parseRuns reads the runs of a record that covers length bytes of a device of
// size bytes from offset on, and counts the bytes of those with data.
func parseRuns(b []byte, runs []Run, offset, length, size int64) (out []Run, data int64, err error) {
	runs = runs[:0]
	for end := offset + length; len(b) > 0; {
		v, n := binary.Uvarint(b)
		if n <= 0 || n > 1 && b[n-1] == 0 || len(runs) == MaxRuns {
			return runs, 0, fmt.Errorf("%w: a record's runs cannot be read", ErrDamaged)
		}
		b = b[n:]
		kind, blocks := RunKind(v%runKinds), v/runKinds
		if blocks == 0 || blocks > uint64(kernel.BlocksOf(end-offset)) {
			return runs, 0, fmt.Errorf("%w: a record's runs are not those of its range", ErrDamaged)
		}
		// Only a device's last block may be short.
		l := min(int64(blocks)*kernel.BlockSize, size-offset)
		if k := len(runs); k > 0 && runs[k-1].Kind == kind {
			return runs, 0, fmt.Errorf("%w: a record's runs are not joined", ErrDamaged)
		}
		runs = append(runs, Run{kind, l})
		if kind == Data {
			data += l
		}
		offset += l
		if offset > end || len(b) == 0 && offset != end {
			return runs, 0, fmt.Errorf("%w: a record's runs are not those of its range", ErrDamaged)
		}
	}
	if len(runs) == 0 {
		return runs, 0, fmt.Errorf("%w: a record without runs", ErrDamaged)
	}
	return runs, data, nil
}

// newChain is the hash of the whole: of the header and every record's head.
func newChain() hash.Hash { return sha256.New() }
