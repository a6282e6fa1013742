// SPDX-License-Identifier: BSD-2-Clause

package stream

import (
	"fmt"
	"hash"
	"io"
	"strings"

	"github.com/dsync-backup/dsync-backup/kernel"
)

// Writer writes a stream. It is used by one goroutine; the records that it is
// given may be made by many.
type Writer struct {
	w     io.Writer
	h     Header
	to    kernel.Position
	chain hash.Hash // of the header and every record's head
	seq   uint64
	pos   int64
	bytes int64
}

// NewWriter writes the header.
func NewWriter(w io.Writer, h Header) (*Writer, error) {
	if err := h.Validate(); err != nil {
		return nil, fmt.Errorf("write stream: %w", err)
	}
	s := &Writer{w: w, h: h, to: h.To, chain: newChain()}
	raw := h.encode()
	s.chain.Write(raw)
	return s, s.write(raw)
}

func (s *Writer) write(raw []byte) error {
	n, err := s.w.Write(raw)
	s.bytes += int64(n)
	if err != nil {
		return fmt.Errorf("write stream: %w", err)
	}
	return nil
}

// Next is the number that the next record must have.
func (s *Writer) Next() uint64 { return s.seq }

// Bytes is how long the stream is so far.
func (s *Writer) Bytes() int64 { return s.bytes }

// Put writes a record from [Packer.Pack]. Records come in the order of their
// numbers, and of the device, without a gap.
func (s *Writer) Put(raw []byte) error {
	h, _ := headAt(raw)
	if h.seq != s.seq || h.offset != s.pos || h.length <= 0 || h.length > s.h.Size-h.offset {
		return fmt.Errorf("write stream: record %d at %d does not follow %d at %d: this is a fault of the program", h.seq, h.offset, s.seq, s.pos)
	}
	s.pos += h.length
	return s.put(raw)
}

func (s *Writer) put(raw []byte) error {
	s.chain.Write(raw[:recordSize])
	s.seq++
	return s.write(raw)
}

// whole reports a round that does not account for the whole device.
func (s *Writer) whole() error {
	if s.pos != s.h.Size {
		return fmt.Errorf("write stream: it accounts for %d bytes of %d: this is a fault of the program", s.pos, s.h.Size)
	}
	return nil
}

// Round begins another round, which brings the target up to a later position:
// what it says of a block takes the place of what earlier ones said.
func (s *Writer) Round(to kernel.Position) error {
	if err := s.whole(); err != nil {
		return err
	}
	if s.h.Kind == Sums || !leadsOn(s.to, to) {
		return fmt.Errorf("write stream: no round leads from %v to %v", s.to, to)
	}
	s.pos, s.to = 0, to
	raw := appendPosition(make([]byte, recordSize), to)
	return s.put(seal(&s.h.ID, raw, head{typ: typeRound, seq: s.seq, unpacked: positionSize}))
}

// leadsOn reports whether a round may lead from one position to another.
func leadsOn(from, to kernel.Position) bool {
	return !from.IsZero() && from.Tracker == to.Tracker && from.Epoch < to.Epoch
}

// Close writes the end. Without it, the stream is worth nothing to its reader.
func (s *Writer) Close() error {
	if err := s.whole(); err != nil {
		return err
	}
	raw := appendPosition(make([]byte, recordSize), s.to)
	raw = s.chain.Sum(raw)
	return s.put(seal(&s.h.ID, raw, head{typ: typeEnd, seq: s.seq, offset: s.h.Size, unpacked: positionSize + sumSize}))
}

// maxReason bounds what Abort says.
const maxReason = 2048

// Abort ends the stream with the reason why it is not whole.
func (s *Writer) Abort(reason error) error {
	text := strings.Map(func(r rune) rune {
		if r < ' ' {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(reason.Error(), "?"))
	raw := append(make([]byte, recordSize), text[:min(len(text), maxReason)]...)
	return s.put(seal(&s.h.ID, raw, head{typ: typeAbort, seq: s.seq, unpacked: uint32(len(raw) - recordSize)}))
}
