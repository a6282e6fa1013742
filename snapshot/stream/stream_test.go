// SPDX-License-Identifier: BSD-2-Clause

package stream

import (
	"bytes"
	"errors"
	"flag"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/dsync-backup/dsync-backup/kernel"
)

var update = flag.Bool("update", false, "write the golden files anew")

// content is a stream in parts.
type content struct {
	h      Header
	rounds [][]Blocks
	to     []kernel.Position // of the rounds after the first
}

func (c content) encode(t testing.TB, enc *zstd.Encoder) []byte {
	t.Helper()
	var out bytes.Buffer
	w, err := NewWriter(&out, c.h)
	if err != nil {
		t.Fatal(err)
	}
	p := NewPacker(c.h, enc)
	for i, round := range c.rounds {
		if i > 0 {
			if err := w.Round(c.to[i-1]); err != nil {
				t.Fatal(err)
			}
		}
		for _, b := range round {
			raw, _, err := p.Pack(nil, nil, w.Next(), b)
			if err != nil {
				t.Fatal(err)
			}
			if err := w.Put(raw); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if w.Bytes() != int64(out.Len()) {
		t.Fatalf("wrote %d bytes and counted %d", out.Len(), w.Bytes())
	}
	return out.Bytes()
}

// decoder is made once: that takes longer than most of what is decoded.
var decoder = sync.OnceValue(func() *Unpacker {
	u, err := NewUnpacker(Header{}, 1)
	if err != nil {
		panic(err)
	}
	return u
})

func unpacker(h Header) *Unpacker {
	u := *decoder()
	if u.id, u.size = h.ID, h.Size; h.Kind == Sums {
		u.unit = 8
	}
	return &u
}

// decode reads a stream to its end, and nothing behind it.
func decode(data []byte) (c content, err error) {
	in := bytes.NewReader(data)
	r, err := NewReader(in)
	if err != nil {
		return c, err
	}
	c.h, c.rounds = r.Header(), [][]Blocks{nil}
	u := unpacker(c.h)
	var rec Record
	for {
		ev, err := r.Next(&rec)
		if err != nil {
			return c, err
		}
		switch ev {
		case GotEnd:
			return c, r.Trailing()
		case GotRound:
			c.rounds, c.to = append(c.rounds, nil), append(c.to, r.To())
			continue
		}
		b, err := u.Unpack(&rec)
		if err != nil {
			return c, err
		}
		last := &c.rounds[len(c.rounds)-1]
		*last = append(*last, Blocks{b.Offset, slices.Clone(b.Runs), bytes.Clone(b.Data)})
	}
}

func (c content) equal(o content) bool {
	if c.h.ID != o.h.ID || c.h.Kind != o.h.Kind || c.h.Size != o.h.Size || c.h.From != o.h.From || c.h.To != o.h.To ||
		c.h.Base != o.h.Base || c.h.Source != o.h.Source || !slices.Equal(c.h.Through, o.h.Through) || !slices.Equal(c.to, o.to) || len(c.rounds) != len(o.rounds) {
		return false
	}
	for i := range c.rounds {
		if !slices.EqualFunc(c.rounds[i], o.rounds[i], func(a, b Blocks) bool {
			return a.Offset == b.Offset && slices.Equal(a.Runs, b.Runs) && bytes.Equal(a.Data, b.Data)
		}) {
			return false
		}
	}
	return true
}

func position(epoch uint64) kernel.Position {
	return kernel.Position{Tracker: kernel.UUID{1, 2, 3}, Epoch: epoch, Nonce: kernel.Nonce{byte(epoch), 0xaa}}
}

func blockOf(n int, b byte) []byte { return bytes.Repeat([]byte{b}, n) }

// sample is the stream of the golden file: two rounds over a device of 10
// blocks and 100 bytes.
func sample() content {
	const size = 10*kernel.BlockSize + 100
	var id ID
	for i := range id {
		id[i] = byte(i)
	}
	return content{
		h: Header{Kind: Since, Size: size, ID: id, From: position(5), To: position(9), Through: []kernel.Position{position(7)}, Source: "host:/dev/vdb"},
		rounds: [][]Blocks{
			{
				{0, []Run{{Unchanged, 2 * kernel.BlockSize}, {Data, kernel.BlockSize}, {Zeros, kernel.BlockSize}}, blockOf(kernel.BlockSize, 'a')},
				{4 * kernel.BlockSize, []Run{{Unchanged, 6 * kernel.BlockSize}, {Data, 100}}, blockOf(100, 'b')},
			},
			{{0, []Run{{Unchanged, size}}, nil}},
		},
		to: []kernel.Position{position(10)},
	}
}

func TestGoldenStream(t *testing.T) {
	path := filepath.Join("testdata", "sample.stream")
	data := sample().encode(t, nil)
	if *update {
		if err := os.WriteFile(path, data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(data, want) {
		t.Error("the format changed: what was written before would not be read")
	}
	got, err := decode(want)
	if err != nil || !got.equal(sample()) {
		t.Fatalf("read %+v: %v", got.h, err)
	}
}

func randomContent(r *rand.Rand) content {
	size := 1 + r.Int64N(3<<20)
	c := content{h: Header{Kind: Full, Size: size, ID: NewID(), To: position(3), Source: "h:/x"}}
	for n := range 1 + r.IntN(3) {
		if n > 0 {
			c.to = append(c.to, position(uint64(3+n)))
		}
		var round []Blocks
		for pos := int64(0); pos < size; {
			b := Blocks{Offset: pos}
			for pos < size && len(b.Data) < MaxData/2 && r.IntN(20) > 0 {
				n := min((1+r.Int64N(20))*kernel.BlockSize, size-pos)
				kind := RunKind(r.IntN(3))
				if kind == Data {
					d := make([]byte, n)
					for i := range d {
						d[i] = byte(r.UintN(1 + r.UintN(256)))
					}
					b.Data = append(b.Data, d...)
				}
				if k := len(b.Runs); k > 0 && b.Runs[k-1].Kind == kind {
					b.Runs[k-1].Length += n
				} else {
					b.Runs = append(b.Runs, Run{kind, n})
				}
				pos += n
			}
			if len(b.Runs) > 0 {
				round = append(round, b)
			}
		}
		c.rounds = append(c.rounds, round)
	}
	return c
}

func TestStreamGoesThere(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	for _, level := range []zstd.EncoderLevel{0, zstd.SpeedFastest, zstd.SpeedDefault, zstd.SpeedBetterCompression, zstd.SpeedBestCompression} {
		var enc *zstd.Encoder
		if level > 0 {
			var err error
			if enc, err = NewEncoder(level, 2); err != nil {
				t.Fatal(err)
			}
		}
		for range 10 {
			c := randomContent(r)
			got, err := decode(c.encode(t, enc))
			if err != nil || !got.equal(c) {
				t.Fatalf("level %v: %v", level, err)
			}
		}
	}
	// A record as long as can be, of what hardly compresses.
	enc, _ := NewEncoder(zstd.SpeedFastest, 1)
	c := content{h: Header{Kind: Full, Size: MaxData, ID: NewID()}, rounds: [][]Blocks{{{0, []Run{{Data, MaxData}}, make([]byte, MaxData)}}}}
	for i := range c.rounds[0][0].Data {
		c.rounds[0][0].Data[i] = byte(r.UintN(100))
	}
	if got, err := decode(c.encode(t, enc)); err != nil || !got.equal(c) {
		t.Fatal(err)
	}
}

func TestTruncatedAnywhereIsSaid(t *testing.T) {
	data := sample().encode(t, nil)
	for n := range data {
		if _, err := decode(data[:n]); !errors.Is(err, ErrTruncated) {
			t.Fatalf("cut after %d of %d bytes: %v", n, len(data), err)
		}
	}
	if _, err := decode(append(bytes.Clone(data), 0)); !errors.Is(err, ErrDamaged) {
		t.Fatalf("a byte more: %v", err)
	}
}

func TestFlippedBitAnywhereIsSaid(t *testing.T) {
	enc, _ := NewEncoder(zstd.SpeedFastest, 1)
	for _, e := range []*zstd.Encoder{nil, enc} {
		data := sample().encode(t, e)
		for i := range data {
			for bit := range 8 {
				bad := bytes.Clone(data)
				bad[i] ^= 1 << bit
				_, err := decode(bad)
				if !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrTruncated) && !errors.Is(err, ErrVersion) && !errors.Is(err, ErrNoStream) {
					t.Fatalf("bit %d of byte %d: %v", bit, i, err)
				}
			}
		}
	}
}

// TestStitchedStreams puts records of one stream into another, leaves one out,
// and exchanges two.
func TestStitchedStreams(t *testing.T) {
	a, b := sample(), sample()
	b.h.ID[5]++
	da, db := a.encode(t, nil), b.encode(t, nil)
	head := len(a.h.encode())
	body := func(d []byte, at int) int {
		h, _ := headAt(d[at:])
		return at + recordSize + int(h.stored)
	}
	first := body(da, head)
	second := body(da, first)
	for name, bad := range map[string][]byte{
		"Header":    append(bytes.Clone(da[:head]), db[head:]...),
		"Record":    append(append(bytes.Clone(da[:head]), db[head:first]...), da[first:]...),
		"Left out":  append(bytes.Clone(da[:head]), da[first:]...),
		"Exchanged": append(append(append(bytes.Clone(da[:head]), da[first:second]...), da[head:first]...), da[second:]...),
		"Twice":     append(append(bytes.Clone(da[:first]), da[head:first]...), da[first:]...),
	} {
		if _, err := decode(bad); !errors.Is(err, ErrDamaged) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestOtherVersionIsSaid(t *testing.T) {
	data := sample().encode(t, nil)
	data[8] = 2
	if _, err := decode(data); !errors.Is(err, ErrVersion) {
		t.Fatal(err)
	}
	if _, err := decode([]byte("this is a file of another kind")); !errors.Is(err, ErrNoStream) {
		t.Fatal(err)
	}
}

func TestHeaderValidate(t *testing.T) {
	for name, change := range map[string]func(*Header){
		"Kind":        func(h *Header) { h.Kind = 9 },
		"Size":        func(h *Header) { h.Size = -1 },
		"NoFrom":      func(h *Header) { h.From = kernel.Position{} },
		"Backwards":   func(h *Header) { h.To = position(5); h.Through = nil },
		"OtherTo":     func(h *Header) { h.To.Tracker[0]++ },
		"Base":        func(h *Header) { h.Base = NewID() },
		"Through":     func(h *Header) { h.Through = []kernel.Position{position(8), position(7)} },
		"ThroughTo":   func(h *Header) { h.Through = []kernel.Position{position(9)} },
		"ThroughFrom": func(h *Header) { h.Through = []kernel.Position{position(5)} },
		"NoID":        func(h *Header) { h.ID = ID{} },
		"Source":      func(h *Header) { h.Source = "a\nb" },
	} {
		h := sample().h
		if err := h.Validate(); err != nil {
			t.Fatal(err)
		}
		if change(&h); h.Validate() == nil {
			t.Errorf("%s is taken for valid", name)
		}
	}
}

func TestAbortSaysWhy(t *testing.T) {
	c := sample()
	var out bytes.Buffer
	w, err := NewWriter(&out, c.h)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Abort(errors.New("the device\nis gone")); err != nil {
		t.Fatal(err)
	}
	if _, err := decode(out.Bytes()); !errors.Is(err, ErrAborted) || err.Error() != "the other end gave up: the device is gone" {
		t.Fatal(err)
	}
}

func TestWriterRefusesGaps(t *testing.T) {
	c := sample()
	w, err := NewWriter(io.Discard, c.h)
	if err != nil {
		t.Fatal(err)
	}
	p := NewPacker(c.h, nil)
	raw, _, _ := p.Pack(nil, nil, 0, c.rounds[0][1])
	if w.Put(raw) == nil || w.Close() == nil || w.Round(position(10)) == nil {
		t.Fatal("a stream with a gap was written")
	}
}

func FuzzDecode(f *testing.F) {
	enc, _ := NewEncoder(zstd.SpeedFastest, 1)
	for _, e := range []*zstd.Encoder{nil, enc} {
		f.Add(sample().encode(f, e))
	}
	f.Add(content{h: Header{Kind: Sums, Size: 8192, ID: ID{1}}, rounds: [][]Blocks{{{0, []Run{{Data, 8192}}, make([]byte, 16)}}}}.encode(f, nil))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := decode(data)
		if err != nil {
			return
		}
		// What is taken for whole accounts for all of the device.
		for _, round := range c.rounds {
			pos := int64(0)
			for _, b := range round {
				if b.Offset != pos {
					t.Fatalf("a gap at %d", pos)
				}
				pos += b.Length()
			}
			if pos != c.h.Size {
				t.Fatalf("%d bytes of %d", pos, c.h.Size)
			}
		}
	})
}

// FuzzUnpack has the sums of the header and of the records right, so that what
// they cover is reached.
func FuzzUnpack(f *testing.F) {
	enc, _ := NewEncoder(zstd.SpeedFastest, 1)
	for _, e := range []*zstd.Encoder{nil, enc} {
		raw, _, _ := NewPacker(sample().h, e).Pack(nil, nil, 0, sample().rounds[0][0])
		f.Add(raw, int64(10*kernel.BlockSize+100))
	}
	f.Fuzz(func(t *testing.T, raw []byte, size int64) {
		if len(raw) < recordSize || size < 0 || size > MaxSize {
			return
		}
		h := Header{Kind: Full, Size: size, ID: ID{1}}
		head, _ := headAt(raw)
		head.stored = uint32(len(raw) - recordSize)
		raw = seal(&h.ID, bytes.Clone(raw), head)
		u := unpacker(h)
		r := &Reader{r: bytes.NewReader(raw), h: h, chain: newChain()}
		var rec Record
		ev, err := r.Next(&rec)
		if err != nil || ev != GotBlocks {
			return
		}
		b, err := u.Unpack(&rec)
		if err != nil {
			return
		}
		if e := (kernel.Extent{Offset: b.Offset, Length: b.Length()}); e.Validate(size) != nil {
			t.Fatalf("%v of %d bytes", e, size)
		}
	})
}
