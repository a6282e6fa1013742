// SPDX-License-Identifier: BSD-2-Clause

package epochlog

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"math/rand/v2"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/dsync-backup/dsync-backup/kernel"
)

func sample() kernel.Epoch {
	b := kernel.NewBitmap(200)
	b.SetRange(0, 2)
	b.Set(64)
	b.SetRange(100, 199)
	return kernel.Epoch{Bitmap: b, Position: kernel.Position{
		Tracker: kernel.UUID{0: 0x11, 15: 0x22}, Epoch: 7, Nonce: kernel.Nonce{0: 0x33, 15: 0x44},
	}}
}

// TestSampleOfTheDocumentation reads the format's page as a golden file.
func TestSampleOfTheDocumentation(t *testing.T) {
	page, err := os.ReadFile("../../docs/epoch-log.md")
	if err != nil {
		t.Fatal(err)
	}
	dump := regexp.MustCompile("(?s)```hex\n(.*?)```").FindSubmatch(page)
	if dump == nil {
		t.Fatal("the page has no sample")
	}
	want, err := hex.DecodeString(strings.Join(strings.Fields(string(dump[1])), ""))
	if err != nil {
		t.Fatal(err)
	}
	if got := Encode(sample()); !bytes.Equal(got, want) {
		t.Fatalf("encoded to\n%s", hex.Dump(got))
	}
	wantEpoch(t, want, sample())
}

func wantEpoch(t *testing.T, data []byte, want kernel.Epoch) {
	t.Helper()
	got, err := Decode(data)
	if err != nil {
		t.Fatal(err)
	}
	if got.Position != want.Position || got.Bitmap.Blocks() != want.Bitmap.Blocks() ||
		!got.Bitmap.Equal(want.Bitmap) {
		t.Fatalf("decoded %s, %d of %d blocks; want %s, %d of %d", got.Position, got.Bitmap.Count(), got.Bitmap.Blocks(),
			want.Position, want.Bitmap.Count(), want.Bitmap.Blocks())
	}
}

func newRand(t *testing.T) *rand.Rand {
	t.Helper()
	s := uint64(time.Now().UnixNano())
	t.Logf("seed %d", s)
	return rand.New(rand.NewPCG(s, 0))
}

func TestEveryBitmapComesBack(t *testing.T) {
	rng := newRand(t)
	seen := map[byte]int{}
	for i := range 500 {
		e := sample()
		e.Bitmap = kernel.NewBitmap(rng.Int64N(3000))
		if i%5 == 0 { // a pattern, which compresses
			for b := int64(0); b < e.Bitmap.Blocks(); b += 2 + int64(i%3)*37 {
				e.Bitmap.Set(b)
			}
			wantEpoch(t, Encode(e), e)
			seen[Encode(e)[64]]++
			continue
		}
		for range rng.IntN(1 + int(e.Bitmap.Blocks())) {
			first := rng.Int64N(e.Bitmap.Blocks())
			last := first
			if i%2 == 0 { // few long runs; else scattered blocks, as worst for runs
				last += rng.Int64N(e.Bitmap.Blocks() - first)
			}
			e.Bitmap.SetRange(first, last)
		}
		data := Encode(e)
		wantEpoch(t, data, e)
		if limit := headerSize + 8*e.Bitmap.Words() + sha256.Size; len(data) > limit {
			t.Fatalf("%d bytes, more than the bitmap itself", len(data))
		}
		seen[data[64]]++
	}
	for encoding := range byte(4) {
		if seen[encoding] == 0 {
			t.Errorf("encoding %d was never chosen: %v", encoding, seen)
		}
	}
}

