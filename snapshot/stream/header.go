// SPDX-License-Identifier: BSD-2-Clause

package stream

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"
	"unicode/utf8"

	"github.com/dsync-backup/dsync-backup/kernel"
)

// Errors on which callers decide. Test with errors.Is.
var (
	// ErrTruncated says that the stream ended before its end record.
	ErrTruncated = errors.New("the stream ends in the middle")
	// ErrDamaged says that the stream is not what was written.
	ErrDamaged = errors.New("the stream is damaged")
	// ErrVersion says that the stream is of another format version.
	ErrVersion = errors.New("the stream has another format version")
	// ErrAborted says that what wrote the stream gave up; the text says why.
	ErrAborted = errors.New("the other end gave up")
	// ErrNoStream says that it does not begin like a stream.
	ErrNoStream = errors.New("this is no stream of dsync-backup")
)

const (
	magic   = "DSYNCSTM"
	version = 1

	fixedHeader = 240
	maxSource   = 1024
	sumSize     = sha256.Size

	// MaxThrough is how many positions a header may name.
	MaxThrough = 256
	// MaxSize is the largest device, in bytes.
	MaxSize = int64(1) << 49
)

// Kind says what a stream holds.
type Kind uint32

// The kinds.
const (
	Full    Kind = 1 // the whole device
	Since   Kind = 2 // what was written since the position From
	Against Kind = 3 // what differs from the sums Base
	Sums    Kind = 4 // no data, but the sums of a device's blocks
)

func (k Kind) String() string {
	switch k {
	case Full:
		return "full"
	case Since:
		return "tracker"
	case Against:
		return "compare"
	case Sums:
		return "sums"
	}
	return fmt.Sprintf("kind %d", uint32(k))
}

// ID names a stream; it is drawn at random, and is the key of the records'
// sums, so that a record of another stream is not taken for one of this.
type ID [32]byte

// NewID draws an ID.
func NewID() (id ID) {
	_, _ = rand.Read(id[:]) // never fails: it aborts the process
	return id
}

// IsZero reports whether it names no stream.
func (id ID) IsZero() bool { return id == ID{} }

func (id ID) String() string { return hex.EncodeToString(id[:]) }

// MarshalText writes 64 hex digits.
func (id ID) MarshalText() ([]byte, error) { return []byte(id.String()), nil }

// UnmarshalText reads 64 hex digits.
func (id *ID) UnmarshalText(b []byte) error {
	if len(b) != 2*len(id) {
		return fmt.Errorf("parse stream ID %q: want %d hex digits", b, 2*len(id))
	}
	_, err := hex.Decode(id[:], b)
	return err
}

// Header is the beginning of a stream.
type Header struct {
	Kind Kind
	Size int64 // of the device, in bytes
	ID   ID

	// From is where the target has to be for a stream of what changed since;
	// zero in any other.
	From kernel.Position
	// To is what the target is complete up to after the first round; zero if
	// nothing tracks the source.
	To kernel.Position
	// Through are positions after From and before To that the source knows to
	// be of the same history, oldest first: a target at one of them is
	// covered too.
	Through []kernel.Position

	// Base names the sums that the stream was made against, and in a stream of
	// sums is zero.
	Base ID
	// Source names the device, for people and to tell one from another:
	// host:path.
	Source string
}

// Validate reports what cannot be.
func (h Header) Validate() error {
	switch {
	case h.Kind < Full || h.Kind > Sums:
		return fmt.Errorf("%v is not known", h.Kind)
	case h.Size < 0 || h.Size > MaxSize:
		return fmt.Errorf("a device of %d bytes is not possible", h.Size)
	case h.ID.IsZero():
		return errors.New("it has no ID")
	case (h.Kind == Since) == h.From.IsZero():
		return fmt.Errorf("the position from which it starts does not fit %v", h.Kind)
	case h.Kind == Since && h.To.Tracker != h.From.Tracker, h.Kind == Since && h.To.Epoch <= h.From.Epoch:
		return fmt.Errorf("it does not lead on from %v to %v", h.From, h.To)
	case (h.Kind == Against) == h.Base.IsZero():
		return fmt.Errorf("the sums that it was made against do not fit %v", h.Kind)
	case h.Kind == Sums && !h.To.IsZero():
		return errors.New("sums lead to no position")
	case len(h.Through) > MaxThrough || h.Kind != Since && len(h.Through) > 0:
		return fmt.Errorf("%d positions in between do not fit", len(h.Through))
	case len(h.Source) > maxSource || !utf8.ValidString(h.Source) || strings.ContainsFunc(h.Source, func(r rune) bool { return r < ' ' }):
		return errors.New("the name of its source is not possible")
	}
	last := h.From.Epoch
	for _, p := range h.Through {
		if p.Tracker != h.From.Tracker || p.Epoch <= last || p.Epoch >= h.To.Epoch {
			return fmt.Errorf("%v does not lie between %v and %v", p, h.From, h.To)
		}
		last = p.Epoch
	}
	return nil
}

