// SPDX-License-Identifier: BSD-2-Clause

package repo

import (
	"bytes"
	"sync"
	"testing"

	"github.com/klauspost/compress/zstd"
)

type newEncoderFunc = func(level) (encoder, error)

// eachEncoder runs a test with the encoder that is used, and with Go's if that is another.
func eachEncoder(t *testing.T, test func(*testing.T, newEncoderFunc)) {
	t.Run("Used", func(t *testing.T) { test(t, newEncoder) })
	t.Run("Go", func(t *testing.T) { test(t, newGoEncoder) })
}

// TestFramesAreReadAgain at each level, of contents from nothing to 9 MiB, behind what dst has
// already, with and without room for them, by many at once.
func TestFramesAreReadAgain(t *testing.T) {
	kinds := contentKinds(t)
	dec, err := zstd.NewReader(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer dec.Close()
	eachEncoder(t, func(t *testing.T, encoder newEncoderFunc) {
		for l := range levels {
			enc, err := encoder(l)
			if err != nil {
				t.Fatal(err)
			}
			sizes := []int{0, 1, 7, 4096, 100_000, 1 << 20, 3<<20 + 11}
			if l < levelBetter {
				sizes = append(sizes, 9<<20)
			}
			var wg sync.WaitGroup
			for name, data := range kinds {
				wg.Go(func() {
					for i, size := range sizes {
						plain := data[:min(size, len(data))]
						dst := []byte("before")
						if i%2 == 0 {
							dst = append(make([]byte, 0, 2*size+1000), dst...)
						}
						got := enc.encode(plain, dst)
						if !bytes.HasPrefix(got, []byte("before")) {
							t.Errorf("level %d, %d bytes of %s: what was there is gone", l, size, name)
							continue
						}
						var h zstd.Header
						if err := h.Decode(got[6:]); err != nil || size > 100 && (!h.HasFCS || h.FrameContentSize != uint64(len(plain))) || h.HasCheckSum || h.WindowSize > 4<<20 {
							t.Errorf("level %d, %d bytes of %s: %v, header %+v", l, size, name, err, h)
						}
						if again, err := dec.DecodeAll(got[6:], nil); err != nil || !bytes.Equal(again, plain) {
							t.Errorf("level %d, %d bytes of %s are not read again: %v", l, size, name, err)
						}
					}
				})
			}
			wg.Wait()
		}
	})
}

// TestTheEncodersAgree: at the default level, the encoder that is used makes frames no larger
// than Go's by a percent, so that a repository is no larger than restic would make it.
func TestTheEncodersAgree(t *testing.T) {
	used, err := newEncoder(levelDefault)
	if err != nil {
		t.Fatal(err)
	}
	other, err := newGoEncoder(levelDefault)
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range contentKinds(t) {
		got, want := 0, 0
		for i := 0; i < len(data); i += 1 << 20 {
			plain := data[i:min(len(data), i+1<<20)]
			got += len(used.encode(plain, nil))
			want += len(other.encode(plain, nil))
		}
		t.Logf("%s: %d, in Go %d", name, got, want)
		if float64(got) > 1.01*float64(want) {
			t.Errorf("%s: %d bytes instead of %d", name, got, want)
		}
	}
}

// BenchmarkEncoders compares the encoder that is used with Go's, on one core.
func BenchmarkEncoders(b *testing.B) {
	for name, data := range contentKinds(b) {
		for l, speed := range []string{"fastest", "default", "better", "best"} {
			for who, encoder := range map[string]newEncoderFunc{"used": newEncoder, "Go": newGoEncoder} {
				b.Run(name+"/"+speed+"/"+who, func(b *testing.B) {
					enc, err := encoder(level(l))
					if err != nil {
						b.Fatal(err)
					}
					b.SetBytes(1 << 20)
					var frame []byte
					for i := 0; b.Loop(); i++ {
						frame = enc.encode(data[i<<20%len(data):][:1<<20], frame[:0])
					}
					b.ReportMetric(float64(1<<20)/float64(len(frame)), "ratio")
				})
			}
		}
	}
}
