// SPDX-License-Identifier: BSD-2-Clause

package stream

import (
	"bytes"
	"errors"
	"fmt"
	"hash"
	"io"
	"unicode/utf8"
	"unsafe"

	"github.com/klauspost/compress/zstd"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/snapshot/blocksum"
)

// Event says what Next found.
type Event int

// The events.
const (
	GotBlocks Event = iota // a record of blocks, to be unpacked
	GotRound               // another round begins: everything before is to be done first
	GotEnd                 // the stream is whole, if all its records can be unpacked
)

// Record is a record as it was read. Its memory is used again by the next read
// into it.
type Record struct {
	head head
	raw  []byte // head and body; the body begins on a page
	mem  []byte
	out  []byte // unpacked; page-aligned
	runs []Run
}

const page = 4096

// aligned returns memory of which p[skip:] begins on a page.
func aligned(n, skip int) []byte {
	b := make([]byte, n+page)
	at := (page - int((uintptr(unsafe.Pointer(&b[0]))+uintptr(skip))%page)) % page
	return b[at : at+n : at+n]
}

// roomy is how much memory is taken where n bytes are needed: records of a
// stream are of about the same length.
func roomy(n, most int) int { return min(n+n/2, most) }

// Reader reads a stream, from one goroutine.
type Reader struct {
	r     io.Reader
	h     Header
	to    kernel.Position
	chain hash.Hash
	seq   uint64
	pos   int64
	bytes int64
	ended bool
}

// NewReader reads the header.
func NewReader(r io.Reader) (*Reader, error) {
	h, raw, err := readHeader(r)
	if err != nil {
		return nil, err
	}
	s := &Reader{r: r, h: h, to: h.To, chain: newChain(), bytes: int64(len(raw))}
	s.chain.Write(raw)
	return s, nil
}

// Header is the stream's.
func (s *Reader) Header() Header { return s.h }

// To is what the target is complete up to after the round that is being read.
func (s *Reader) To() kernel.Position { return s.to }

// Bytes is how much was read so far.
func (s *Reader) Bytes() int64 { return s.bytes }

// Next reads a record. After GotEnd it is not called any more.
func (s *Reader) Next(rec *Record) (Event, error) {
	if s.ended {
		return 0, errors.New("read stream: it has ended")
	}
	var fixed [recordSize]byte
	raw := fixed[:]
	if n, err := io.ReadFull(s.r, raw); err != nil {
		return 0, cut(err, s.bytes+int64(n))
	}
	h, ok := headAt(raw)
	if !ok || h.seq != s.seq || h.stored > h.unpacked || h.unpacked > maxBody || h.data > h.unpacked {
		return 0, fmt.Errorf("%w at byte %d", ErrDamaged, s.bytes)
	}
	if need := recordSize + int(h.stored); len(rec.mem) < need {
		rec.mem = aligned(roomy(need, recordSize+maxBody), recordSize)
	}
	raw = rec.mem[:recordSize+int(h.stored)]
	copy(raw, fixed[:])
	if n, err := io.ReadFull(s.r, raw[recordSize:]); err != nil {
		return 0, cut(err, s.bytes+recordSize+int64(n))
	}
	rec.head, rec.raw = h, raw
	at := s.bytes
	s.bytes += int64(len(raw))
	ev, err := s.take(rec)
	if errors.Is(err, ErrAborted) {
		return 0, err
	}
	if err != nil {
		return 0, fmt.Errorf("%w, in the record at byte %d", err, at)
	}
	s.seq++
	s.chain.Write(raw[:recordSize])
	return ev, nil
}

