// SPDX-License-Identifier: BSD-2-Clause

package layer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/repo"
)

// MergeOptions say how layers are merged. Size must be set.
type MergeOptions struct {
	// Size is the device's, in bytes, as of the snapshot that will list the
	// merged layer. Blocks behind it are dropped.
	Size int64
	Time time.Time // of the files in the layer's tree

	// Left makes a layer of what the oldest of the layers still gives: without the
	// blocks that a newer one describes.
	Left bool

	// The limits of a part; 0 means maxPartBlobs and maxPartExtents.
	maxBlobs, maxExtents int
}

// MergeResult says what came of a merge. Bytes are of data before compression.
type MergeResult struct {
	Tree       *repo.ID // the layer; nil if the layers describe nothing within Size
	DirtyBytes int64    // of the device that the layer describes, zeros included

	Parts  int // of the layer
	Shared int // of these, taken over from an input as they are

	// ListedBytes is the length of all blobs in the layer's data files, and
	// LiveBytes how much of it extents point at: how worn the layer is.
	ListedBytes, LiveBytes int64
}

// Merge makes one layer of layers that are neighbours in a chain, oldest first
// as Open returns them, in metadata only: in the chain it stands for all of
// them. Block by block the newest of them wins, zeros too. Blobs that no
// extent points at any more are not listed. A large part in whose range no
// other layer describes anything is shared by its tree ID; all others are
// written anew, within the limits that Write keeps.
//
// It loads indexes and sums, never data, and holds one part of each layer and
// the one in the making. As with Write, nothing refers to the layer on return.
// from must find all that the layers are made of, and to must take it for
// known.
func Merge(ctx context.Context, to Saver, from Loader, layers []*Layer, o MergeOptions) (MergeResult, error) {
	if o.maxBlobs == 0 {
		o.maxBlobs, o.maxExtents = maxPartBlobs, maxPartExtents
	}
	// Whole blocks: the last one of an older layer may have been longer than
	// it is now, and its sum is that of all of it.
	size := kernel.BlocksOf(o.Size) * kernel.BlockSize
	g := &merge{to: to, from: from, o: o, m: NewMerger(from, layers, size), part: newMergedPart()}
	if o.Left {
		g.only = g.m.cursors[len(g.m.cursors)-1]
	}
	if err := g.run(ctx); err != nil {
		return MergeResult{}, fmt.Errorf("merge layers: %w", err)
	}
	return g.result, nil
}

// merge is one run of Merge.
type merge struct {
	to     Saver
	from   Loader
	o      MergeOptions
	m      *Merger
	only   *cursor // if set, what others give is left out
	part   *mergedPart
	parts  []*repo.Node
	result MergeResult
}

func (g *merge) run(ctx context.Context) error {
	for {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		shared, err := g.share(ctx)
		if err != nil {
			return err
		}
		if shared {
			continue
		}
		p, err := g.m.Next(ctx)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		if p.Missing {
			continue
		}
		if g.only != nil && p.cursor != g.only {
			// A last block that is short wins as a whole.
			g.m.pos = kernel.BlocksOf(g.m.pos) * kernel.BlockSize
			continue
		}
		if err := g.add(ctx, p); err != nil {
			return err
		}
	}
	if err := g.closePart(ctx); err != nil || len(g.parts) == 0 {
		return err
	}
	saved, err := g.to.SaveTree(ctx, &repo.Tree{Nodes: g.parts})
	if err != nil {
		return err
	}
	g.result.Tree, g.result.Parts = &saved.ID, len(g.parts)
	return nil
}

// share takes over a part that starts here if it may stay as it is.
func (g *merge) share(ctx context.Context) (bool, error) {
	for _, c := range g.m.cursors {
		if !c.startsAt(g.m.pos) || g.only != nil && c != g.only {
			continue
		}
		if _, err := c.seek(ctx, g.from, g.m.pos); err != nil {
			return false, err
		}
		if ok, err := g.untouched(ctx, c); err != nil {
			return false, err
		} else if ok {
			return true, g.take(ctx, c)
		}
	}
	return false, nil
}

// startsAt reports whether the cursor is, or next comes to, the start of a
// part at pos.
func (c *cursor) startsAt(pos int64) bool {
	if c.part != nil && c.part.Index.Start == pos {
		return c.ext == 0
	}
	next := c.at + 1
	return next < len(c.layer.parts) && c.layer.parts[next].start == pos
}

// untouched reports whether the part that c is at the start of is worth to be
// shared, and no other layer describes anything in its range.
func (g *merge) untouched(ctx context.Context, c *cursor) (bool, error) {
	if c.part == nil || c.part.Index.Start != g.m.pos || c.ext != 0 {
		return false, nil
	}
	x := c.part.Index
	// Small ones are joined, or a layer would come to consist of crumbs.
	small := 4*len(c.part.Data.Blobs) < g.o.maxBlobs && 4*len(x.Extents) < g.o.maxExtents
	if small || x.End <= x.Start || x.End > g.m.size {
		return false, nil
	}
	for _, other := range g.m.cursors {
		if other == c {
			continue
		}
		// What has not been opened yet may begin right there.
		if e, err := other.seek(ctx, g.from, g.m.pos); err != nil || e.Offset < x.End {
			return false, err
		}
	}
	return true, nil
}

// take shares the part that c is at the start of.
func (g *merge) take(ctx context.Context, c *cursor) error {
	if err := g.closePart(ctx); err != nil {
		return err
	}
	x := c.part.Index
	g.parts = append(g.parts, DirNode(formatName(uint64(x.Start)), c.layer.parts[c.at].tree, g.o.Time))
	g.result.Shared++
	g.result.ListedBytes += x.DataLength
	for _, e := range x.Extents {
		g.count(e.Length, e.Zero)
	}
	c.ext = len(x.Extents)
	g.m.pos = kernel.BlocksOf(x.End) * kernel.BlockSize
	return nil
}

func (g *merge) count(length int64, zero bool) {
	g.result.DirtyBytes += length
	if !zero {
		g.result.LiveBytes += length
	}
}

// add describes a piece, in as many parts as its blobs and extents ask for.
func (g *merge) add(ctx context.Context, p Piece) error {
	g.count(p.Length, p.Zero)
	short := p.Length%kernel.BlockSize != 0
	for p.Length > 0 {
		n := g.part.room(p, g.o.maxBlobs, g.o.maxExtents)
		if n == 0 {
			if err := g.closePart(ctx); err != nil {
				return err
			}
			continue
		}
		piece := p
		piece.Length = n
		if err := g.part.add(ctx, g.to, g.from, piece); err != nil {
			return err
		}
		p.Offset, p.Length = p.Offset+n, p.Length-n
		if !p.Zero {
			p.Data, p.Sum = p.Data+n, p.Sum+n/kernel.BlockSize
		}
	}
	if !short {
		return nil
	}
	// The last block of the device as it was then. It wins as a whole, and
	// only a part's last block may be short.
	g.m.pos = kernel.BlocksOf(g.m.pos) * kernel.BlockSize
	return g.closePart(ctx)
}

// closePart stores the part in the making and starts the next one.
func (g *merge) closePart(ctx context.Context) error {
	p := g.part
	if len(p.extents) == 0 {
		return nil
	}
	g.part = newMergedPart()
	files, err := p.files(ctx, g.to)
	if err != nil {
		return err
	}
	files.Time = g.o.Time
	node, err := SavePart(ctx, g.to, files)
	if err != nil {
		return err
	}
	g.parts = append(g.parts, node)
	g.result.ListedBytes += files.Index.DataLength
	return nil
}
