// SPDX-License-Identifier: BSD-2-Clause

package layer

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sort"

	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/snapshot/blockindex"
	"github.com/dsync-backup/dsync-backup/snapshot/blocksum"
)

// ErrDamaged is wrapped by errors about layers that are not as they were
// written.
var ErrDamaged = errors.New("snapshot is damaged")

// IsDamage is [repo.IsDamage] for layers too, and for what a broken disk does not give.
func IsDamage(err error) bool {
	return errors.Is(err, ErrDamaged) || repo.IsDamage(err) || errors.Is(err, backend.ErrBroken)
}

// Loader is what reading layers asks of a repository.
type Loader interface {
	LoadTree(ctx context.Context, id repo.ID) (*repo.Tree, error)
	// LoadMeta loads a blob that is small and worth caching.
	LoadMeta(ctx context.Context, id repo.ID) ([]byte, error)
	// BlobSize is the length in bytes of a blob that the index lists.
	BlobSize(h repo.BlobHandle) (int, bool)
}

// Layer is one layer of a snapshot.
type Layer struct {
	Number uint64 // a higher one is newer
	Tree   repo.ID
	parts  []partRef

	damaged func(error) bool // which errors are damage that is gone around; nil: none
	lost    error            // why nothing is known of the layer, if that is so
}

type partRef struct {
	start int64
	tree  repo.ID
}

// Open reads the trees of all layers in the folder `layers`, oldest first.
func Open(ctx context.Context, from Loader, layers repo.ID) ([]*Layer, error) {
	return openAll(ctx, from, layers, nil)
}

// OpenDamaged is Open for what is to be had of a snapshot of which something is lost.
// damaged tells errors that say so from those of a store that does not answer. Where a layer or
// a part cannot be read, and no newer layer has the range, a merger's piece is
// missing; of a part whose data file lists blobs that are in no index, the ranges that these
// give have blobs without an entry, and those between two of them count as well, since it is
// not known where they lie.
func OpenDamaged(ctx context.Context, from Loader, layers repo.ID, damaged func(error) bool) ([]*Layer, error) {
	return openAll(ctx, from, layers, damaged)
}

func openAll(ctx context.Context, from Loader, layers repo.ID, damaged func(error) bool) ([]*Layer, error) {
	tree, err := from.LoadTree(ctx, layers)
	if err != nil {
		return nil, fmt.Errorf("open layers: %w", err)
	}
	var out []*Layer
	for _, n := range tree.Nodes {
		l, err := openLayer(ctx, from, n, damaged)
		if err != nil {
			return nil, fmt.Errorf("open layer %s: %w", n.Name, err)
		}
		out = append(out, l)
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Number < out[j].Number })
	return out, nil
}

func openLayer(ctx context.Context, from Loader, n *repo.Node, damaged func(error) bool) (*Layer, error) {
	number, err := parseName(n.Name)
	if err != nil || n.Subtree == nil {
		return nil, fmt.Errorf("%w: %q is not a layer", ErrDamaged, n.Name)
	}
	l, err := OpenTree(ctx, from, number, *n.Subtree)
	if err != nil && damaged != nil && damaged(err) {
		l, err = &Layer{Number: number, Tree: *n.Subtree, lost: fmt.Errorf("open layer %s: %w", n.Name, err)}, nil
	}
	if err != nil {
		return nil, err
	}
	l.damaged = damaged
	return l, nil
}

// OpenTree opens a layer by its tree, and gives it a number.
func OpenTree(ctx context.Context, from Loader, number uint64, id repo.ID) (*Layer, error) {
	tree, err := from.LoadTree(ctx, id)
	if err != nil {
		return nil, err
	}
	l := &Layer{Number: number, Tree: id}
	for _, p := range tree.Nodes {
		start, err := parseName(p.Name)
		if err != nil || p.Subtree == nil || int64(start) < 0 {
			return nil, fmt.Errorf("%w: %q is not a part", ErrDamaged, p.Name)
		}
		l.parts = append(l.parts, partRef{int64(start), *p.Subtree})
	}
	// Names of 16 hex digits sort as their numbers do, and trees are sorted;
	// but that is someone else's promise.
	sort.Slice(l.parts, func(i, j int) bool { return l.parts[i].start < l.parts[j].start })
	if len(l.parts) == 0 {
		return nil, fmt.Errorf("%w: the layer has no parts", ErrDamaged)
	}
	return l, nil
}

// Part is an opened part: its index, and the blobs of its data and sums.
type Part struct {
	Index *blockindex.Index
	Data  File
	sums  File
	// noSums is why there are none that could be read. Only who needs them minds.
	noSums error
}

func openPart(ctx context.Context, from Loader, ref partRef) (*Part, error) {
	return openDamagedPart(ctx, from, ref, false)
}

