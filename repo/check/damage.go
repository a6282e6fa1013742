// SPDX-License-Identifier: BSD-2-Clause

package check

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"

	"github.com/dsync-backup/dsync-backup/repo"
)

// Damage answers what is damaged, and what that touches.
type Damage struct {
	repo    *repo.Repository
	catalog *repo.Catalog

	mu     sync.Mutex
	packs  map[repo.ID]packDamage
	places map[place]error // blobs that were read and are bad
	trees  map[repo.ID]error

	bad *repo.Bits // by the first position of the blob: there is no good copy
	any bool
}

// packDamage is a pack that is missing (size -1) or not of its size.
type packDamage struct {
	size int64
	text string
}

// place is a blob in a pack.
type place struct {
	pack   repo.ID
	offset uint32
}

// Close frees what Damage holds. It then answers nothing any more.
func (d *Damage) Close() error { return d.catalog.Close() }

// Any reports whether anything is damaged that a snapshot may need.
func (d *Damage) Any() bool { return d.any || len(d.trees) > 0 }

func (d *Damage) badTree(id repo.ID, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.trees == nil {
		d.trees = map[repo.ID]error{}
	}
	d.trees[id] = err
}

// at says why a place does not give its blob, or nil.
func (d *Damage) at(id repo.ID, offset, length uint32) error {
	if p, ok := d.packs[id]; ok && (p.size < 0 || int64(offset)+int64(length) > p.size) {
		return errors.New(p.text)
	}
	return d.places[place{id, offset}]
}

// spread finds the blobs of which no good copy is left.
func (d *Damage) spread(ctx context.Context) error {
	if d.bad == nil {
		d.bad = repo.NewBits(d.catalog.Len())
	}
	if len(d.packs) == 0 && len(d.places) == 0 {
		return nil
	}
	ids := d.catalog.Packs()
	return d.catalog.EachBlob(ctx, func(_ repo.BlobHandle, places []repo.Place) error {
		for _, p := range places {
			if d.at(ids[p.Pack], p.Offset, p.Length) == nil {
				return nil
			}
		}
		d.any = true
		d.bad.Set(places[0].Position)
		return nil
	})
}

// Blob says why a blob cannot be had, or nil.
func (d *Damage) Blob(h repo.BlobHandle) error {
	at, ok, err := d.catalog.Find(h)
	if err != nil {
		return err
	}
	if !ok {
		return fmt.Errorf("%s is in no index", h)
	}
	if !d.bad.Has(at) {
		return nil
	}
	for _, l := range d.repo.Locations(h) {
		if err := d.at(l.Pack, l.Offset, l.Length); err != nil {
			return err
		}
	}
	return fmt.Errorf("%s is damaged", h)
}

// Touched walks the snapshots and says which of them need something that is
// damaged. It visits every tree once.
func (d *Damage) Touched(ctx context.Context, snapshots map[repo.ID]*repo.Snapshot) (map[repo.ID]error, error) {
	out := map[repo.ID]error{}
	if !d.Any() {
		return out, nil
	}
	w := &toucher{d, map[repo.ID]error{}}
	for id, s := range snapshots {
		why, err := w.tree(ctx, *s.Tree)
		if err != nil {
			return nil, err
		}
		if why != nil {
			out[id] = why
		}
	}
	return out, nil
}

// toucher remembers of each tree whether it needs something that is damaged.
type toucher struct {
	*Damage
	known map[repo.ID]error
}

func (w *toucher) tree(ctx context.Context, id repo.ID) (why, err error) {
	why, ok := w.known[id]
	if ok {
		return why, nil
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	why, err = w.look(ctx, id)
	if err == nil {
		w.known[id] = why
	}
	return why, err
}

func (w *toucher) look(ctx context.Context, id repo.ID) (why, err error) {
	if bad := w.trees[id]; bad != nil {
		return bad, nil
	}
	if bad := w.Blob(treeBlob(id)); bad != nil {
		return bad, nil
	}
	data, err := w.repo.LoadBlob(ctx, treeBlob(id), repo.KindTree)
	if err != nil {
		if repo.IsDamage(err) {
			return err, nil
		}
		return nil, err
	}
	var t struct {
		Nodes []struct {
			Content []repo.ID `json:"content"`
			Subtree *repo.ID  `json:"subtree"`
		} `json:"nodes"`
	}
	if err := json.Unmarshal(data, &t); err != nil {
		return err, nil //nolint:nilerr // that is the damage
	}
	for _, n := range t.Nodes {
		for _, blob := range n.Content {
			if bad := w.Blob(dataBlob(blob)); bad != nil && why == nil {
				why = bad
			}
		}
		if n.Subtree != nil {
			below, err := w.tree(ctx, *n.Subtree)
			if err != nil {
				return nil, err
			}
			if why == nil {
				why = below
			}
		}
	}
	return why, nil
}
