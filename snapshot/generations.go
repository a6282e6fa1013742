// SPDX-License-Identifier: BSD-2-Clause

package snapshot

import (
	"context"
	"fmt"
	"slices"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/snapshot/layer"
)

// Generations say which layers of a chain hold what was written lately
// (docs/format.md). A chain is, oldest layer first: those that have come to rest, the older
// generation, the newer one, and the recent layers of single backups or of a few.
// Either generation may be missing; they are called by the names of their layers.
type Generations struct {
	Older string `json:"older,omitempty"`
	Newer string `json:"newer,omitempty"`
	// Written is how many bytes were written, and written again, since the newer
	// generation began.
	Written int64 `json:"written"`
}

const (
	// foldFactor: the recent layers are folded into the generations once these are
	// not more than so many times as heavy. What they overrode is named until then.
	foldFactor = 4
	// A generation is over once what was written in it is agePercent of what it
	// holds, or it holds agePart of the device.
	agePercent = 250
	agePart    = 4
)

// young is where the layers of what was written lately begin: the first of the
// generations, or of the recent ones.
func (g Generations) young(names []string) int {
	older, newer := slices.Index(names, g.Older), slices.Index(names, g.Newer)
	switch {
	case older >= 0:
		return older
	case newer >= 0:
		return newer
	}
	return len(names)
}

// recent is where the recent layers begin.
func (g Generations) recent(names []string) int {
	return max(slices.Index(names, g.Older), slices.Index(names, g.Newer)) + 1
}

// generational is a chain whose newest layers are kept in generations.
type generational struct {
	*chain
	gens Generations
	size int64 // of the device
	own  int64 // bytes that the newest layer describes
}

// shorten takes in the newest layer: it merges it with others, and with what forward
// makes, as they ask for.
func (c *generational) shorten(ctx context.Context) error {
	first := c.firstRecent()
	c.gens.Written += c.own
	fold, err := c.ripe(ctx, first)
	if err != nil {
		return err
	}
	top, err := c.lookForward(ctx)
	if err != nil {
		return err
	}
	least := 1
	if top != nil {
		// It belongs to the same backup, and is merged with its layer in any case.
		c.links, least = append(c.links, link{c.links[len(c.links)-1].name, *top}), 2
	}
	if fold {
		err = c.fold(ctx, first)
	} else {
		err = c.join(ctx, first, len(c.links), least)
	}
	if err != nil {
		return err
	}
	for len(c.links) > maxLayers {
		if err := c.joinLightest(ctx, c.apart()); err != nil {
			return err
		}
	}
	return nil
}

func (c *generational) names() []string { return linkNames(c.links) }

func linkNames(links []link) []string {
	names := make([]string, len(links))
	for i, l := range links {
		names[i] = l.name
	}
	return names
}

// firstRecent is where the recent layers begin. Of a chain without generations, as older
// versions wrote them, only the newest layer is one.
func (c *generational) firstRecent() int {
	first := c.gens.recent(c.names())
	if first == 0 {
		c.gens = Generations{}
		return len(c.links) - 1
	}
	return first
}

// ripe reports whether the layers from first on are heavy enough to be folded.
func (c *generational) ripe(ctx context.Context, first int) (bool, error) {
	recent, err := c.sum(ctx, first, len(c.links), 1<<60)
	if err != nil {
		return false, err
	}
	young, err := c.sum(ctx, min(c.gens.young(c.names()), first), first, foldFactor*recent)
	return young <= foldFactor*recent, err
}

// sum is the weight of some links, or more than limit.
func (c *generational) sum(ctx context.Context, from, to int, limit int64) (sum int64, err error) {
	for _, l := range c.links[from:to] {
		w, err := c.weight(ctx, l, limit)
		if err != nil {
			return 0, err
		}
		if sum += w; sum > limit {
			break
		}
	}
	return sum, nil
}

