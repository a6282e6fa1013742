// SPDX-License-Identifier: BSD-2-Clause

package layer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/snapshot/blocksum"
)

// mergeNodes merges the layers from to to-1 of a tree into one, which takes the
// name of the last.
func mergeNodes(t testing.TB, s store, tree *repo.Tree, from, to int, o MergeOptions) MergeResult {
	t.Helper()
	layers := open(t, s, tree)[from:to]
	w := s.NewWriter(t.Context(), repo.WriterOptions{})
	o.Time = time.Unix(2, 0)
	before := w.Stats().Data
	res, err := Merge(t.Context(), w, s, layers, o)
	if err != nil {
		t.Fatal(err)
	}
	if w.Stats().Data != before {
		t.Fatal("a merge stored data")
	}
	var with []*repo.Node
	if res.Tree != nil {
		with = append(with, DirNode(tree.Nodes[to-1].Name, *res.Tree, o.Time))
	}
	tree.Nodes = slices.Concat(tree.Nodes[:from], with, tree.Nodes[to:])
	if err := w.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	return res
}

// described is what a chain says of each block: "missing", "zero", or its
// content.
func described(t testing.TB, s store, layers []*Layer, size int64) []string {
	t.Helper()
	out := make([]string, 0, kernel.BlocksOf(size))
	blobs := map[repo.ID][]byte{}
	m := NewMerger(s, layers, size)
	for {
		p, err := m.Next(t.Context())
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		if p.Offset%kernel.BlockSize != 0 {
			t.Fatalf("a piece begins at %d, in the middle of a block", p.Offset)
		}
		for n := int64(0); n < p.Length; n += kernel.BlockSize {
			switch {
			case p.Missing:
				out = append(out, "missing")
			case p.Zero:
				out = append(out, "zero")
			default:
				out = append(out, string(content(t, s, blobs, &p.Part.Data, p.Data+n, min(kernel.BlockSize, p.Length-n))))
			}
		}
	}
}

func content(t testing.TB, s store, blobs map[repo.ID][]byte, f *File, off, n int64) (out []byte) {
	t.Helper()
	for n > 0 {
		i, in, left := f.Locate(off)
		id := f.Blobs[i]
		if blobs[id] == nil {
			b, err := s.LoadBlob(t.Context(), repo.BlobHandle{Type: repo.DataBlob, ID: id}, repo.KindData)
			if err != nil {
				t.Fatal(err)
			}
			blobs[id] = b
		}
		k := min(n, left)
		out = append(out, blobs[id][in:in+k]...)
		off, n = off+k, n-k
	}
	return out
}

// sound checks the parts of a merged layer: sorted, apart from each other,
// within the limits (one block may need a few blobs more), and no blob listed
// that no extent points at.
func sound(t testing.TB, s store, l *Layer, maxBlobs, maxExtents int, res MergeResult) {
	t.Helper()
	var pos, dirty, live, listed int64
	for i, ref := range l.parts {
		p, err := openPart(t.Context(), s, ref)
		if err != nil {
			t.Fatal(err)
		}
		x := p.Index
		if x.Start < pos || len(x.Extents) == 0 {
			t.Fatalf("part %d starts at %d, the one before ends at %d; %d extents", i, x.Start, pos, len(x.Extents))
		}
		pos = x.End
		if n := len(p.Data.Blobs); n > maxBlobs+8 {
			t.Fatalf("part %d has %d blobs, the limit is %d", i, n, maxBlobs)
		}
		if n := len(x.Extents); n > maxExtents+pieceExtents {
			t.Fatalf("part %d has %d extents, the limit is %d", i, n, maxExtents)
		}
		used := make([]bool, len(p.Data.Blobs))
		for _, e := range x.Extents {
			dirty += e.Length
			for n := int64(0); n < e.Length && !e.Zero; {
				blob, _, left := p.Data.Locate(e.Data + n)
				used[blob] = true
				n += left
			}
			if !e.Zero {
				live += e.Length
			}
		}
		if i := slices.Index(used, false); i >= 0 {
			t.Fatalf("part at %d lists blob %d of %d, to which nothing points", x.Start, i, len(used))
		}
		listed += x.DataLength
	}
	if dirty != res.DirtyBytes || live != res.LiveBytes || listed != res.ListedBytes || len(l.parts) != res.Parts {
		t.Fatalf("%d parts with %d bytes, %d live of %d; the merge said %+v", len(l.parts), dirty, live, listed, res)
	}
}

// TestMergedLayersStandForTheirInputs uses a device that changes its content
// and its size, merges neighbours among its layers again and again, merged
// ones too, and looks whether the chain says the same as one that was left
// alone, and whether that is what the device holds.
func TestMergedLayersStandForTheirInputs(t *testing.T) {
	rnd := seed(t)
	for try := range 4 {
		t.Run(fmt.Sprint(try), func(t *testing.T) { mergeRandomly(t, rnd) })
	}
}

