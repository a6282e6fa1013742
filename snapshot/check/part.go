// SPDX-License-Identifier: BSD-2-Clause

package check

import (
	"context"
	"fmt"
	"strconv"

	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/snapshot"
	"github.com/dsync-backup/dsync-backup/snapshot/blockindex"
	"github.com/dsync-backup/dsync-backup/snapshot/blocksum"
	"github.com/dsync-backup/dsync-backup/snapshot/layer"
)

// damaged wraps layer.ErrDamaged.
func damaged(format string, args ...any) error {
	return fmt.Errorf("%w: %s", layer.ErrDamaged, fmt.Sprintf(format, args...))
}

// parseName reads the name of a layer or a part: 16 hex digits.
func parseName(s string) (int64, bool) {
	n, err := strconv.ParseInt(s, 16, 64)
	return n, err == nil && len(s) == 16 && fmt.Sprintf("%016x", n) == s
}

// part is what is kept in mind of a part of a layer.
type part struct {
	tree  repo.ID
	start int64
	end   int64 // by its index; the start if that cannot be read
	// whole is up to where extents lie without a gap from the start on.
	whole int64
	err   error // why its index is of no use
	sums  error // what is wrong with its sums alone
}

// files are the nodes of a part.
type files struct {
	index *blockindex.Index
	data  *repo.Node
	sums  *repo.Node
}

// open reads a part's tree and index. It does not look at the data.
func open(ctx context.Context, from snapshot.Store, tree repo.ID, start int64) (files, error) {
	t, err := from.LoadTree(ctx, tree)
	if err != nil {
		return files{}, err
	}
	f := files{data: t.Find("data"), sums: t.Find("sums")}
	raw, err := layer.ReadFile(ctx, from, t.Find("index"))
	if err != nil {
		return f, fmt.Errorf("index: %w", err)
	}
	if f.index, err = blockindex.Decode(raw); err != nil {
		return f, fmt.Errorf("%w: %w", layer.ErrDamaged, err)
	}
	if f.index.Start != start {
		return f, damaged("its index is of a part at %d", f.index.Start)
	}
	if f.data == nil || f.data.Type != repo.NodeFile {
		return f, damaged("file data is missing")
	}
	if int64(f.data.Size) != f.index.DataLength {
		return f, damaged("file data has %d bytes, the index asks for %d", f.data.Size, f.index.DataLength)
	}
	return f, nil
}

// look checks a part by itself.
func look(ctx context.Context, from snapshot.Store, tree repo.ID, start int64) part {
	p := part{tree: tree, start: start, end: start, whole: start}
	f, err := open(ctx, from, tree, start)
	if err != nil {
		p.err = err
		return p
	}
	x := f.index
	p.end = x.End
	for _, e := range x.Extents {
		if e.Offset != p.whole {
			break
		}
		p.whole = e.End()
	}
	if n, known := length(from, f.data); known && n != x.DataLength {
		p.err = damaged("the blobs of file data have %d bytes, the index asks for %d", n, x.DataLength)
	}
	want := x.DataBlocks() * blocksum.Size
	if f.sums == nil && want > 0 {
		p.sums = damaged("it has no sums")
	}
	if f.sums != nil {
		if n, known := length(from, f.sums); int64(f.sums.Size) != want || known && n != want {
			p.sums = damaged("file sums has %d bytes, and %d in its blobs, instead of %d", f.sums.Size, n, want)
		}
	}
	return p
}

// length adds up the blobs of a file; it is not known if one is in no index.
func length(from snapshot.Store, n *repo.Node) (sum int64, known bool) {
	for _, id := range n.Content {
		size, ok := from.BlobSize(repo.BlobHandle{Type: repo.DataBlob, ID: id})
		if !ok {
			return 0, false
		}
		sum += int64(size)
	}
	return sum, true
}

// span is a stretch of a part's data file, and why it cannot be had.
type span struct {
	end int64
	bad error
}

// spans lays out the blobs of a data file. The length of a blob that is in no
// index is not known: between the first and the last of several such blobs
// nothing is certain.
func spans(from snapshot.Store, f files, blob func(repo.BlobHandle) error) []span {
	ids := f.data.Content
	sizes := make([]int64, len(ids))
	first, last, known := -1, -1, int64(0)
	for i, id := range ids {
		size, ok := from.BlobSize(repo.BlobHandle{Type: repo.DataBlob, ID: id})
		if !ok {
			if first < 0 {
				first = i
			}
			last = i
			continue
		}
		sizes[i] = int64(size)
		known += int64(size)
	}
	out := make([]span, 0, len(ids))
	at := int64(0)
	for i, id := range ids {
		if first >= 0 && i >= first && i < last {
			continue // one span with the last one that is lost
		}
		at += sizes[i]
		if i == last {
			at = f.index.DataLength
			for _, n := range sizes[last+1:] {
				at -= n
			}
		}
		out = append(out, span{at, blob(repo.BlobHandle{Type: repo.DataBlob, ID: id})})
	}
	return out
}
