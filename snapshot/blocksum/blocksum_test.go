// SPDX-License-Identifier: BSD-2-Clause

package blocksum

import (
	"bytes"
	"testing"
)

func TestSumIsKeyedAndStable(t *testing.T) {
	block := bytes.Repeat([]byte{7}, 4096)
	var a, b Key
	for i := range a {
		a[i] = byte(i)
	}
	// Sums lie in repositories: they must never change.
	if got := a.Sum(block); got != 0xa8d93fed71ee7ead {
		t.Errorf("the sum became %#x", got)
	}
	if a.Sum(block) == b.Sum(block) {
		t.Error("two keys give the same sum")
	}
	if a.Sum(block) == a.Sum(block[:512]) {
		t.Error("a short block has the sum of a whole one")
	}
}

func TestSumIsPublishedHighwayHash(t *testing.T) {
	// The authors' test vectors: key 00 01 … 1f, data 00 01 … of each length.
	var k Key
	for i := range k {
		k[i] = byte(i)
	}
	for length, want := range map[int]uint64{0: 0x907A56DE22C26E53, 1: 0x7EAB43AAC7CDDD78, 2: 0xB8D0569AB0B53D62} {
		data := []byte{0, 1, 2}[:length]
		if got := k.Sum(data); got != want {
			t.Errorf("%d bytes: %#x, want %#x", length, got, want)
		}
	}
}

func TestIsZeroFindsEverySingleBit(t *testing.T) {
	for _, n := range []int{0, 1, 63, 64, 65, 512, 4096} {
		b := make([]byte, n)
		if !IsZero(b) {
			t.Errorf("%d zeros are none", n)
		}
		for i := range b {
			b[i] = 0x80
			if IsZero(b) {
				t.Errorf("byte %d of %d went unseen", i, n)
			}
			b[i] = 0
		}
	}
}

func TestListHoldsWhatWasAppended(t *testing.T) {
	var l List
	for i := range uint64(5) {
		l = l.Append(i << 60)
	}
	if l.At(3) != 3<<60 || l.Validate(5) != nil || l.Validate(4) == nil {
		t.Errorf("%v", l)
	}
}
