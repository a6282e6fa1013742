// SPDX-License-Identifier: BSD-2-Clause

package restore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/snapshot"
	"github.com/dsync-backup/dsync-backup/snapshot/layer"
)

const (
	// statPacks is how many packs are asked for one by one; beyond it the
	// store lists all that it has.
	statPacks = 2000
	// rememberedBlobs bounds what a walk remembers, so as not to look up a
	// blob again for each of its scattered blocks.
	rememberedBlobs = 1 << 16
)

// chain is the layers of a snapshot's device.
type chain struct {
	store  snapshot.Store
	device snapshot.Device
	layers []*layer.Layer
	absent map[repo.ID]int64 // size of the packs that are needed and cut; -1 if one is missing
}

// openChain opens the layers, those that can be read where some are damaged: what is lost by
// that, check tells.
func openChain(ctx context.Context, store snapshot.Store, d snapshot.Device) (*chain, error) {
	layers, err := layer.OpenDamaged(ctx, store, d.Manifest.Layers, isDamage)
	if err != nil {
		return nil, err
	}
	return &chain{store: store, device: d, layers: layers}, nil
}

// openWhole opens the layers, and any damage to them is an error, here or on the way.
func openWhole(ctx context.Context, store snapshot.Store, d snapshot.Device) (*chain, error) {
	layers, err := layer.Open(ctx, store, d.Manifest.Layers)
	if err != nil {
		return nil, err
	}
	return &chain{store: store, device: d, layers: layers}, nil
}

func (c *chain) size() int64 { return c.device.Manifest.Size }

func (c *chain) merger() *layer.Merger { return layer.NewMerger(c.store, c.layers, c.size()) }

// sums is what a compare scan expects.
func (c *chain) sums(ctx context.Context) *layer.Sums {
	return layer.NewSums(ctx, c.store, c.layers, c.size(), c.size())
}

// segment is a range of the device that one blob gives, from its byte in on.
// at is its place among the data of its window.
type segment struct {
	off, length int64
	in, at      int64
}

func (s segment) extent() kernel.Extent { return kernel.Extent{Offset: s.off, Length: s.length} }

// segments cuts a piece that has data at the borders of blobs.
func segments(p layer.Piece, fn func(repo.ID, segment) error) error {
	off, data, left := p.Offset, p.Data, p.Length
	for left > 0 {
		blob, in, n := p.Part.Data.Locate(data)
		n = min(n, left)
		if err := fn(p.Part.Data.Blobs[blob], segment{off: off, length: n, in: in}); err != nil {
			return err
		}
		off, data, left = off+n, data+n, left-n
	}
	return nil
}

// walk calls fn for every segment of the device, once for a blob's neighbouring
// segments as far as it remembers, and missing for what no layer has, and why.
func (c *chain) walk(ctx context.Context, once bool, fn func(repo.ID, segment) error, missing func(kernel.Extent, error)) error {
	m := c.merger()
	seen := map[repo.ID]bool{}
	for {
		p, err := m.Next(ctx)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if p.Missing {
			missing(kernel.Extent{Offset: p.Offset, Length: p.Length}, whyMissing(p))
		}
		if p.Missing || p.Zero {
			continue
		}
		err = segments(p, func(id repo.ID, s segment) error {
			if once {
				if seen[id] {
					return nil
				}
				if len(seen) == rememberedBlobs {
					clear(seen)
				}
				seen[id] = true
			}
			return fn(id, s)
		})
		if err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
	}
}

// check finds all damage that shows without reading data: a layer or a part that does not
// open, a range that no layer has, a blob that is in no index, a pack that is
// not in the store or too short. It reads the chain's indexes, asks the store
// for its packs, and fetches no data. Damage is a [DamageError]. Sums are not looked at.
func (c *chain) check(ctx context.Context) error {
	packs := map[repo.ID]int64{} // the least size that each must have
	gone, cause := rangeSet{size: c.size()}, error(nil)
	lose := func(e kernel.Extent, why error) {
		if gone.add(e); cause == nil {
			cause = why
		}
	}
	unlisted := false
	err := c.walk(ctx, true, func(id repo.ID, _ segment) error {
		places := c.store.Locations(dataBlob(id))
		unlisted = unlisted || len(places) == 0
		for _, l := range places {
			packs[l.Pack] = max(packs[l.Pack], int64(l.Offset)+int64(l.Length))
		}
		return nil
	}, lose)
	if err != nil {
		return err
	}
	if c.absent, err = absentPacks(ctx, c.store.Backend(), packs); err != nil {
		return err
	}
	if unlisted || len(c.absent) > 0 {
		err := c.walk(ctx, false, func(id repo.ID, s segment) error {
			if len(c.locations(id)) == 0 { // no other copy either
				lose(s.extent(), c.whyLost(id))
			}
			return nil
		}, func(kernel.Extent, error) {})
		if err != nil {
			return err
		}
	}
	if r := gone.list(); len(r) > 0 {
		return &DamageError{r, cause}
	}
	return nil
}

func (c *chain) whyLost(id repo.ID) error {
	if all := c.store.Locations(dataBlob(id)); len(all) > 0 {
		return fmt.Errorf("pack %s, which the index lists, is missing or too short", all[0].Pack.Str())
	}
	return fmt.Errorf("blob %s is in no index", id.Str())
}

// locations is where a blob can be fetched from.
func (c *chain) locations(id repo.ID) []repo.Location {
	all := c.store.Locations(dataBlob(id))
	if len(c.absent) == 0 {
		return all
	}
	good := all[:0]
	for _, l := range all {
		if size, cut := c.absent[l.Pack]; !cut || int64(l.Offset)+int64(l.Length) <= size {
			good = append(good, l)
		}
	}
	return good
}

// errMissing is why a range that no layer describes cannot be given.
var errMissing = errors.New("no layer has them")

// whyMissing is why a piece that is missing is.
func whyMissing(p layer.Piece) error {
	if p.Lost != nil {
		return p.Lost
	}
	return errMissing
}

func dataBlob(id repo.ID) repo.BlobHandle { return repo.BlobHandle{Type: repo.DataBlob, ID: id} }

// absentPacks finds those packs that the store does not have in the size that
// the index asks for, and their size; -1 if it does not have them at all.
func absentPacks(ctx context.Context, be backend.Backend, packs map[repo.ID]int64) (map[repo.ID]int64, error) {
	absent := map[repo.ID]int64{}
	if len(packs) > statPacks {
		for id := range packs {
			absent[id] = -1
		}
		err := be.List(ctx, backend.PackFile, func(fi backend.FileInfo) error {
			id, err := repo.ParseID(fi.Name)
			if want, ok := packs[id]; err != nil || !ok {
				return nil //nolint:nilerr // none of ours
			} else if fi.Size < want {
				absent[id] = fi.Size
			} else {
				delete(absent, id)
			}
			return nil
		})
		if err != nil {
			return nil, fmt.Errorf("look whether all packs are there: %w", err)
		}
		return absent, nil
	}
	var mu sync.Mutex
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(max(1, be.Connections()))
	for id, size := range packs {
		g.Go(func() error {
			fi, err := be.Stat(ctx, backend.Handle{Type: backend.PackFile, Name: id.String()})
			if err != nil && !errors.Is(err, backend.ErrNotExist) {
				return fmt.Errorf("look whether pack %s is there: %w", id.Str(), err)
			}
			if err != nil {
				fi.Size = -1
			}
			if fi.Size < size {
				mu.Lock()
				defer mu.Unlock()
				absent[id] = fi.Size
			}
			return nil
		})
	}
	return absent, g.Wait()
}