const positionSize = 40

func appendPosition(b []byte, p kernel.Position) []byte {
	b = append(b, p.Tracker[:]...)
	b = binary.LittleEndian.AppendUint64(b, p.Epoch)
	return append(b, p.Nonce[:]...)
}

func positionAt(b []byte) (p kernel.Position) {
	copy(p.Tracker[:], b)
	p.Epoch = binary.LittleEndian.Uint64(b[16:])
	copy(p.Nonce[:], b[24:positionSize])
	return p
}

// encode gives the header's bytes.
func (h Header) encode() []byte {
	le := binary.LittleEndian
	b := make([]byte, 0, fixedHeader+len(h.Through)*positionSize+len(h.Source)+sumSize)
	b = append(b, magic...)
	b = le.AppendUint32(b, version)
	b = le.AppendUint32(b, uint32(h.Kind))
	b = le.AppendUint32(b, kernel.BlockSize)
	b = le.AppendUint32(b, uint32(len(h.Through)))
	b = le.AppendUint32(b, uint32(len(h.Source)))
	b = le.AppendUint32(b, 0)
	b = le.AppendUint64(b, uint64(h.Size))
	b = append(b, h.ID[:]...)
	b = append(b, h.Base[:]...)
	b = appendPosition(b, h.From)
	b = appendPosition(b, h.To)
	b = append(b, make([]byte, fixedHeader-len(b))...)
	for _, p := range h.Through {
		b = appendPosition(b, p)
	}
	b = append(b, h.Source...)
	sum := sha256.Sum256(b)
	return append(b, sum[:]...)
}

// readHeader reads a header and returns its bytes too.
func readHeader(r io.Reader) (h Header, raw []byte, err error) {
	raw = make([]byte, fixedHeader)
	if n, err := io.ReadFull(r, raw); err != nil {
		if have := raw[:min(n, len(magic))]; len(have) > 0 && !bytes.HasPrefix([]byte(magic), have) {
			return h, nil, ErrNoStream
		}
		return h, nil, cut(err, int64(n))
	}
	le := binary.LittleEndian
	if string(raw[:8]) != magic {
		return h, nil, ErrNoStream
	}
	if v := le.Uint32(raw[8:]); v != version {
		return h, nil, fmt.Errorf("%w: %d, and this program reads %d: use the same release at both ends", ErrVersion, v, version)
	}
	through, source := le.Uint32(raw[20:]), le.Uint32(raw[24:])
	if through > MaxThrough || source > maxSource {
		return h, nil, fmt.Errorf("%w: its header is too long", ErrDamaged)
	}
	rest := make([]byte, int(through)*positionSize+int(source)+sumSize)
	if n, err := io.ReadFull(r, rest); err != nil {
		return h, nil, cut(err, int64(len(raw)+n))
	}
	raw = append(raw, rest...)
	body := raw[:len(raw)-sumSize]
	if sum := sha256.Sum256(body); !bytes.Equal(sum[:], raw[len(body):]) {
		return h, nil, fmt.Errorf("%w: its header does not match its checksum", ErrDamaged)
	}
	h = Header{
		Kind: Kind(le.Uint32(raw[12:])), Size: int64(le.Uint64(raw[32:])),
		ID: ID(raw[40:72]), Base: ID(raw[72:104]), From: positionAt(raw[104:]), To: positionAt(raw[144:]),
	}
	at := fixedHeader
	for range through {
		h.Through = append(h.Through, positionAt(raw[at:]))
		at += positionSize
	}
	h.Source = string(raw[at : at+int(source)])
	err = h.Validate()
	if err == nil && !bytes.Equal(h.encode(), raw) {
		err = errors.New("its header holds what this version does not know")
	}
	if err != nil {
		return h, nil, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return h, raw, nil
}

// cut says that the stream ended too early, or why it cannot be read.
func cut(err error, at int64) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("%w, after %d bytes: what sends it failed, or the connection was lost", ErrTruncated, at)
	}
	return fmt.Errorf("read stream: %w", err)
}