// fold makes the layers from first on a part of the newer generation, leaves of the
// older one what they do not override, and begins another generation if it is time.
func (c *generational) fold(ctx context.Context, first int) error {
	if i := slices.Index(c.names(), c.gens.Newer); i >= 0 {
		first = i
	}
	if i := slices.Index(c.names(), c.gens.Older); i >= 0 {
		left, _, err := c.merge(ctx, c.links[i:], true)
		if err != nil {
			return err
		}
		if left != nil {
			c.links[i].tree = *left
		} else {
			c.links, c.gens.Older = slices.Delete(c.links, i, i+1), ""
			first--
		}
	}
	holds := c.own
	if last := len(c.links); last-first > 1 {
		var err error
		if holds, err = c.replace(ctx, first, last); err != nil {
			return err
		}
		if len(c.links) == first { // nothing is left of it: the device has shrunk
			c.gens.Newer = ""
			return nil
		}
	}
	c.gens.Newer = c.links[first].name
	if c.gens.Written*100 < holds*agePercent && holds*agePart < c.size {
		return nil
	}
	// What is left of the older generation has come to rest.
	rest := slices.Index(c.names(), c.gens.Older) + 1
	c.gens = Generations{Older: c.gens.Newer}
	if rest == 0 {
		return nil
	}
	return c.join(ctx, 0, rest, 1)
}

// join merges the newest of some neighbours, least of them at least, as long as the
// next older one is not much heavier than they are together, so that each block's
// metadata is written again only a logarithmic number of times.
func (c *generational) join(ctx context.Context, from, to, least int) error {
	first := to - 1
	var sum int64
	for i := first; i >= from; i-- {
		limit := int64(1) << 62
		if i < to-least {
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
	if to-first < 2 {
		return nil
	}
	_, err := c.replace(ctx, first, to)
	return err
}

// apart reports whether two neighbours are not to be joined, the older one at i.
func (c *generational) apart() func(i int) bool {
	names := c.names()
	recent := c.gens.recent(names)
	rest := min(c.gens.young(names), recent)
	return func(i int) bool { return i >= rest-1 && i < recent }
}

// write stores a layer of this backup: scattered blocks with others of their age.
func (b *backup) write(ctx context.Context, to layer.Saver, o layer.Options) (_ layer.Result, err error) {
	if o.Ages, err = b.openAges(ctx); err != nil {
		return layer.Result{}, err
	}
	return layer.Write(ctx, to, o)
}

// openAges opens the layers that tell the ages of what was there before this backup: the
// newest ones as long as they have no more than so many times the metadata that the change
// will have, so that looking at them follows the change. It is nil if there are none.
func (b *backup) openAges(ctx context.Context) (*layer.Ages, error) {
	if b.parent == nil || b.parent.Manifest.Generations == nil {
		return nil, nil
	}
	tree, err := b.store.LoadTree(ctx, b.parent.Manifest.Layers)
	if err != nil {
		return nil, fmt.Errorf("read the layers of snapshot %s: %w", b.parent.Snapshot.Str(), err)
	}
	c := &generational{chain: &chain{from: b.store}}
	for _, n := range tree.Nodes {
		if n.Subtree == nil {
			return nil, fmt.Errorf("%w: %q is not a layer", layer.ErrDamaged, n.Name)
		}
		c.links = append(c.links, link{n.Name, *n.Subtree})
	}
	from := len(c.links)
	left := lookBack * blockWeight * (b.total/kernel.BlockSize + 1)
	for young := b.parent.Manifest.Generations.young(c.names()); from > young; from-- {
		w, err := c.weight(ctx, c.links[from-1], left)
		if err != nil {
			return nil, err
		}
		if left -= w; left < 0 {
			break
		}
	}
	if from == len(c.links) {
		return nil, nil
	}
	layers, err := b.openLinks(ctx, c.links[from:])
	if err != nil {
		return nil, err
	}
	return b.ages(c.links[from:], layers, b.total), nil
}

// ages has the ages from some links, the newest of a chain, as they were opened. It is nil if
// the chain has no generations. For total bytes, if these are few, the older generation is as
// the newer one: a small blob more compresses noticeably worse.
func (b *backup) ages(links []link, layers []*layer.Layer, total int64) *layer.Ages {
	g := b.parent.Manifest.Generations
	if g == nil || g.Older == "" && g.Newer == "" {
		return nil
	}
	names, from := linkNames(links), b.settled(links)
	return layer.NewAges(b.stage, layers[from:], names[from] == g.Older && total >= threeAges, b.Device.Size())
}

// settled is how many of some links, the newest of the chain, hold what has settled. It is 0
// if the chain has no generations.
func (b *backup) settled(links []link) int {
	g := b.parent.Manifest.Generations
	if g == nil {
		return 0
	}
	n := g.young(linkNames(links))
	if n == len(links) {
		return 0 // the look does not go back to the generations: nothing has settled
	}
	return n
}

// threeAges is from how many bytes on three kinds of blobs are worth their while.
const threeAges = 4 << 20

// blockWeight is about how many bytes of metadata a scattered block has.
const blockWeight = 13