func TestEveryFlippedBitAndEveryTruncationIsFound(t *testing.T) {
	data := Encode(sample())
	for i := range data {
		for bit := range 8 {
			bad := bytes.Clone(data)
			bad[i] ^= 1 << bit
			if _, err := Decode(bad); err == nil {
				t.Fatalf("bit %d of byte %d was flipped, and it was read", bit, i)
			}
		}
		if _, err := Decode(data[:i]); err == nil {
			t.Fatalf("it was read when truncated to %d bytes", i)
		}
	}
	if _, err := Decode(append(bytes.Clone(data), 0)); err == nil {
		t.Fatal("it was read with a byte behind the end")
	}
}

// seal gives an entry that was tampered with a right checksum and length.
func seal(data []byte) []byte {
	binary.LittleEndian.PutUint64(data[72:], uint64(len(data)-headerSize))
	sum := sha256.Sum256(data)
	return append(data, sum[:]...)
}

func TestRejectsWhatEncodeNeverWrites(t *testing.T) {
	body := func(change func(d []byte) []byte) []byte {
		d := Encode(sample())
		return seal(change(d[:len(d)-sha256.Size]))
	}
	for name, data := range map[string][]byte{
		"Version":   body(func(d []byte) []byte { d[8] = 2; return d }),
		"BlockSize": body(func(d []byte) []byte { d[12] = 1; return d }),
		"Encoding":  body(func(d []byte) []byte { d[64] = 4; return d }),
		"NoFrame":   body(func(d []byte) []byte { d[64] = 2; return d }),
		"TwoFrames": body(func(d []byte) []byte {
			d[64] = 2
			z := compress(d[headerSize:])
			return append(append(d[:headerSize], z...), z...)
		}),
		"FrameTooLong": body(func(d []byte) []byte { d[64] = 3; return append(d[:headerSize], compress(make([]byte, 40))...) }),
		"FrameTruncated": body(func(d []byte) []byte {
			d[64] = 2
			z := compress(d[headerSize:])
			return append(d[:headerSize], z[:len(z)-1]...)
		}),
		"Reserved":      body(func(d []byte) []byte { d[68] = 1; return d }),
		"Huge":          body(func(d []byte) []byte { d[63] = 0x7f; return d }),
		"RunOverTheEnd": body(func(d []byte) []byte { d[56] = 199; return d }),
		"EmptyRun":      body(func(d []byte) []byte { return append(d[:headerSize], 5, 0) }),
		"TouchingRuns":  body(func(d []byte) []byte { return append(d[:headerSize], 5, 1, 0, 1) }),
		"HalfARun":      body(func(d []byte) []byte { return append(d[:headerSize], 5) }),
		"LongVarint":    body(func(d []byte) []byte { return append(d[:headerSize], 0x85, 0x00, 1) }),
		"RawTooShort":   body(func(d []byte) []byte { d[64] = 1; return append(d[:headerSize], make([]byte, 24)...) }),
		"RawBehindEnd":  body(func(d []byte) []byte { d[64] = 1; return append(d[:headerSize], bytes.Repeat([]byte{0xff}, 32)...) }),
	} {
		if e, err := Decode(data); err == nil {
			t.Errorf("%s: was read, %d blocks", name, e.Bitmap.Count())
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(Encode(sample()), false)
	whole := Encode(sample())
	f.Add(whole[:len(whole)-sha256.Size], true)
	dense := sample()
	for i := int64(0); i < 200; i += 2 {
		dense.Bitmap.Set(i)
	}
	f.Add(Encode(dense), false)
	f.Fuzz(func(t *testing.T, data []byte, sealed bool) {
		if sealed && len(data) >= headerSize {
			data = seal(bytes.Clone(data))
		}
		if len(data) >= headerSize && binary.LittleEndian.Uint64(data[56:]) > 1<<24 {
			return // a bitmap of it would take long, not go wrong
		}
		e, err := Decode(data)
		if err != nil {
			return
		}
		// One bitmap has several encodings, and Encode chooses.
		again, err := Decode(Encode(e))
		if err != nil || again.Position != e.Position || !again.Bitmap.Equal(e.Bitmap) {
			t.Fatalf("came back as %v: %v", again, err)
		}
	})
}