// take checks what a record says against what came before it.
func (s *Reader) take(rec *Record) (Event, error) {
	h := rec.head
	switch h.typ {
	case typeBlocks:
		if h.offset != s.pos || h.length <= 0 || h.length > s.h.Size-h.offset || h.data > MaxData ||
			(h.length%kernel.BlockSize != 0 && h.offset+h.length != s.h.Size) {
			return 0, fmt.Errorf("%w: its blocks do not follow those before", ErrDamaged)
		}
		s.pos += h.length
		return GotBlocks, nil
	case typeRound, typeEnd, typeAbort:
	default:
		return 0, fmt.Errorf("%w: no such type of record", ErrDamaged)
	}
	if sumRecord(&s.h.ID, rec.raw) != h.sum {
		return 0, fmt.Errorf("%w: the checksum does not match", ErrDamaged)
	}
	if h.typ == typeAbort {
		text := rec.raw[recordSize:]
		if h.encoding != encodingPlain || len(text) > maxReason || !utf8.Valid(text) {
			return 0, fmt.Errorf("%w: a reason that cannot be", ErrDamaged)
		}
		return 0, fmt.Errorf("%w: %s", ErrAborted, text)
	}
	if s.pos != s.h.Size {
		return 0, fmt.Errorf("%w: it accounts for %d bytes of a device of %d", ErrDamaged, s.pos, s.h.Size)
	}
	body := rec.raw[recordSize:]
	if h.typ == typeRound {
		if h.encoding != encodingPlain || len(body) != positionSize || h.unpacked != positionSize || h.offset != 0 || h.length != 0 || h.data != 0 || s.h.Kind == Sums {
			return 0, fmt.Errorf("%w: a round that cannot be", ErrDamaged)
		}
		to := positionAt(body)
		if !leadsOn(s.to, to) {
			return 0, fmt.Errorf("%w: a round does not lead on", ErrDamaged)
		}
		s.pos, s.to = 0, to
		return GotRound, nil
	}
	return GotEnd, s.end(h, body)
}

func (s *Reader) end(h head, body []byte) error {
	if h.encoding != encodingPlain || len(body) != positionSize+sumSize || int(h.unpacked) != len(body) || h.offset != s.h.Size || h.length != 0 || h.data != 0 {
		return fmt.Errorf("%w: an end that cannot be", ErrDamaged)
	}
	if !bytes.Equal(s.chain.Sum(nil), body[positionSize:]) || positionAt(body) != s.to {
		return fmt.Errorf("%w: the checksum of the whole does not match", ErrDamaged)
	}
	s.ended = true
	return nil
}

// Trailing is an error if anything follows the end.
func (s *Reader) Trailing() error {
	var b [1]byte
	switch _, err := io.ReadFull(s.r, b[:]); {
	case errors.Is(err, io.EOF):
		return nil
	case err != nil:
		return fmt.Errorf("read stream: %w", err)
	}
	return fmt.Errorf("%w: something follows its end, at byte %d", ErrDamaged, s.bytes)
}

// Unpacker checks and unpacks records of one stream. It may be used from many
// goroutines, each with a record of its own.
type Unpacker struct {
	id   ID
	size int64
	unit int64 // bytes of data for each block
	dec  *zstd.Decoder
}

// NewUnpacker unpacks for the stream of a header. The caller closes it.
func NewUnpacker(h Header, parallel int) (*Unpacker, error) {
	dec, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(parallel), zstd.WithDecodeAllCapLimit(true), zstd.WithDecoderMaxMemory(maxBody))
	if err != nil {
		return nil, fmt.Errorf("read stream: %w", err)
	}
	u := &Unpacker{id: h.ID, size: h.Size, dec: dec}
	if h.Kind == Sums {
		u.unit = blocksum.Size
	}
	return u, nil
}

// Close frees what it holds.
func (u *Unpacker) Close() { u.dec.Close() }

// Unpack gives what a record of blocks says; its data begins on a page. It is
// valid until the record is used again.
func (u *Unpacker) Unpack(rec *Record) (b Blocks, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("%w, in the record for %d bytes at %d of the device", err, rec.head.length, rec.head.offset)
		}
	}()
	h := rec.head
	if sumRecord(&u.id, rec.raw) != h.sum {
		return b, fmt.Errorf("%w: the checksum does not match", ErrDamaged)
	}
	body := rec.raw[recordSize:]
	switch h.encoding {
	case encodingPlain:
	case encodingZstd:
		if len(rec.out) < int(h.unpacked) {
			rec.out = aligned(roomy(int(h.unpacked), maxBody), 0)
		}
		if body, err = u.dec.DecodeAll(body, rec.out[:0:h.unpacked]); err != nil {
			return b, fmt.Errorf("%w: %w", ErrDamaged, err)
		}
	default:
		return b, fmt.Errorf("%w: no such encoding", ErrDamaged)
	}
	if len(body) != int(h.unpacked) {
		return b, fmt.Errorf("%w: it unpacks to %d bytes, not %d", ErrDamaged, len(body), h.unpacked)
	}
	runs, data, err := parseRuns(body[h.data:], rec.runs, h.offset, h.length, u.size)
	rec.runs = runs
	if err != nil {
		return b, err
	}
	if u.unit > 0 {
		data = kernel.BlocksOf(data) * u.unit
	}
	if data != int64(h.data) {
		return b, fmt.Errorf("%w: its runs need %d bytes of data, and it has %d", ErrDamaged, data, h.data)
	}
	return Blocks{h.offset, runs, body[:h.data]}, nil
}