// openDamagedPart is openPart; with holes, blobs of its data may be in no index.
func openDamagedPart(ctx context.Context, from Loader, ref partRef, holes bool) (*Part, error) {
	fail := func(err error) (*Part, error) {
		return nil, fmt.Errorf("open part at %d (tree %v): %w", ref.start, ref.tree.Str(), err)
	}
	tree, err := from.LoadTree(ctx, ref.tree)
	if err != nil {
		return fail(err)
	}
	files := map[string]*repo.Node{}
	for _, n := range tree.Nodes {
		files[n.Name] = n
	}
	raw, err := ReadFile(ctx, from, files[indexFile])
	if err != nil {
		return fail(err)
	}
	x, err := blockindex.Decode(raw)
	if err != nil {
		return fail(fmt.Errorf("%w: %w", ErrDamaged, err))
	}
	p := &Part{Index: x}
	if x.Start != ref.start {
		return fail(fmt.Errorf("%w: its index is of a part at %d", ErrDamaged, x.Start))
	}
	if p.Data, err = openFile(from, files[dataFile], x.DataLength, holes); err != nil {
		return fail(err)
	}
	if n, ok := files[sumsFile]; ok {
		p.sums, p.noSums = openFile(from, n, x.DataBlocks()*blocksum.Size, false)
	}
	return p, nil
}

// File is a list of blobs.
type File struct {
	Blobs []repo.ID
	ends  []int64
}

// openFile checks a file against the length that its index asks for. restic's
// `repair snapshots` drops missing blobs from a file, which would shift all
// that follows: the lengths tell.
//
// With holes, blobs may be in no index. How long such a blob is, is not known: the first of
// them stands for all up to the last, and takes what the others leave.
func openFile(from Loader, n *repo.Node, want int64, holes bool) (File, error) {
	if n == nil {
		return File{}, fmt.Errorf("%w: its data are missing", ErrDamaged)
	}
	sizes := make([]int64, len(n.Content))
	var size int64
	first, last := -1, -1
	for i, id := range n.Content {
		s, ok := from.BlobSize(repo.BlobHandle{Type: repo.DataBlob, ID: id})
		if !ok && !holes {
			return File{}, fmt.Errorf("%w: blob %v of file %q is in no index", ErrDamaged, id.Str(), n.Name)
		}
		if !ok && first < 0 {
			first = i
		}
		if !ok {
			last = i
		}
		sizes[i] = int64(s)
		size += int64(s)
	}
	blobs := n.Content
	if first >= 0 {
		// What lies between two of them is of no use either.
		hole := want
		for _, s := range slices.Concat(sizes[:first], sizes[last+1:]) {
			hole -= s
		}
		if size > want || hole <= 0 {
			return File{}, fmt.Errorf("%w: file %q has more than %d bytes in blobs", ErrDamaged, n.Name, want)
		}
		blobs = slices.Concat(blobs[:first+1], blobs[last+1:])
		sizes = slices.Concat(sizes[:first], []int64{hole}, sizes[last+1:])
		size = want
	}
	if size != want || int64(n.Size) != want {
		return File{}, fmt.Errorf("%w: file %q has %d bytes in blobs and %d by its node, not %d", ErrDamaged, n.Name, size, n.Size, want)
	}
	f := File{Blobs: blobs, ends: sizes}
	for i := 1; i < len(f.ends); i++ {
		f.ends[i] += f.ends[i-1]
	}
	return f, nil
}

// Locate is the blob that holds the byte at off, the byte's offset inside of
// the blob, and how many bytes the blob holds from there on.
func (f *File) Locate(off int64) (blob int, in, left int64) {
	blob = sort.Search(len(f.ends), func(i int) bool { return f.ends[i] > off })
	var start int64
	if blob > 0 {
		start = f.ends[blob-1]
	}
	return blob, off - start, f.ends[blob] - off
}

// size is the length of a blob.
func (f *File) size(blob int) int64 {
	if blob == 0 {
		return f.ends[0]
	}
	return f.ends[blob] - f.ends[blob-1]
}

// ReadFile loads a small file of ours.
func ReadFile(ctx context.Context, from Loader, n *repo.Node) ([]byte, error) {
	if n == nil || n.Type != repo.NodeFile {
		return nil, fmt.Errorf("%w: file is missing", ErrDamaged)
	}
	var out []byte
	for _, id := range n.Content {
		b, err := from.LoadMeta(ctx, id)
		if err != nil {
			return nil, fmt.Errorf("read file %q: %w", n.Name, err)
		}
		out = append(out, b...)
	}
	if uint64(len(out)) != n.Size {
		return nil, fmt.Errorf("%w: file %q has %d bytes, not %d", ErrDamaged, n.Name, len(out), n.Size)
	}
	return out, nil
}