func mergeRandomly(t *testing.T, rnd *rand.Rand) {
	s := newStore(t)
	size := int64(6<<20 + rnd.IntN(9)*512)
	img := &image{data: make([]byte, size)}
	scribble(rnd, img.data, 40)
	key := &blocksum.Key{4, 5}
	plain, tree := &repo.Tree{}, &repo.Tree{}
	dirty := []kernel.Extent{{Length: size}}
	const resizes = 6 // from that round on the device changes its size
	shared := 0
	for round := range 12 {
		o := Options{Source: img, Size: size, Ranges: ranges(dirty), Key: key, maxBlobs: 1 + rnd.IntN(6), maxExtents: 1 + rnd.IntN(100)}
		before := len(plain.Nodes)
		if n := len(tree.Nodes); n > 0 && rnd.IntN(2) == 0 {
			o.Ages = NewAges(s, open(t, s, tree)[rnd.IntN(n):], rnd.IntN(2) == 0, size)
		}
		write(t, s, plain, o)
		tree.Nodes = append(tree.Nodes, plain.Nodes[before:]...)
		if n := len(tree.Nodes); n > 1 && rnd.IntN(3) > 0 {
			from := rnd.IntN(n - 1)
			to := from + 2 + rnd.IntN(n-from-1)
			m := MergeOptions{Size: size, maxBlobs: 1 + rnd.IntN(12), maxExtents: 1 + rnd.IntN(100)}
			var was []string
			if round < resizes {
				was = described(t, s, open(t, s, tree)[from:to], size)
			}
			res := mergeNodes(t, s, tree, from, to, m)
			shared += res.Shared
			layers := open(t, s, tree)
			sound(t, s, layers[from], max(m.maxBlobs, 16), max(m.maxExtents, 200), res)
			// By itself it says what its inputs said together. (What is behind
			// a short block that no longer is the last, a newer layer says.)
			if round < resizes {
				if i := firstOther(was, described(t, s, layers[from:from+1], size)); i >= 0 {
					t.Fatalf("round %d: the merged layer says something else of block %d", round, i)
				}
			}
		}
		if n := len(tree.Nodes); n > 1 && rnd.IntN(2) == 0 {
			from := rnd.IntN(n - 1)
			to := from + 2 + rnd.IntN(n-from-1)
			m := MergeOptions{Size: size, Left: true, maxBlobs: 1 + rnd.IntN(12), maxExtents: 1 + rnd.IntN(100)}
			takeLeft(t, s, tree, from, to, m, round < resizes)
		}
		if got := merged(t, s, open(t, s, tree), size, key); !bytes.Equal(got, img.data) {
			t.Fatalf("round %d: the chain differs from the device from %d on", round, firstDifference(got, img.data))
		}
		if i := firstOther(described(t, s, open(t, s, plain), size), described(t, s, open(t, s, tree), size)); i >= 0 {
			t.Fatalf("round %d: the merged chain says something else of block %d", round, i)
		}
		dirty = scribble(rnd, img.data, rnd.IntN(20))
		if round >= resizes-1 && rnd.IntN(2) == 0 { // it grows or shrinks
			now := max(size+int64(rnd.IntN(4001)-2000)*512, 1<<20)
			next := make([]byte, now)
			copy(next, img.data)
			from := min(size, now) / kernel.BlockSize * kernel.BlockSize
			dirty = kernel.Align(append(dirty, kernel.Extent{Offset: from, Length: max(now-from, 0)}), now)
			img.data, size = next, now
		}
	}
	t.Logf("%d layers instead of %d, %d parts were shared", len(tree.Nodes), len(plain.Nodes), shared)
}

// takeLeft puts what is left of a layer, under those up to to-1, in its place.
func takeLeft(t *testing.T, s store, tree *repo.Tree, from, to int, o MergeOptions, same bool) {
	t.Helper()
	layers := open(t, s, tree)[from:to]
	w := s.NewWriter(t.Context(), repo.WriterOptions{})
	o.Time = time.Unix(3, 0)
	res, err := Merge(t.Context(), w, s, layers, o)
	if err == nil {
		err = w.Flush(t.Context())
	}
	if err != nil {
		t.Fatal(err)
	}
	if res.Tree == nil {
		tree.Nodes = slices.Delete(slices.Clone(tree.Nodes), from, from+1)
		return
	}
	tree.Nodes = slices.Clone(tree.Nodes)
	tree.Nodes[from] = DirNode(tree.Nodes[from].Name, *res.Tree, o.Time)
	left := open(t, s, tree)[from]
	sound(t, s, left, max(o.maxBlobs, 16), max(o.maxExtents, 200), res)
	if !same {
		return
	}
	above, was := described(t, s, layers[1:], o.Size), described(t, s, layers[:1], o.Size)
	for i, b := range described(t, s, []*Layer{left}, o.Size) {
		if want := map[bool]string{true: was[i], false: "missing"}[above[i] == "missing"]; b != want {
			t.Fatalf("what is left says something else of block %d", i)
		}
	}
}

