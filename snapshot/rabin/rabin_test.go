// SPDX-License-Identifier: BSD-2-Clause

package rabin

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/restic/chunker"
)

func newRand(t testing.TB) *rand.Rand {
	t.Helper()
	s := uint64(time.Now().UnixNano())
	t.Logf("seed %d", s)
	return rand.New(rand.NewPCG(s, 0))
}

// someData are random bytes, with stretches of zeros and of what came before.
func someData(r *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := 0; i < n; {
		m := min(n-i, 1+r.IntN(200_000))
		switch r.IntN(6) {
		case 0: // zeros
			if r.IntN(4) == 0 {
				m = min(n-i, m*50)
			}
		case 1:
			if i > m {
				copy(b[i:i+m], b[r.IntN(i-m):])
			}
		case 2:
			v := byte(r.Uint32())
			for k := range m {
				b[i+k] = v
			}
		default:
			for k := range m {
				b[i+k] = byte(r.Uint32())
			}
		}
		i += m
	}
	return b
}

// cuts feeds data in pieces, and returns where the chunks end.
func cuts(r *rand.Rand, data []byte, next func([]byte) int) (ends []int) {
	for p := 0; p < len(data); {
		n := 1 << 19
		switch r.IntN(3) {
		case 0:
			n = 1 + r.IntN(1<<19)
		case 1:
			n = 1 + r.IntN(1000)
		}
		b := data[p:min(len(data), p+n)]
		for len(b) > 0 {
			n := next(b)
			if n < 0 {
				p += len(b)
				break
			}
			p, b = p+n, b[n:]
			ends = append(ends, p)
		}
	}
	return ends
}

// The ends of chunks are those that restic's chunker finds, whatever the polynomial, the content,
// and the pieces in which it comes.
func TestChunksEndWhereThoseOfResticDo(t *testing.T) {
	r := newRand(t)
	total := 0
	for range 12 {
		pol, err := chunker.DerivePolynomial(&source{r})
		if err != nil {
			t.Fatal(err)
		}
		data := someData(r, 24<<20+r.IntN(1000))
		base, c := chunker.NewBase(pol), New(pol)
		want, got := cuts(r, data, base.NextSplitPoint), cuts(r, data, c.Next)
		for i := range max(len(want), len(got)) {
			if i >= len(want) || i >= len(got) || want[i] != got[i] {
				t.Fatalf("polynomial %v: chunk %d of %d and %d ends elsewhere:\n%v\n%v", pol, i, len(want), len(got), want, got)
			}
		}
		total += len(want)
	}
	if total < 100 {
		t.Errorf("only %d chunks were compared", total)
	}
}

type source struct{ r *rand.Rand }

func (s *source) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = byte(s.r.Uint32())
	}
	return len(p), nil
}

// A chunk that is begun anew forgets what came before.
func TestResetForgets(t *testing.T) {
	r := newRand(t)
	pol, err := chunker.RandomPolynomial()
	if err != nil {
		t.Fatal(err)
	}
	data := someData(r, 16<<20)
	base, c := chunker.NewBase(pol), New(pol)
	for range 50 {
		skip := r.IntN(3 << 20)
		c.Next(data[:skip])
		c.Reset()
		base.Reset(pol)
		from := r.IntN(8 << 20)
		if want, got := base.NextSplitPoint(data[from:]), c.Next(data[from:]); got != want {
			t.Fatalf("from %d: %d, want %d", from, got, want)
		}
		c.Reset()
	}
}

func BenchmarkChunk(b *testing.B) {
	pol, err := chunker.RandomPolynomial()
	if err != nil {
		b.Fatal(err)
	}
	data := make([]byte, 64<<20)
	r := rand.New(rand.NewPCG(1, 1))
	for i := range data {
		data[i] = byte(r.Uint32())
	}
	for name, next := range map[string]func([]byte) int{"restic": chunker.NewBase(pol).NextSplitPoint, "ours": New(pol).Next} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(data)))
			for range b.N {
				for d := data; len(d) > 0; {
					n := next(d[:min(len(d), 512<<10)])
					if n < 0 {
						n = min(len(d), 512<<10)
					}
					d = d[n:]
				}
			}
		})
	}
}
