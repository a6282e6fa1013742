// SPDX-License-Identifier: BSD-2-Clause

package snapshot

import (
	"context"
	"fmt"
	"slices"

	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/snapshot/layer"
)

// maxLayers bounds what a restore merges.
const maxLayers = 16

// link is a layer of the chain that a snapshot will have. Its weight is about
// the bytes of metadata that merging it writes again.
type link struct {
	name string
	tree repo.ID
}

// chain is a list of layers, oldest first, that is to be kept short.
type chain struct {
	from  layer.Loader
	links []link
	// merge makes one layer of some, or of what the oldest of them still gives if left is
	// set, and returns how many bytes of the device it describes.
	merge func(ctx context.Context, links []link, left bool) (tree *repo.ID, holds int64, err error)
	// forward makes another layer, or none, to be merged on top of the newest
	// ones that it is given.
	forward func(ctx context.Context, links []link) (*repo.ID, error)
}

// lookBack is how far forward looks: at the newest layers that have so many
// times the metadata of the very newest one. So what it reads follows the
// change as well.
const lookBack = 64

// lookForward has forward look at the newest layers.
func (c *chain) lookForward(ctx context.Context) (*repo.ID, error) {
	if c.forward == nil || len(c.links) < 2 {
		return nil, nil
	}
	from := len(c.links) - 1
	own, err := c.weight(ctx, c.links[from], 1<<62)
	if err != nil {
		return nil, err
	}
	for left := (lookBack - 1) * own; from > 0; from-- {
		w, err := c.weight(ctx, c.links[from-1], left)
		if err != nil {
			return nil, err
		}
		if left -= w; left < 0 {
			break
		}
	}
	if from == len(c.links)-1 {
		return nil, nil
	}
	return c.forward(ctx, c.links[from:])
}

// joinLightest merges the two neighbours that weigh least together, but for those that
// are to stay apart, of which it is told the first.
func (c *chain) joinLightest(ctx context.Context, apart func(i int) bool) error {
	best, at, before := int64(1)<<62, -1, int64(0)
	for i, l := range c.links {
		w, err := c.weight(ctx, l, best)
		if err != nil {
			return err
		}
		if i > 0 && before+w < best && !apart(i-1) {
			best, at = before+w, i-1
		}
		before = w
	}
	if at < 0 {
		return fmt.Errorf("merge layers: %d of them stay apart: this is a fault of the program", len(c.links))
	}
	_, err := c.replace(ctx, at, at+2)
	return err
}

// replace puts one layer in the place of those from i to before j, under the name of the
// newest of them.
func (c *chain) replace(ctx context.Context, i, j int) (holds int64, err error) {
	tree, holds, err := c.merge(ctx, c.links[i:j], false)
	if err != nil {
		return 0, err
	}
	var with []link
	if tree != nil {
		with = []link{{c.links[j-1].name, *tree}}
	}
	c.links = slices.Replace(c.links, i, j, with...)
	return holds, nil
}

// weight is the size of a layer's metadata in bytes. It stops looking once that
// is more than limit.
func (c *chain) weight(ctx context.Context, l link, limit int64) (sum int64, err error) {
	parts, err := c.from.LoadTree(ctx, l.tree)
	if err != nil {
		return 0, fmt.Errorf("weigh layer %s: %w", l.name, err)
	}
	for _, p := range parts.Nodes {
		if sum > limit || p.Subtree == nil {
			break
		}
		files, err := c.from.LoadTree(ctx, *p.Subtree)
		if err != nil {
			return 0, fmt.Errorf("weigh layer %s: %w", l.name, err)
		}
		sum += layer.Weight(files)
	}
	return sum, nil
}

// saveLayers adds the new layer, if any, to those of the parent, and keeps the
// chain short.
func (b *backup) saveLayers(ctx context.Context, added *repo.ID) (repo.ID, int, error) {
	tree := &repo.Tree{}
	if b.parent != nil {
		old, err := b.store.LoadTree(ctx, b.parent.Manifest.Layers)
		if err != nil {
			return repo.ID{}, 0, fmt.Errorf("read the layers of snapshot %s: %w", b.parent.Snapshot.Str(), err)
		}
		tree.Nodes = slices.Clone(old.Nodes)
		b.generations = b.parent.Manifest.Generations
	}
	if added != nil {
		name, err := layer.NextName(tree)
		if err != nil {
			return repo.ID{}, 0, err
		}
		node := layer.DirNode(name, *added, b.Time)
		tree.Nodes = append(tree.Nodes, node)
		if err := b.shorten(ctx, tree); err != nil {
			return repo.ID{}, 0, err
		}
		if len(tree.Nodes) > 0 && tree.Nodes[len(tree.Nodes)-1] == node {
			// Not merged into another one.
			if err := b.stage.keep(ctx, *added); err != nil {
				return repo.ID{}, 0, err
			}
		}
	}
	saved, err := b.w.SaveTree(ctx, tree)
	return saved.ID, len(tree.Nodes), err
}

// shorten merges layers of a tree, of which the last may still be staged.
func (b *backup) shorten(ctx context.Context, tree *repo.Tree) error {
	if len(tree.Nodes) < 2 {
		return nil
	}
	if err := b.stage.loadable(ctx); err != nil {
		return err
	}
	c := &generational{chain: &chain{from: b.stage, merge: b.merge, forward: b.forward}, size: b.Device.Size(), own: b.changed}
	if g := b.parent.Manifest.Generations; g != nil {
		c.gens = *g
	}
	for _, n := range tree.Nodes {
		if n.Subtree == nil {
			return fmt.Errorf("%w: %q is not a layer", layer.ErrDamaged, n.Name)
		}
		c.links = append(c.links, link{n.Name, *n.Subtree})
	}
	if err := c.shorten(ctx); err != nil {
		return err
	}
	b.generations = &c.gens
	nodes := map[string]*repo.Node{}
	for _, n := range tree.Nodes {
		nodes[n.Name] = n
	}
	tree.Nodes = nil
	for _, l := range c.links {
		n := nodes[l.name]
		if *n.Subtree != l.tree {
			n = layer.DirNode(l.name, l.tree, b.Time)
		}
		tree.Nodes = append(tree.Nodes, n)
	}
	return nil
}

// merge stores one layer for several, or what is left of the oldest of them, and counts
// apart what that took.
func (b *backup) merge(ctx context.Context, links []link, left bool) (*repo.ID, int64, error) {
	before := b.w.Stats()
	layers, err := b.openLinks(ctx, links)
	if err != nil {
		return nil, 0, err
	}
	res, err := layer.Merge(ctx, keeper{b.stage}, b.stage, layers, layer.MergeOptions{Size: b.Device.Size(), Time: b.Time, Left: left})
	if err != nil {
		return nil, 0, err
	}
	// What the next merge of this run reads has to be loadable.
	if err := b.w.Flush(ctx); err != nil {
		return nil, 0, err
	}
	after := b.w.Stats()
	b.sum.MergeAddedPacked += after.Meta.StoredBytes + after.Tree.StoredBytes + after.IndexBytes -
		before.Meta.StoredBytes - before.Tree.StoredBytes - before.IndexBytes
	return res.Tree, res.DirtyBytes, nil
}

// openLinks opens layers, oldest first.
func (b *backup) openLinks(ctx context.Context, links []link) (out []*layer.Layer, err error) {
	for i, l := range links {
		opened, err := layer.OpenTree(ctx, b.stage, uint64(i), l.tree)
		if err != nil {
			return nil, fmt.Errorf("open layers: %w", err)
		}
		out = append(out, opened)
	}
	return out, nil
}