func firstOther(a, b []string) int {
	for i := range a {
		if i >= len(b) || a[i] != b[i] {
			return i
		}
	}
	if len(b) > len(a) {
		return len(a)
	}
	return -1
}

func TestUntouchedPartsAreShared(t *testing.T) {
	rnd := seed(t)
	s := newStore(t)
	const size = 32 << 20
	img := &image{data: make([]byte, size)}
	for i := range img.data {
		img.data[i] = byte(rnd.Uint32())
	}
	key := &blocksum.Key{}
	tree := &repo.Tree{}
	write(t, s, tree, Options{Source: img, Size: size, Ranges: ranges([]kernel.Extent{{Length: size}}), Key: key, maxBlobs: 3, maxExtents: 100})
	copy(img.data[17<<20:], []byte("changed"))
	write(t, s, tree, Options{Source: img, Size: size, Ranges: ranges([]kernel.Extent{{Offset: 17 << 20, Length: 4096}}), Key: key})
	old := open(t, s, tree)[0]
	res := mergeNodes(t, s, tree, 0, 2, MergeOptions{Size: size, maxBlobs: 3, maxExtents: 100})
	layers := open(t, s, tree)
	if len(old.parts) < 5 || res.Shared != len(old.parts)-1 || res.Parts < len(old.parts) {
		t.Fatalf("of %d parts, %d are shared in a layer of %d", len(old.parts), res.Shared, res.Parts)
	}
	same := 0
	for _, p := range old.parts {
		if slices.Contains(layers[0].parts, p) {
			same++
		}
	}
	if same != res.Shared {
		t.Errorf("%d parts have the tree that they had, %d are said to be shared", same, res.Shared)
	}
	if res.LiveBytes != size || res.ListedBytes < size {
		t.Errorf("%+v", res)
	}
	sound(t, s, layers[0], 3, 100, res)
	if !bytes.Equal(merged(t, s, layers, size, key), img.data) {
		t.Error("the merged layer gives something else")
	}
}

func TestMergedPartsAreBounded(t *testing.T) {
	rnd := seed(t)
	s := newStore(t)
	const size = 16 << 20
	img := &image{data: make([]byte, size)}
	for i := range img.data {
		img.data[i] = byte(rnd.Uint32())
	}
	key := &blocksum.Key{}
	for name, limit := range map[string]MergeOptions{
		"Blobs":   {Size: size, maxBlobs: 3, maxExtents: 1 << 20},
		"Extents": {Size: size, maxBlobs: 1 << 20, maxExtents: 40},
	} {
		t.Run(name, func(t *testing.T) {
			tree := &repo.Tree{}
			write(t, s, tree, Options{Source: img, Size: size, Ranges: ranges([]kernel.Extent{{Length: size}}), Key: key})
			var scattered []kernel.Extent
			for off := int64(0); off < size; off += 64 << 10 {
				scattered = append(scattered, kernel.Extent{Offset: off, Length: 4096})
				img.data[off] ^= 1
			}
			write(t, s, tree, Options{Source: img, Size: size, Ranges: ranges(scattered), Key: key})
			res := mergeNodes(t, s, tree, 0, 2, limit)
			if res.Parts < 4 || res.Shared > 0 {
				t.Errorf("%+v", res)
			}
			layers := open(t, s, tree)
			for _, ref := range layers[0].parts {
				p, err := openPart(t.Context(), s, ref)
				if err != nil {
					t.Fatal(err)
				}
				// The first block of a part may need two blobs.
				if b, x := len(p.Data.Blobs), len(p.Index.Extents); b > limit.maxBlobs+1 || x > limit.maxExtents {
					t.Errorf("the part at %d has %d blobs and %d extents", ref.start, b, x)
				}
			}
			if !bytes.Equal(merged(t, s, layers, size, key), img.data) {
				t.Error("the merged layer gives something else")
			}
		})
	}
}

func TestSmallPartsAreJoined(t *testing.T) {
	s := newStore(t)
	const size = 1 << 30
	key := &blocksum.Key{}
	tree := &repo.Tree{}
	const n = 20
	for i := range int64(n) {
		e := kernel.Extent{Offset: i * 32 << 20, Length: 4096}
		write(t, s, tree, Options{Source: sparse{}, Size: size, Ranges: ranges([]kernel.Extent{e}), Key: key})
		if i > 0 {
			res := mergeNodes(t, s, tree, 0, 2, MergeOptions{Size: size})
			if res.Parts != 1 || res.DirtyBytes != (i+1)*4096 {
				t.Fatalf("%+v", res)
			}
		}
	}
}

