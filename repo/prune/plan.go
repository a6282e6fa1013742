// SPDX-License-Identifier: BSD-2-Clause

package prune

import (
	"cmp"
	"context"
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/repo/pack"
)

// fate is what becomes of a pack.
type fate uint8

const (
	keep   fate = iota
	remove      // nothing of it is used
	repack      // what is used of it goes to a new pack
	forget      // it is missing, and nothing of it is used
)

// packInfo is what the index says of a pack. Sizes are in bytes; usedBytes has
// the header in it.
type packInfo struct {
	used, unused, duplicates int32 // blobs; duplicates count as unused at first
	usedBytes, unusedBytes   int64
	trees, data              bool
	uncompressed             bool
	fate                     fate
}

func (p *packInfo) size() int64     { return p.usedBytes + p.unusedBytes }
func (p *packInfo) bulk() bool      { return p.data && !p.trees }
func (p *packInfo) mixed() bool     { return p.data && p.trees }
func (p *packInfo) treesOnly() bool { return p.trees && !p.data }

// plan says what to do.
type plan struct {
	opts     Options
	packSize int64
	catalog  *repo.Catalog
	marks    *marks
	chosen   *repo.Bits // of each used blob the place that counts
	packs    []packInfo // by number in the catalog
	files    map[repo.ID]int64
	leftover []repo.ID // packs that no index lists
	sum      *Summary
}

// decide makes the plan, or says why nothing may be deleted.
func (p *plan) decide(ctx context.Context) error {
	p.packs = make([]packInfo, len(p.catalog.Packs()))
	for i := range p.packs {
		p.packs[i].usedBytes = pack.Overhead
	}
	p.chosen = repo.NewBits(p.catalog.Len())
	if err := p.count(ctx); err != nil {
		return err
	}
	if p.sum.Duplicate.Count > 0 {
		if err := p.chooseCopies(ctx); err != nil {
			return err
		}
	}
	if err := p.compareWithFiles(); err != nil {
		return err
	}
	p.choosePacks()
	if p.sum.Duplicate.Count > 0 {
		return p.countCopies(ctx)
	}
	return nil
}

// count adds up the blobs of every pack.
func (p *plan) count(ctx context.Context) error {
	return p.catalog.EachBlob(ctx, func(h repo.BlobHandle, places []repo.Place) error {
		used := p.marks.used.Has(places[0].Position)
		for _, at := range places {
			x := &p.packs[at.Pack]
			size := int64(at.Length)
			x.usedBytes += int64(pack.EntrySize(at.Blob(h)))
			x.trees = x.trees || h.Type == repo.TreeBlob
			x.data = x.data || h.Type == repo.DataBlob
			x.uncompressed = x.uncompressed || at.UncompressedLength == 0
			switch {
			case !used:
				x.unused++
				x.unusedBytes += size
				p.sum.Unused.add(size)
			case len(places) == 1:
				x.used++
				x.usedBytes += size
				p.sum.Used.add(size)
				p.chosen.Set(at.Position)
			default:
				x.unused++
				x.duplicates++
				x.unusedBytes += size
				p.sum.Duplicate.add(size)
			}
		}
		return nil
	})
}

// chooseCopies settles which copy of a blob counts where there are several: one
// in a pack that is used anyway, or that holds nothing but copies (a prune that
// was killed made it), else any.
func (p *plan) chooseCopies(ctx context.Context) error {
	return p.catalog.EachBlob(ctx, func(_ repo.BlobHandle, places []repo.Place) error {
		if len(places) == 1 || !p.marks.used.Has(places[0].Position) {
			return nil
		}
		best, rank := 0, math.MaxInt
		for i, at := range places {
			x := &p.packs[at.Pack]
			r := 3
			switch {
			case !p.whole(at.Pack):
				r = 4
			case x.used > 0:
				r = 1
			case x.duplicates == x.unused:
				r = 2
			}
			if r < rank {
				best, rank = i, r
			}
		}
		at := places[best]
		x := &p.packs[at.Pack]
		size := int64(at.Length)
		x.used++
		x.usedBytes += size
		x.unused--
		x.duplicates--
		x.unusedBytes -= size
		p.sum.Used.add(size)
		p.sum.Duplicate.sub(size)
		p.chosen.Set(at.Position)
		return nil
	})
}

