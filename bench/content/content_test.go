// SPDX-License-Identifier: BSD-2-Clause

package content

import (
	"bytes"
	"slices"
	"testing"

	"github.com/klauspost/compress/zstd"
)

// The report's figures speak of 2:1 data.
func TestContentCompressesAsTheReportSays(t *testing.T) {
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		compressible bool
		size         int
		low, high    float64
	}{{true, 1 << 20, 1.9, 2.2}, {true, BlockSize, 1.25, 1.6}, {false, 1 << 20, 0.99, 1.01}} {
		b := make([]byte, c.size)
		New(3, c.compressible).Fill(b)
		ratio := float64(len(b)) / float64(len(enc.EncodeAll(b, nil)))
		if ratio < c.low || ratio > c.high {
			t.Errorf("%d bytes, compressible %v: %.2f:1, want %.2f to %.2f", c.size, c.compressible, ratio, c.low, c.high)
		}
	}
}

func TestSameSeedSameContentAnotherSeedAnother(t *testing.T) {
	a, b, c := make([]byte, BlockSize), make([]byte, BlockSize), make([]byte, BlockSize)
	New(1, true).Fill(a)
	New(1, true).Fill(b)
	New(2, true).Fill(c)
	if !bytes.Equal(a, b) || bytes.Equal(a, c) {
		t.Error("the seed does not decide")
	}
}

func TestBlocksArePickedOnceEachAndSorted(t *testing.T) {
	m := New(7, true)
	for _, n := range []int64{0, 1, 10, 100, 900, 1000, 2000} {
		got := m.Random(1000, n)
		want := min(n, 1000)
		if int64(len(got)) != want || !slices.IsSorted(got) || len(slices.Compact(slices.Clone(got))) != len(got) {
			t.Errorf("random %d of 1000: %d blocks", n, len(got))
		}
		seq := m.Sequential(1000, n)
		if int64(len(seq)) != want || want > 0 && seq[want-1]-seq[0] != want-1 || want > 0 && seq[want-1] >= 1000 {
			t.Errorf("sequential %d of 1000: %v", n, seq)
		}
	}
}