// TestDeadBlobsAreDropped overwrites all of the device but one block.
func TestDeadBlobsAreDropped(t *testing.T) {
	rnd := seed(t)
	s := newStore(t)
	const size = 16 << 20
	img := &image{data: make([]byte, size)}
	key := &blocksum.Key{}
	tree := &repo.Tree{}
	for round := range 2 {
		for i := range img.data {
			if round == 0 || i/kernel.BlockSize != 1000 {
				img.data[i] = byte(rnd.Uint32())
			}
		}
		list := []kernel.Extent{{Length: size}}
		if round == 1 {
			list = []kernel.Extent{{Length: 1000 * 4096}, {Offset: 1001 * 4096, Length: size - 1001*4096}}
		}
		write(t, s, tree, Options{Source: img, Size: size, Ranges: ranges(list), Key: key})
	}
	res := mergeNodes(t, s, tree, 0, 2, MergeOptions{Size: size})
	if res.LiveBytes != size || res.DirtyBytes != size || res.ListedBytes > size+16<<20/2 {
		t.Errorf("%+v", res)
	}
	layers := open(t, s, tree)
	sound(t, s, layers[0], maxPartBlobs, maxPartExtents, res)
	p, err := openPart(t.Context(), s, layers[0].parts[0])
	if err != nil {
		t.Fatal(err)
	}
	seen := map[repo.ID]bool{}
	for _, id := range p.Data.Blobs {
		if seen[id] {
			t.Errorf("blob %v is listed twice", id.Str())
		}
		seen[id] = true
	}
	if !bytes.Equal(merged(t, s, layers, size, key), img.data) {
		t.Error("the merged layer gives something else")
	}
}

func TestBlobsOfSumsAreTakenOverWhole(t *testing.T) {
	s := newStore(t)
	const size = 1 << 30 // two blobs of sums
	key := &blocksum.Key{}
	tree := &repo.Tree{}
	write(t, s, tree, Options{Source: sparse{}, Size: size, Ranges: ranges([]kernel.Extent{{Length: size}}), Key: key})
	write(t, s, tree, Options{Source: sparse{}, Size: size, Ranges: ranges([]kernel.Extent{{Offset: 100 << 20, Length: 4096}}), Key: key})
	old := open(t, s, tree)
	was, err := openPart(t.Context(), s, old[0].parts[0])
	if err != nil {
		t.Fatal(err)
	}
	mergeNodes(t, s, tree, 0, 2, MergeOptions{Size: size})
	is, err := openPart(t.Context(), s, open(t, s, tree)[0].parts[0])
	if err != nil {
		t.Fatal(err)
	}
	if len(was.sums.Blobs) != 2 || len(is.sums.Blobs) > 4 {
		t.Fatalf("%d blobs of sums, %d before", len(is.sums.Blobs), len(was.sums.Blobs))
	}
	if !slices.Contains(is.sums.Blobs, was.sums.Blobs[1]) {
		t.Error("sums that stay as they are were written anew")
	}
}

func TestMergeOfNothingAndOfDamage(t *testing.T) {
	s := newStore(t)
	img := &image{data: bytes.Repeat([]byte("x"), 1<<20)}
	tree := &repo.Tree{}
	o := Options{Source: img, Size: 1 << 20, Ranges: ranges([]kernel.Extent{{Offset: 1 << 19, Length: 1 << 19}}), Key: &blocksum.Key{}}
	write(t, s, tree, o)
	write(t, s, tree, o)
	layers := open(t, s, tree)
	w := s.NewWriter(t.Context(), repo.WriterOptions{})
	if res, err := Merge(t.Context(), w, s, layers, MergeOptions{Size: 1 << 19}); err != nil || res.Tree != nil {
		t.Errorf("of a device that shrank: %+v, %v", res, err)
	}
	if res, err := Merge(t.Context(), w, s, nil, MergeOptions{Size: 1 << 20}); err != nil || res.Tree != nil {
		t.Errorf("of no layers: %+v, %v", res, err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("why")
	cancel(why)
	if _, err := Merge(ctx, w, s, layers, MergeOptions{Size: 1 << 20}); !errors.Is(err, why) {
		t.Errorf("cancelled: %v", err)
	}
	layers[0].parts[0].start = 4096
	if _, err := Merge(t.Context(), w, s, layers[:1], MergeOptions{Size: 1 << 20}); !errors.Is(err, ErrDamaged) {
		t.Errorf("damaged: %v", err)
	}
}
