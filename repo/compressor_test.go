// SPDX-License-Identifier: BSD-2-Clause

package repo

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"os"
	"testing"

	"github.com/klauspost/compress/zstd"
)

// kinds of content: random bytes, words in random bytes, sorted numbers, and
// this program itself.
func contentKinds(t testing.TB) map[string][]byte {
	t.Helper()
	const size = 6 << 20
	r := rand.New(rand.NewPCG(4, 2))
	random := make([]byte, size)
	for i := 0; i < size; i += 8 {
		binary.LittleEndian.PutUint64(random[i:], r.Uint64())
	}
	words := bytes.Clone(random)
	for i := 0; i+64 <= size; i += 64 {
		copy(words[i:], random[r.IntN(24)*36:][:36])
	}
	numbers := make([]byte, size)
	for i, n := 0, uint64(0); i < size; i += 8 {
		n += r.Uint64N(1000)
		binary.LittleEndian.PutUint64(numbers[i:], n)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	program, err := os.ReadFile(self)
	program = bytes.Repeat(program, size/max(1, len(program))+1)
	if err != nil {
		t.Fatal(err)
	}
	mixed := make([]byte, 0, 4*size)
	for i := 0; i < size; i += 1 << 20 {
		for _, k := range [][]byte{random, words, numbers, program[:min(size, len(program)>>20<<20)]} {
			if i < len(k) {
				mixed = append(mixed, k[i:min(len(k), i+1<<20)]...)
			}
		}
	}
	return map[string][]byte{"random": random, "words": words, "numbers": numbers, "program": program[:size], "mixed": mixed}
}

// TestLittleDataIsAsSmallAsTheDefaultLevel, also right after much that nothing was found in: the
// fastest level finds nothing in 88 KiB of words either, and the default level a third.
func TestLittleDataIsAsSmallAsTheDefaultLevel(t *testing.T) {
	eachEncoder(t, littleDataIsAsSmall)
}

func littleDataIsAsSmall(t *testing.T, encoder newEncoderFunc) {
	kinds := contentKinds(t)
	c, err := newCompressorOf(CompressionAuto, encoder)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 40 {
		_, _ = c.blob(kinds["random"][i<<17:][:1<<20], nil, nil)
		for name, data := range kinds {
			plain := data[i<<17:][:(8+16*(i%8))<<10]
			frame, _ := c.blob(plain, nil, nil)
			if want := len(c.enc.encode(plain, nil)); float64(len(frame)) > 1.01*float64(want) {
				t.Errorf("%d bytes of %s take %d, at the default level %d", len(plain), name, len(frame), want)
			}
		}
	}
}

// What restic's default level would store is what CompressionAuto may exceed
// by a percent at most, whatever the data and however they alternate.
func TestAutoIsAsSmallAsTheDefaultLevel(t *testing.T) { eachEncoder(t, autoIsAsSmall) }

func autoIsAsSmall(t *testing.T, encoder newEncoderFunc) {
	for name, data := range contentKinds(t) {
		t.Run(name, func(t *testing.T) {
			c, err := newCompressorOf(CompressionAuto, encoder)
			if err != nil {
				t.Fatal(err)
			}
			dec, err := zstd.NewReader(nil)
			if err != nil {
				t.Fatal(err)
			}
			defer dec.Close()
			var a, b []byte
			got, want := 0, 0
			for i := 0; i < len(data); i += 1 << 20 {
				plain := data[i:min(len(data), i+1<<20)]
				a, b = c.blob(plain, a, b)
				got += len(a)
				want += len(c.enc.encode(plain, nil))
				if again, err := dec.DecodeAll(a, nil); err != nil || !bytes.Equal(again, plain) {
					t.Fatalf("blob at %d does not decode: %v", i, err)
				}
			}
			t.Logf("%d bytes: %d, the default level %d", len(data), got, want)
			if float64(got) > 1.01*float64(want) {
				t.Errorf("%d bytes, the default level makes %d", got, want)
			}
		})
	}
}

func TestAutoUsesTheFastestLevelWhereThatLosesNothing(t *testing.T) {
	eachEncoder(t, autoUsesTheFastest)
}

func autoUsesTheFastest(t *testing.T, encoder newEncoderFunc) {
	c, err := newCompressorOf(CompressionAuto, encoder)
	if err != nil {
		t.Fatal(err)
	}
	data := contentKinds(t)["words"]
	var a, b []byte
	fast := 0
	for i := range 4 * len(data) >> 20 {
		plain := data[i<<20%len(data):][:1<<20]
		a, b = c.blob(plain, a, b)
		if bytes.Equal(a, c.fast.encode(plain, nil)) {
			fast++
		}
	}
	if all := 4 * len(data) >> 20; fast < all-1 {
		t.Errorf("%d of %d blobs", fast, all)
	}
	if !c.prefer || c.period < 8 {
		t.Errorf("what was found again and again is not trusted: %d", c.period)
	}
}

func TestOtherModesUseTheirLevelAlone(t *testing.T) { eachEncoder(t, otherModes) }

func otherModes(t *testing.T, encoder newEncoderFunc) {
	data := contentKinds(t)["program"][:1<<20]
	sizes := map[Compression]int{}
	for _, mode := range []Compression{CompressionFastest, CompressionBetter, CompressionMax} {
		c, err := newCompressorOf(mode, encoder)
		if err != nil {
			t.Fatal(err)
		}
		if c.fast != nil {
			t.Errorf("%s looks for a cheaper way", mode)
		}
		frame, _ := c.blob(data, nil, nil)
		sizes[mode] = len(frame)
	}
	if sizes[CompressionMax] > sizes[CompressionFastest] {
		t.Errorf("%v", sizes)
	}
}

// TestOneTrialProvesNothing: a blob in which the default level misses what there is leaves
// 0.548 by both levels, and those after it 0.529 by the fastest and 0.496 by the default.
func TestOneTrialProvesNothing(t *testing.T) {
	c := &compressor{}
	c.learn(true, 0.548)
	if try, _, _ := c.next(); !try {
		t.Error("the next blob is not tried after one that the fastest level did well on")
	}
	c.learn(false, 0.529)
	if _, prefer, _ := c.next(); prefer {
		t.Error("the fastest level is preferred after one of two")
	}
	c.trust = 0
	c.learn(true, 0.3)
	c.learn(true, 0.9)
	if try, _, _ := c.next(); !try {
		t.Error("two blobs that have nothing in common are proof")
	}
	c.learn(true, 0.9)
	if try, prefer, share := c.next(); try || !prefer || share != 0.9 {
		t.Errorf("after two that agree: try %v, prefer %v, share %v", try, prefer, share)
	}
}
