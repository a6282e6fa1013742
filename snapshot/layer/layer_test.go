// SPDX-License-Identifier: BSD-2-Clause

package layer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"maps"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/repo/backend/local"
	"github.com/dsync-backup/dsync-backup/snapshot/blocksum"
	"github.com/dsync-backup/dsync-backup/snapshot/device"
)

// image is a device in memory.
type image struct {
	data []byte
}

func (m *image) ReadExtents(_ context.Context, reads []device.Read, _ int) error {
	for _, r := range reads {
		if r.Offset < 0 || r.Offset+int64(len(r.Into)) > int64(len(m.data)) {
			return fmt.Errorf("read %d bytes at %d: outside of the device", len(r.Into), r.Offset)
		}
		copy(r.Into, m.data[r.Offset:])
	}
	return nil
}

func (m *image) Buffer(n int) []byte { return make([]byte, n) }

// store joins what layers are read from and written to.
type store struct{ *repo.Repository }

func (s store) LoadMeta(ctx context.Context, id repo.ID) ([]byte, error) {
	return s.LoadBlob(ctx, repo.BlobHandle{Type: repo.DataBlob, ID: id}, repo.KindMeta)
}

func newStore(t testing.TB) store {
	t.Helper()
	be, err := local.Open(t.TempDir(), local.Options{})
	if err != nil {
		t.Fatal(err)
	}
	r, err := repo.Init(t.Context(), be, "geheim", repo.Options{KDF: repo.KDFParams{N: 1024, R: 8, P: 1}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return store{r}
}

func seed(t testing.TB) *rand.Rand {
	s := uint64(time.Now().UnixNano())
	if v := os.Getenv("SEED"); v != "" {
		s, _ = strconv.ParseUint(v, 10, 64)
	}
	t.Logf("SEED=%d", s)
	return rand.New(rand.NewPCG(s, 1))
}

// scribble changes the image as a file system would: scattered blocks, long
// runs, zeros, copies, and returns what it touched.
func scribble(rnd *rand.Rand, b []byte, times int) []kernel.Extent {
	var out []kernel.Extent
	for range times {
		length := int64(rnd.IntN(3)+1) * kernel.BlockSize
		if rnd.IntN(6) == 0 {
			length = rnd.Int64N(3<<20) + 1
		}
		off := rnd.Int64N(int64(len(b)))
		if rnd.IntN(2) == 0 {
			off = off / kernel.BlockSize * kernel.BlockSize
		}
		length = min(length, int64(len(b))-off)
		p := b[off : off+length]
		switch rnd.IntN(4) {
		case 0:
			clear(p)
		case 1:
			src := rnd.Int64N(int64(len(b)) - length + 1)
			copy(p, bytes.Clone(b[src:src+length]))
		default:
			for i := range p {
				p[i] = byte(rnd.Uint64()) & 0x3f
			}
		}
		out = append(out, kernel.Extent{Offset: off, Length: length})
	}
	return kernel.Align(out, int64(len(b)))
}

func ranges(extents []kernel.Extent) iter.Seq[Range] {
	return func(yield func(Range) bool) {
		for _, e := range extents {
			if !yield(Range{Extent: e}) {
				return
			}
		}
	}
}

// write stores a layer and adds it to the tree of layers.
func write(t testing.TB, s store, tree *repo.Tree, o Options) Result {
	t.Helper()
	o.Polynomial, o.Time = s.ChunkerPolynomial(), time.Unix(1, 0)
	w := s.NewWriter(t.Context(), repo.WriterOptions{})
	res, err := Write(t.Context(), w, o)
	if err != nil {
		t.Fatal(err)
	}
	if res.Tree != nil {
		name, err := NextName(tree)
		if err != nil {
			t.Fatal(err)
		}
		tree.Nodes = append(tree.Nodes, DirNode(name, *res.Tree, o.Time))
	}
	if err := w.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	return res
}

func open(t testing.TB, s store, tree *repo.Tree) []*Layer {
	t.Helper()
	w := s.NewWriter(t.Context(), repo.WriterOptions{})
	saved, err := w.SaveTree(t.Context(), tree)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	layers, err := Open(t.Context(), s, saved.ID)
	if err != nil {
		t.Fatal(err)
	}
	return layers
}

// merged reads the device that the layers give, and checks every sum.
func merged(t testing.TB, s store, layers []*Layer, size int64, key *blocksum.Key) []byte {
	t.Helper()
	out := make([]byte, 0, size)
	m := NewMerger(s, layers, size)
	sums := NewSums(t.Context(), s, layers, size, size)
	for {
		p, err := m.Next(t.Context())
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if p.Missing || p.Offset != int64(len(out)) {
			t.Fatalf("piece %+v at %d", p, len(out))
		}
		if p.Zero {
			out = append(out, make([]byte, p.Length)...)
		}
		for off, left := p.Data, p.Length; left > 0 && !p.Zero; {
			i, in, n := p.Part.Data.Locate(off)
			b, err := s.LoadBlob(t.Context(), repo.BlobHandle{Type: repo.DataBlob, ID: p.Part.Data.Blobs[i]}, repo.KindData)
			if err != nil {
				t.Fatal(err)
			}
			n = min(n, left)
			out = append(out, b[in:in+n]...)
			off, left = off+n, left-n
		}
	}
	for off := int64(0); off < size; off += kernel.BlockSize {
		block := out[off:min(off+kernel.BlockSize, size)]
		zero, sum := blocksum.IsZero(block), key.Sum(block)
		if ok, err := sums.Same(off, zero, sum); !ok || err != nil {
			t.Fatalf("sum of block at %d: %v %v", off, ok, err)
		}
		block[0]++
		if ok, err := sums.Same(off, blocksum.IsZero(block), key.Sum(block)); ok || err != nil {
			t.Fatalf("sum of changed block at %d: %v %v", off, ok, err)
		}
		block[0]--
	}
	return out
}

func TestLayersGiveBackWhatWasWrittenAtEveryStep(t *testing.T) {
	rnd := seed(t)
	s := newStore(t)
	size := int64(24<<20 + rnd.IntN(9)*512)
	img := &image{data: make([]byte, size)}
	scribble(rnd, img.data, 60)
	key := &blocksum.Key{1, 2, 3}
	tree := &repo.Tree{}
	dirty := []kernel.Extent{{Length: size}}
	var images [][]byte
	var trees []repo.Tree
	for round := range 12 {
		// Small limits: several parts in a layer.
		o := Options{Source: img, Size: size, Ranges: ranges(dirty), Key: key, maxBlobs: 1 + rnd.IntN(8), maxExtents: 1 + rnd.IntN(200)}
		res := write(t, s, tree, o)
		if want := kernel.TotalLength(dirty); res.DirtyBytes != want || res.BytesRead != want {
			t.Fatalf("round %d: dirty %d, read %d, want %d", round, res.DirtyBytes, res.BytesRead, want)
		}
		images = append(images, bytes.Clone(img.data))
		trees = append(trees, repo.Tree{Nodes: slices.Clone(tree.Nodes)})
		dirty = scribble(rnd, img.data, rnd.IntN(40))
	}
	for i := range trees {
		if got := merged(t, s, open(t, s, &trees[i]), size, key); !bytes.Equal(got, images[i]) {
			t.Fatalf("snapshot %d differs from %d on", i, firstDifference(got, images[i]))
		}
	}
}

func firstDifference(a, b []byte) int {
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return -1
}

func TestHolesAreNotReadAndGiveZeros(t *testing.T) {
	s := newStore(t)
	const size = 4 << 40
	img := &sparse{}
	key := &blocksum.Key{}
	tree := &repo.Tree{}
	list := []Range{
		{kernel.Extent{Length: 1 << 30}, true},
		{kernel.Extent{Offset: 1 << 30, Length: 8192}, false},
		{kernel.Extent{Offset: 1<<30 + 8192, Length: size - 1<<30 - 8192}, true},
	}
	res := write(t, s, tree, Options{Source: img, Size: size, Ranges: slices.Values(list), Key: key})
	if res.BytesRead != 8192 || res.DirtyBytes != size {
		t.Fatalf("%+v", res)
	}
	m := NewMerger(s, open(t, s, tree), size)
	var got []Piece
	for {
		p, err := m.Next(t.Context())
		if errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		got = append(got, p)
	}
	if len(got) != 3 || !got[0].Zero || got[1].Zero || got[1].Length != 8192 || !got[2].Zero || got[2].End() != size {
		t.Fatalf("%+v", got)
	}
}

// sparse has ones everywhere.
type sparse struct{}

func (sparse) Buffer(n int) []byte { return make([]byte, n) }
func (sparse) ReadExtents(_ context.Context, reads []device.Read, _ int) error {
	for _, r := range reads {
		for i := range r.Into {
			r.Into[i] = 1
		}
	}
	return nil
}

func TestCompareScanStoresExactlyWhatDiffers(t *testing.T) {
	rnd := seed(t)
	s := newStore(t)
	for _, grown := range []int64{0, 512, 4096, 1 << 20, -512, -1 << 20} {
		t.Run(fmt.Sprintf("Grown%d", grown), func(t *testing.T) {
			size := int64(8<<20 + 512)
			img := &image{data: make([]byte, size)}
			scribble(rnd, img.data, 40)
			clear(img.data[size-8192:])
			key := &blocksum.Key{9}
			tree := &repo.Tree{}
			write(t, s, tree, Options{Source: img, Size: size, Ranges: ranges([]kernel.Extent{{Length: size}}), Key: key})
			for range 3 {
				write(t, s, tree, Options{Source: img, Size: size, Ranges: ranges(scribble(rnd, img.data, 10)), Key: key})
			}
			now := size + grown
			next := &image{data: make([]byte, now)}
			copy(next.data, img.data)
			scribble(rnd, next.data, 5)
			var want int64
			for off := int64(0); off < now; off += kernel.BlockSize {
				if end := min(off+kernel.BlockSize, now); end != min(off+kernel.BlockSize, size) || !bytes.Equal(next.data[off:end], img.data[off:end]) {
					want += end - off
				}
			}
			layers := open(t, s, tree)
			all := slices.Values([]Range{{Extent: kernel.Extent{Length: now}}})
			res := write(t, s, tree, Options{Source: next, Size: now, Ranges: all, Key: key, Expected: NewSums(t.Context(), s, layers, size, now)})
			if res.DirtyBytes != want || res.BytesRead != now {
				t.Errorf("dirty %d, want %d; read %d", res.DirtyBytes, want, res.BytesRead)
			}
			if got := merged(t, s, open(t, s, tree), now, key); !bytes.Equal(got, next.data) {
				t.Errorf("differs from %d on", firstDifference(got, next.data))
			}
		})
	}
}

// busy is an image that notes how many reads were in flight at most.
type busy struct {
	*image
	mu        sync.Mutex
	now, most int
}

func (b *busy) add(n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.now += n
	b.most = max(b.most, b.now)
}

func (b *busy) ReadExtents(ctx context.Context, reads []device.Read, most int) error {
	most = min(most, len(reads))
	b.add(most)
	defer b.add(-most)
	runtime.Gosched()
	return b.image.ReadExtents(ctx, reads, most)
}

// TestNoMoreReadsAreInFlightThanAsked, and about as many as asked.
func TestNoMoreReadsAreInFlightThanAsked(t *testing.T) {
	rnd := seed(t)
	const size = 64 << 20
	key := &blocksum.Key{1}
	for _, parallel := range []int{1, 2, 3, 16, 64} {
		s := newStore(t)
		img := &busy{image: &image{data: make([]byte, size)}}
		var scattered []kernel.Extent
		for off := int64(0); off < size; off += (2 + rnd.Int64N(4)) * kernel.BlockSize {
			scattered = append(scattered, kernel.Extent{Offset: off, Length: kernel.BlockSize})
		}
		write(t, s, &repo.Tree{}, Options{Source: img, Size: size, Ranges: ranges(scattered), Key: key, Parallel: parallel})
		if img.most > parallel || img.most < parallel/2 {
			t.Errorf("%d reads in flight, asked for were %d", img.most, parallel)
		}
	}
}

// TestReadErrorEndsTheLayer, and the reading: of a disk that fails, no more is asked for than
// was under way.
func TestReadErrorEndsTheLayer(t *testing.T) {
	const size = 256 << 20
	s := newStore(t)
	bad := &failing{err: errors.New("boom")}
	w := s.NewWriter(t.Context(), repo.WriterOptions{})
	_, err := Write(t.Context(), w, Options{
		Source: bad, Size: size, Key: &blocksum.Key{}, Polynomial: s.ChunkerPolynomial(),
		Ranges: ranges([]kernel.Extent{{Length: size}}),
	})
	if !errors.Is(err, bad.err) {
		t.Fatal(err)
	}
	if n, most := bad.pieces.Load(), int64(10<<20/pieceBytes+4*maxReaders); n > most {
		t.Errorf("%d of %d pieces were asked for, of which at most %d were under way", n, size/pieceBytes, most)
	}
}

// failing is a device that can be read up to 10 MiB.
type failing struct {
	err    error
	pieces atomic.Int64 // asked for
}

func (*failing) Buffer(n int) []byte { return make([]byte, n) }

func (f *failing) ReadExtents(_ context.Context, reads []device.Read, _ int) error {
	f.pieces.Add(1)
	for _, r := range reads {
		if r.Offset > 10<<20 {
			return f.err
		}
		for i := range r.Into {
			r.Into[i] = byte(r.Offset>>12) + byte(i)
		}
	}
	return nil
}

// TestBlocksShareBlobsWithOthersOfTheirAge writes scattered blocks of which some were
// written lately, and some of these twice.
func TestBlocksShareBlobsWithOthersOfTheirAge(t *testing.T) {
	rnd := seed(t)
	s := newStore(t)
	const size = 64 << 20
	img := &image{data: make([]byte, size)}
	key := &blocksum.Key{7}
	dirtied := func(n, step int64) (out []kernel.Extent) {
		for i := int64(0); i < n; i++ {
			e := kernel.Extent{Offset: i * step * kernel.BlockSize, Length: kernel.BlockSize}
			for j := range img.data[e.Offset:e.End()] {
				img.data[e.Offset+int64(j)] = byte(rnd.Uint32())
			}
			out = append(out, e)
		}
		return out
	}
	tree := &repo.Tree{}
	write(t, s, tree, Options{Source: img, Size: size, Ranges: ranges([]kernel.Extent{{Length: size}}), Key: key})
	write(t, s, tree, Options{Source: img, Size: size, Ranges: ranges(dirtied(2000, 8)), Key: key})
	write(t, s, tree, Options{Source: img, Size: size, Ranges: ranges(dirtied(1000, 16)), Key: key})
	for _, c := range []struct {
		blocks int64
		older  bool
		want   map[Age]int // blobs
	}{
		{4000, true, map[Age]int{Settled: 8, Older: 4, Newer: 4}},
		{4000, false, map[Age]int{Settled: 8, Newer: 8}},
	} {
		lately := NewAges(s, open(t, s, tree)[1:3], c.older, size)
		write(t, s, tree, Options{Source: img, Size: size, Ranges: ranges(dirtied(c.blocks, 4)), Key: key, Ages: lately})
		layers := open(t, s, tree)
		if got := merged(t, s, layers, size, key); !bytes.Equal(got, img.data) {
			t.Fatalf("the layers differ from the device from %d on", firstDifference(got, img.data))
		}
		p, err := openPart(t.Context(), s, layers[len(layers)-1].parts[0])
		if err != nil {
			t.Fatal(err)
		}
		mixed := make([]map[Age]int, len(p.Data.Blobs))
		blobs := map[Age]int{}
		for _, e := range p.Index.Extents {
			for n := int64(0); n < e.Length; n += kernel.BlockSize {
				age := Settled
				switch block := (e.Offset + n) / kernel.BlockSize; {
				case block%16 == 0:
					age = Newer
				case block%8 == 0 && c.older:
					age = Older
				case block%8 == 0:
					age = Newer
				}
				blob, _, _ := p.Data.Locate(e.Data + n)
				if mixed[blob] == nil {
					mixed[blob] = map[Age]int{}
					blobs[age]++
				}
				mixed[blob][age]++
			}
		}
		for i, m := range mixed {
			if len(m) != 1 {
				t.Errorf("blob %d has blocks of several ages: %v", i, m)
			}
		}
		if !maps.Equal(blobs, c.want) {
			t.Errorf("%d blocks are in blobs of each age: %v instead of %v", c.blocks, blobs, c.want)
		}
	}
}
