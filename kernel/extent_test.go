// SPDX-License-Identifier: BSD-2-Clause

package kernel

import (
	"math"
	"slices"
	"testing"
)

func TestExtentValidate(t *testing.T) {
	for name, c := range map[string]struct {
		e  Extent
		ok bool
	}{
		"OK":             {Extent{0, 100}, true},
		"UpToTheEnd":     {Extent{99, 1}, true},
		"Empty":          {Extent{10, 0}, false},
		"Negative":       {Extent{10, -1}, false},
		"BeforeTheStart": {Extent{-1, 5}, false},
		"OverTheEnd":     {Extent{99, 2}, false},
		"Behind":         {Extent{101, 1}, false},
		"Overflow":       {Extent{50, math.MaxInt64}, false},
	} {
		if err := c.e.Validate(100); (err == nil) != c.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestAlign(t *testing.T) {
	const size = 10*BlockSize + 5
	for name, c := range map[string]struct{ in, want []Extent }{
		"None":       {nil, nil},
		"Widened":    {[]Extent{{5000, 1}}, []Extent{{4096, 4096}}},
		"Empty":      {[]Extent{{5000, 0}, {4096, -3}}, nil},
		"Joined":     {[]Extent{{8192, 10}, {100, 5000}}, []Extent{{0, 12288}}},
		"Inside":     {[]Extent{{0, 40000}, {8192, 1}}, []Extent{{0, 40960}}},
		"Apart":      {[]Extent{{20480, 1}, {0, 1}}, []Extent{{0, 4096}, {20480, 4096}}},
		"ShortLast":  {[]Extent{{40962, 1}}, []Extent{{40960, 5}}},
		"CutAtEnd":   {[]Extent{{36864, 1 << 40}}, []Extent{{36864, 4101}}},
		"Overflow":   {[]Extent{{36864, math.MaxInt64}}, []Extent{{36864, 4101}}},
		"Behind":     {[]Extent{{size, 1}, {1 << 50, 7}}, nil},
		"Everything": {[]Extent{{0, size}}, []Extent{{0, size}}},
	} {
		got := Align(slices.Clone(c.in), size)
		if !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
		if again := Align(slices.Clone(got), size); !slices.Equal(again, got) {
			t.Errorf("%s: aligned again to %v", name, again)
		}
	}
}

func TestTotalLength(t *testing.T) {
	if n := TotalLength([]Extent{{0, 5}, {10, 7}}); n != 12 {
		t.Fatalf("got %d", n)
	}
}
