// SPDX-License-Identifier: BSD-2-Clause

package blockindex

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"flag"
	"hash/crc32"
	"os"
	"reflect"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the golden file anew")

func sample() *Index {
	return &Index{
		Start: 1 << 20, End: 1<<30 + 512, DataLength: 3 << 20,
		Extents: []Extent{
			{Offset: 1 << 20, Length: 4096, Data: 0},
			{Offset: 2 << 20, Length: 1 << 20, Zero: true},
			{Offset: 3 << 20, Length: 8192, Data: 1 << 20},
			{Offset: 3<<20 + 8192, Length: 4096, Data: 4096},
			{Offset: 1 << 30, Length: 512, Data: 2 << 20},
		},
	}
}

func TestGoldenFileStaysReadable(t *testing.T) {
	const name = "testdata/v1.hex"
	if *update {
		if err := os.WriteFile(name, []byte(hex.Dump(sample().Encode())), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if got := hex.Dump(sample().Encode()); got != string(want) {
		t.Errorf("the format changed:\n%s\nwant:\n%s", got, want)
	}
	got, err := Decode(sample().Encode())
	if err != nil || !reflect.DeepEqual(got, sample()) {
		t.Errorf("decoded %+v, %v", got, err)
	}
}

func TestEveryFlippedBitAndEveryTruncationIsFound(t *testing.T) {
	good := sample().Encode()
	for i := range good {
		for bit := range 8 {
			bad := bytes.Clone(good)
			bad[i] ^= 1 << bit
			if _, err := Decode(bad); !errors.Is(err, ErrDamaged) {
				t.Fatalf("bit %d of byte %d flipped: %v", bit, i, err)
			}
		}
		if _, err := Decode(good[:i]); !errors.Is(err, ErrDamaged) {
			t.Fatalf("cut to %d bytes: %v", i, err)
		}
	}
}

// reseal gives bytes a valid checksum, so that what lies behind it is tested.
func reseal(b []byte) []byte {
	body := b[:len(b)-crcSize]
	return binary.LittleEndian.AppendUint32(bytes.Clone(body), crc32.Checksum(body, castagnoli))
}

func TestWildCountDoesNotAllocate(t *testing.T) {
	b := sample().Encode()
	binary.LittleEndian.PutUint64(b[32:], 1<<60)
	if _, err := Decode(reseal(b)); err == nil || !strings.Contains(err.Error(), "cannot fit") {
		t.Fatal(err)
	}
}

func TestNewerVersionSaysSo(t *testing.T) {
	b := sample().Encode()
	b[4] = 9
	if _, err := Decode(reseal(b)); err == nil || !strings.Contains(err.Error(), "newer") {
		t.Fatal(err)
	}
}

func TestAppendJoinsOnlyWhatIsOne(t *testing.T) {
	x := &Index{End: 1 << 20, DataLength: 1 << 20}
	x.Append(Extent{Offset: 0, Length: 4096, Data: 0})
	x.Append(Extent{Offset: 4096, Length: 4096, Data: 4096})  // joins
	x.Append(Extent{Offset: 8192, Length: 4096, Data: 16384}) // other data
	x.Append(Extent{Offset: 12288, Length: 4096, Zero: true}) // zeros
	x.Append(Extent{Offset: 16384, Length: 4096, Zero: true}) // joins
	x.Append(Extent{Offset: 24576, Length: 4096, Zero: true}) // a gap
	if len(x.Extents) != 4 || x.DataBlocks() != 3 || x.Validate() != nil {
		t.Fatalf("%+v", x.Extents)
	}
}

func TestValidateRefuses(t *testing.T) {
	for name, change := range map[string]func(*Index){
		"overlap":            func(x *Index) { x.Extents[1].Offset = 1 << 20 },
		"behind the end":     func(x *Index) { x.Extents[4].Length = 4096 },
		"data out of range":  func(x *Index) { x.Extents[0].Data = 3 << 20 },
		"negative data":      func(x *Index) { x.Extents[0].Data = -1 },
		"zeros with data":    func(x *Index) { x.Extents[1].Data = 1 },
		"short in the midst": func(x *Index) { x.Extents[0].Length = 100 },
		"unaligned":          func(x *Index) { x.Extents[0].Offset++ },
		"start behind end":   func(x *Index) { x.Start = 2 << 30 },
	} {
		x := sample()
		change(x)
		if err := x.Validate(); !errors.Is(err, ErrDamaged) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(sample().Encode())
	f.Add((&Index{End: 4096}).Encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > headerSize+crcSize {
			b = reseal(b)
		}
		x, err := Decode(b)
		if err != nil {
			if !errors.Is(err, ErrDamaged) {
				t.Fatal(err)
			}
			return
		}
		if err := x.Validate(); err != nil {
			t.Fatal(err)
		}
		y, err := Decode(x.Encode())
		if err != nil || !reflect.DeepEqual(x, y) {
			t.Fatalf("%+v became %+v, %v", x, y, err)
		}
	})
}
