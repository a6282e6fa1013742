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
	merge func(ctx context.Context, links []link) (*repo.ID, error)
	// forward makes another layer, or none, to be merged on top of the newest
	// ones that it is given.
	forward func(ctx context.Context, links []link) (*repo.ID, error)
}

// lookBack is how far forward looks: at the newest layers that have so many
// times the metadata of the very newest one. So what it reads follows the
// change as well.
const lookBack = 64

// shorten merges the newest layers as long as the next older one is not much
// heavier than they are together, so that each block's metadata is written again
// only a logarithmic number of times; and then, if there still are too many,
// the lightest neighbours.
func (c *chain) shorten(ctx context.Context) error {
	first := len(c.links) - 1
	var sum int64
	for i := first; i >= 0; i-- {
		limit := int64(1) << 62
		if i < len(c.links)-1 {
			limit = 2 * sum
		}
		w, err := c.weight(ctx, c.links[i], limit)
		if err != nil {
			return err
		}
		if w > limit {
			break
		}
		sum, first = sum+w, i
	}
	run := c.links[first:]
	top, err := c.lookForward(ctx, first)
	if err != nil {
		return err
	}
	if top != nil {
		run = append(slices.Clone(run), link{run[len(run)-1].name, *top})
	}
	if err := c.replace(ctx, first, len(c.links), run); err != nil {
		return err
	}
	for len(c.links) > maxLayers {
		if err := c.joinLightest(ctx); err != nil {
			return err
		}
	}
	return nil
}

// lookForward has forward look at the newest layers, those from first on among
// them.
func (c *chain) lookForward(ctx context.Context, first int) (*repo.ID, error) {
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
	if from = min(from, first); from == len(c.links)-1 {
		return nil, nil
	}
	return c.forward(ctx, c.links[from:])
}

// joinLightest merges the two neighbours that weigh least together.
func (c *chain) joinLightest(ctx context.Context) error {
	best, at, before := int64(1)<<62, 0, int64(0)
	for i, l := range c.links {
		w, err := c.weight(ctx, l, best)
		if err != nil {
			return err
		}
		if i > 0 && before+w < best {
			best, at = before+w, i-1
		}
		before = w
	}
	return c.replace(ctx, at, at+2, c.links[at:at+2])
}

// replace puts one layer, made of a run of them, in the place of those from i to
// before j, under the name of the newest of them.
func (c *chain) replace(ctx context.Context, i, j int, run []link) error {
	if len(run) < 2 {
		return nil
	}
	tree, err := c.merge(ctx, run)
	if err != nil {
		return err
	}
	var with []link
	if tree != nil {
		with = []link{{c.links[j-1].name, *tree}}
	}
	c.links = slices.Replace(c.links, i, j, with...)
	return nil
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
	c := &chain{from: b.stage, merge: b.merge, forward: b.forward}
	for _, n := range tree.Nodes {
		if n.Subtree == nil {
			return fmt.Errorf("%w: %q is not a layer", layer.ErrDamaged, n.Name)
		}
		c.links = append(c.links, link{n.Name, *n.Subtree})
	}
	if err := c.shorten(ctx); err != nil {
		return err
	}
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

// merge stores one layer for several, and counts what that took apart.
func (b *backup) merge(ctx context.Context, links []link) (*repo.ID, error) {
	before := b.w.Stats()
	layers, err := b.openLinks(ctx, links)
	if err != nil {
		return nil, err
	}
	res, err := layer.Merge(ctx, keeper{b.stage}, b.stage, layers, layer.MergeOptions{Size: b.Device.Size(), Time: b.Time})
	if err != nil {
		return nil, err
	}
	// What the next merge of this run reads has to be loadable.
	if err := b.w.Flush(ctx); err != nil {
		return nil, err
	}
	after := b.w.Stats()
	b.sum.MergeAddedPacked += after.Meta.StoredBytes + after.Tree.StoredBytes + after.IndexBytes -
		before.Meta.StoredBytes - before.Tree.StoredBytes - before.IndexBytes
	return res.Tree, nil
}

// openLinks opens layers, oldest first.
func (b *backup) openLinks(ctx context.Context, links []link) (out []*layer.Layer, err error) {
	for i, l := range links {
		opened, err := layer.OpenTree(ctx, b.stage, uint64(i), l.tree)
		if err != nil {
			return nil, fmt.Errorf("merge layers: %w", err)
		}
		out = append(out, opened)
	}
	return out, nil
}