// countCopies corrects what stays unused, now that the fates are settled: a blob whose
// copy that counts would go to a new pack does not, if another copy stays where it is, and
// that one is then used.
func (p *plan) countCopies(ctx context.Context) error {
	return p.catalog.EachBlob(ctx, func(_ repo.BlobHandle, places []repo.Place) error {
		if len(places) == 1 || !p.marks.used.Has(places[0].Position) {
			return nil
		}
		stays := slices.IndexFunc(places, func(at repo.Place) bool { return p.packs[at.Pack].fate == keep })
		counts := slices.IndexFunc(places, func(at repo.Place) bool { return p.chosen.Has(at.Position) })
		if stays >= 0 && counts >= 0 && p.packs[places[counts].Pack].fate == repack {
			p.sum.UnusedAfter -= int64(places[stays].Length)
		}
		return nil
	})
}

// whole reports whether the store has the pack in the size that the index asks
// for.
func (p *plan) whole(number int32) bool {
	size, ok := p.files[p.catalog.Packs()[number]]
	return ok && size == p.packs[number].size()
}

// compareWithFiles finds the packs that no index lists, and refuses to go on if
// a pack that is needed is not as the index says.
func (p *plan) compareWithFiles() error {
	listed := make(map[repo.ID]bool, len(p.packs))
	var missing, sized []string
	for i, id := range p.catalog.Packs() {
		listed[id] = true
		x := &p.packs[i]
		size, ok := p.files[id]
		switch {
		case !ok && x.used > 0:
			missing = append(missing, id.Str())
		case !ok:
			x.fate = forget
			p.sum.PacksMissing++
			p.sum.Removed.Count += int64(x.unused)
			p.sum.Removed.Bytes += x.unusedBytes
		case size != x.size() && x.used > 0:
			sized = append(sized, fmt.Sprintf("%s has %d bytes instead of %d", id.Str(), size, x.size()))
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("%w: %d packs that the index lists are missing: %s; nothing was deleted; run `check`, which names the snapshots", ErrIncomplete, len(missing), some(missing))
	}
	if len(sized) > 0 {
		return fmt.Errorf("%w: packs are not as long as the index says: %s; nothing was deleted; run `check`, then `repair index`", ErrIncomplete, some(sized))
	}
	for id, size := range p.files {
		p.sum.BytesBefore += size
		if !listed[id] {
			p.leftover = append(p.leftover, id)
			p.sum.PacksUnindexed.add(size)
		}
	}
	return nil
}

func some(names []string) string {
	if len(names) > shownMissing {
		return strings.Join(names[:shownMissing], ", ") + ", …"
	}
	return strings.Join(names, ", ")
}

// choosePacks settles the fate of every pack, as restic does: what is wholly
// unused goes; of what is partly used, trees first, then small packs, then those
// with most to gain, until little enough stays unused.
func (p *plan) choosePacks() {
	small := p.packSize / 25
	if p.opts.SmallPack > 0 {
		small = p.opts.SmallPack
	} else if p.opts.RepackSmall {
		small = p.packSize / 5 * 4
	}
	var candidates, smallOnes []int
	for i := range p.packs {
		x := &p.packs[i]
		if x.fate == forget {
			continue
		}
		switch {
		case x.used == 0:
			p.sum.PacksUnused++
		case x.unused == 0:
			p.sum.PacksUsed++
		default:
			p.sum.PacksPartlyUsed++
		}
		if x.uncompressed {
			p.sum.Uncompressed += x.size()
		}
		switch {
		case x.used == 0:
			x.fate = remove
			p.sum.PacksRemoved++
			p.sum.Removed.Count += int64(x.unused)
			p.sum.Removed.Bytes += x.unusedBytes
			p.sum.BytesAfter -= x.size()
			if x.uncompressed {
				p.sum.Uncompressed -= x.size()
			}
		case p.opts.RepackCacheableOnly && x.bulk():
		case x.unused == 0 && !x.mixed() && !p.mustCompress(x):
			if x.size() < small {
				smallOnes = append(smallOnes, i)
			}
		default:
			candidates = append(candidates, i)
		}
	}
	if len(smallOnes) >= smallPacks {
		candidates = append(candidates, smallOnes...)
	}
	p.repackSome(candidates, small)
	p.sum.BytesAfter += p.sum.BytesBefore - p.sum.PacksUnindexed.Bytes - p.sum.RepackedRm.Bytes
	p.sum.UnusedAfter = p.unusedNow()
	for i := range p.packs {
		switch p.packs[i].fate {
		case keep:
			p.sum.PacksKept++
		case repack:
			p.sum.PacksRepacked++
		}
	}
}

func (p *plan) mustCompress(x *packInfo) bool {
	return x.uncompressed && (x.treesOnly() || p.opts.RepackUncompressed)
}

func (p *plan) unusedNow() int64 {
	return p.sum.Duplicate.Bytes + p.sum.Unused.Bytes - p.sum.Removed.Bytes - p.sum.RepackedRm.Bytes
}

func (p *plan) repackSome(candidates []int, small int64) {
	ids := p.catalog.Packs()
	rank := func(x *packInfo) int {
		switch {
		case !x.bulk():
			return 0
		case x.size() < small:
			return 1
		}
		return 2
	}
	slices.SortFunc(candidates, func(i, j int) int {
		a, b := &p.packs[i], &p.packs[j]
		// unused/used, the larger first, without a division.
		return cmp.Or(cmp.Compare(rank(a), rank(b)),
			-cmp.Compare(float64(a.unusedBytes)*float64(b.usedBytes), float64(b.unusedBytes)*float64(a.usedBytes)),
			ids[i].Compare(ids[j]))
	})
	allowed := int64(0)
	if p.opts.MaxUnused != nil {
		allowed = p.opts.MaxUnused(p.sum.Used.Bytes)
	}
	limit := p.opts.MaxRepack
	if limit == 0 {
		limit = math.MaxInt64
	}
	for _, i := range candidates {
		x := &p.packs[i]
		switch {
		case p.sum.Repacked.Bytes+x.size() >= limit:
			continue
		case !x.bulk() || p.mustCompress(x):
		case p.unusedNow() < allowed && x.size() >= small:
			continue
		}
		x.fate = repack
		p.sum.Repacked.Count += int64(x.used) + int64(x.unused)
		p.sum.Repacked.Bytes += x.size()
		p.sum.RepackedRm.Count += int64(x.unused)
		p.sum.RepackedRm.Bytes += x.unusedBytes
		if x.uncompressed && p.mustCompress(x) {
			p.sum.Uncompressed -= x.size()
		}
	}
}

// move is blobs of one pack that go to new packs.
type move struct {
	pack  repo.ID
	blobs []repo.BlobLocation
	bytes int64
}

// moves lists what is used of the packs that are packed anew and in no pack that
// stays. meta gets the blobs that are small metadata.
func (p *plan) moves(ctx context.Context) (moves []*move, meta map[repo.ID]bool, err error) {
	byPack := map[int32]*move{}
	meta = map[repo.ID]bool{}
	err = p.catalog.EachBlob(ctx, func(h repo.BlobHandle, places []repo.Place) error {
		if !p.marks.used.Has(places[0].Position) {
			return nil
		}
		stays := slices.ContainsFunc(places, func(at repo.Place) bool { return p.packs[at.Pack].fate == keep })
		if stays {
			return nil
		}
		i := slices.IndexFunc(places, func(at repo.Place) bool { return p.chosen.Has(at.Position) })
		if i < 0 || p.packs[places[i].Pack].fate != repack {
			return fmt.Errorf("%s would be lost: this is a fault of the program, nothing was deleted", h)
		}
		at := places[i]
		m := byPack[at.Pack]
		if m == nil {
			m = &move{pack: p.catalog.Packs()[at.Pack]}
			byPack[at.Pack] = m
			moves = append(moves, m)
		}
		m.blobs = append(m.blobs, at.Blob(h))
		m.bytes += int64(at.Length)
		if h.Type == repo.DataBlob && p.marks.meta.Has(places[0].Position) {
			meta[h.ID] = true
		}
		return nil
	})
	return moves, meta, err
}

// gone are the packs that are deleted at the end, and those that the new index
// does not list.
func (p *plan) gone() (packs []repo.ID, unlisted map[repo.ID]bool) {
	unlisted = map[repo.ID]bool{}
	for i, id := range p.catalog.Packs() {
		switch p.packs[i].fate {
		case remove, repack:
			packs = append(packs, id)
			unlisted[id] = true
		case forget:
			unlisted[id] = true
		}
	}
	return packs, unlisted
}
