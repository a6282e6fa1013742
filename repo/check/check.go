// SPDX-License-Identifier: BSD-2-Clause

package check

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/repo/pack"
)

// The phases that progress tells of.
const (
	PhaseTrees = "checking trees"
	PhaseData  = "reading packs"
)

// Problem is one thing that is not as it should be.
type Problem struct {
	Kind    string  `json:"kind"` // key, index, pack, blob, snapshot or tree
	ID      repo.ID `json:"id"`
	Message string  `json:"message"`
	// Harmless problems cost space or time, and no data.
	Harmless bool `json:"harmless,omitempty"`
}

func (p Problem) String() string { return fmt.Sprintf("%s %s: %s", p.Kind, p.ID.Str(), p.Message) }

// Options say how to check.
type Options struct {
	ReadData Subset        // packs to read from end to end; the zero value reads none
	Report   func(Problem) // may be called from many goroutines, but one at a time
	Progress func(phase string, done, total int64)
}

// Result says what was found, and answers what is damaged.
type Result struct {
	Errors             int
	Packs, PacksRead   int       // in the index and the store, and those that were read from end to end
	BrokenPacks        []repo.ID // whose bytes are bad
	SuggestRepairIndex bool
	SuggestPrune       bool
	Snapshots          map[repo.ID]*repo.Snapshot
	Unread             []repo.ID // snapshots of which nothing can be had
	Damage             *Damage
}

// checker is one run.
type checker struct {
	Options
	repo    *repo.Repository
	catalog *repo.Catalog
	files   map[repo.ID]int64 // packs in the store
	entries []int32           // of each pack, by its number
	sizes   []int64           // of each pack by the index
	damage  *Damage

	unlisted   []repo.ID // packs that no index lists
	unanswered atomic.Int32

	mu      sync.Mutex
	res     *Result
	missing bool // something is in no index
}

// Check looks for damage. It loads the index anew. The error is about a check
// that could not be finished; what was found is in the result. The result's
// Damage is to be closed.
func Check(ctx context.Context, r *repo.Repository, o Options) (*Result, error) {
	c := &checker{Options: o, repo: r, res: &Result{Snapshots: map[repo.ID]*repo.Snapshot{}}}
	if err := c.run(ctx); err != nil {
		if c.catalog != nil {
			c.catalog.Close()
		}
		return nil, fmt.Errorf("check: %w", err)
	}
	return c.res, nil
}

func (c *checker) run(ctx context.Context) error {
	if err := c.keys(ctx); err != nil {
		return err
	}
	// Snapshots first: what they need was in the index before them.
	if err := c.snapshots(ctx); err != nil {
		return err
	}
	bad, err := c.repo.LoadGoodIndex(ctx)
	if err != nil {
		return err
	}
	for id, err := range bad {
		if end := c.blame(ctx, err); end != nil {
			return end
		}
		c.report(Problem{Kind: "index", ID: id, Message: unread(err).Error()})
		c.res.SuggestRepairIndex = true
	}
	if c.catalog, err = c.repo.Catalog(); err != nil {
		return err
	}
	c.damage = &Damage{repo: c.repo, catalog: c.catalog, packs: map[repo.ID]packDamage{}, places: map[place]error{}}
	c.res.Damage = c.damage
	if err := c.packs(ctx); err != nil {
		return err
	}
	if err := c.damage.spread(ctx); err != nil {
		return err
	}
	if err := c.trees(ctx); err != nil {
		return err
	}
	c.leftovers()
	if err := c.readData(ctx); err != nil {
		return err
	}
	return c.damage.spread(ctx)
}

// leftovers says what packs that no index lists are good for.
func (c *checker) leftovers() {
	if len(c.unlisted) == 0 {
		return
	}
	slices.SortFunc(c.unlisted, repo.ID.Compare)
	p := Problem{Kind: "pack", ID: c.unlisted[0], Harmless: true}
	p.Message = fmt.Sprintf("it and %d more are in no index, ", len(c.unlisted)-1)
	if len(c.unlisted) == 1 {
		p.Message = "it is in no index, "
	}
	if c.missing || c.res.SuggestRepairIndex {
		p.Message += "and may hold what is missing: run `repair index`, not `prune`"
		c.res.SuggestRepairIndex = true
	} else {
		p.Message += "which is what something that was interrupted leaves; `prune` deletes that"
		c.res.SuggestPrune = true
	}
	c.report(p)
}

func (c *checker) report(p Problem) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !p.Harmless {
		c.res.Errors++
	}
	if c.Report != nil {
		c.Report(p)
	}
}

func (c *checker) lacks() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.missing = true
}

func (c *checker) tell(phase string, done, total int64) {
	if c.Progress != nil {
		c.Progress(phase, done, total)
	}
}

// keys reads the key files. One that is damaged may open the repository still, and
// restic refuses it.
func (c *checker) keys(ctx context.Context) error {
	return c.repo.CheckKeys(ctx, func(id repo.ID, err error) error {
		if end := c.blame(ctx, err); end != nil {
			return end
		}
		c.report(Problem{Kind: "key", ID: id, Message: unread(err).Error()})
		return nil
	})
}

// snapshots loads all snapshots.
func (c *checker) snapshots(ctx context.Context) error {
	return c.repo.ListSnapshots(ctx, func(id repo.ID, s *repo.Snapshot, err error) error {
		var why string
		switch {
		case errors.Is(err, backend.ErrNotExist):
			why = "the store lists it, and does not have it"
		case errors.Is(err, repo.ErrDamaged):
			why = err.Error() + "; `forget` with its ID removes it"
		case err != nil:
			if end := c.blame(ctx, err); end != nil {
				return end
			}
			why = unread(err).Error()
		case s.Tree == nil:
			why = "it has no tree"
		default:
			c.res.Snapshots[id] = s
			return nil
		}
		c.report(Problem{Kind: "snapshot", ID: id, Message: why})
		c.res.Unread = append(c.res.Unread, id)
		return nil
	})
}

// packs compares what the index lists with what the store has.
func (c *checker) packs(ctx context.Context) error {
	ids := c.catalog.Packs()
	c.entries, c.sizes = make([]int32, len(ids)), make([]int64, len(ids))
	kinds := make([]uint8, len(ids))
	for i := range c.sizes {
		c.sizes[i] = pack.Overhead
	}
	err := c.catalog.EachBlob(ctx, func(h repo.BlobHandle, places []repo.Place) error {
		for _, at := range places {
			c.entries[at.Pack]++
			c.sizes[at.Pack] += int64(at.Length) + int64(pack.EntrySize(at.Blob(h)))
			kinds[at.Pack] |= 1 << h.Type
		}
		return nil
	})
	if err != nil {
		return err
	}
	if c.files, err = c.repo.ListFiles(ctx, backend.PackFile); err != nil {
		return err
	}
	sources := c.catalog.Sources()
	listed := make(map[repo.ID]bool, len(ids))
	for i, id := range ids {
		listed[id] = true
		size, ok := c.files[id]
		switch {
		case !ok:
			c.damage.packs[id] = packDamage{-1, "pack " + id.Str() + " is missing"}
			c.report(Problem{Kind: "pack", ID: id, Message: "the index lists it, and it is missing"})
		case size != c.sizes[i]:
			c.damage.packs[id] = packDamage{size, fmt.Sprintf("pack %s is cut to %d bytes", id.Str(), size)}
			c.report(Problem{Kind: "pack", ID: id, Message: fmt.Sprintf("it has %d bytes instead of %d", size, c.sizes[i])})
			c.res.BrokenPacks = append(c.res.BrokenPacks, id)
		}
		if len(sources[id]) > 1 {
			c.report(Problem{Kind: "pack", ID: id, Message: fmt.Sprintf("%d index files list it, `repair index` mends that", len(sources[id])), Harmless: true})
			c.res.SuggestRepairIndex = true
		}
		if kinds[i] == 1<<repo.DataBlob|1<<repo.TreeBlob {
			c.report(Problem{Kind: "pack", ID: id, Message: "it holds trees and data, `prune` mends that", Harmless: true})
			c.res.SuggestPrune = true
		}
	}
	for id := range c.files {
		if !listed[id] {
			c.unlisted = append(c.unlisted, id)
		}
	}
	return nil
}

// trees checks every tree once.
func (c *checker) trees(ctx context.Context) error {
	roots := make([]repo.ID, 0, len(c.res.Snapshots))
	for _, s := range c.res.Snapshots {
		roots = append(roots, *s.Tree)
	}
	slices.SortFunc(roots, repo.ID.Compare)
	seen := repo.NewBits(c.catalog.Len())
	missing := map[repo.ID]bool{}
	var mu sync.Mutex
	var done int64
	first := func(id repo.ID) (bool, error) {
		at, ok, err := c.catalog.Find(treeBlob(id))
		if ok || err != nil {
			return ok && seen.Set(at), err
		}
		mu.Lock()
		known := missing[id]
		missing[id] = true
		mu.Unlock()
		c.lacks()
		if !known {
			c.damage.badTree(id, fmt.Errorf("%s is in no index", treeBlob(id)))
			c.report(Problem{Kind: "tree", ID: id, Message: "it is in no index"})
		}
		return false, nil
	}
	return c.repo.WalkTrees(ctx, roots, first, func(ctx context.Context, id repo.ID, data []byte, err error) ([]repo.ID, error) {
		mu.Lock()
		done++
		c.tell(PhaseTrees, done, 0)
		mu.Unlock()
		var t *repo.Tree
		if err == nil {
			t, err = repo.DecodeTree(data)
		} else if end := c.blame(ctx, err); end != nil {
			return nil, end
		} else {
			err = unread(err)
		}
		if err != nil {
			c.damage.badTree(id, err)
			c.report(Problem{Kind: "tree", ID: id, Message: err.Error()})
			return nil, nil
		}
		return c.tree(id, t)
	})
}

// tree checks what one tree refers to.
func (c *checker) tree(id repo.ID, t *repo.Tree) (subtrees []repo.ID, err error) {
	fail := func(format string, args ...any) {
		c.damage.badTree(id, fmt.Errorf(format, args...))
		c.report(Problem{Kind: "tree", ID: id, Message: fmt.Sprintf(format, args...)})
	}
	for _, n := range t.Nodes {
		switch {
		case n.Name == "":
			fail("a node has no name")
		case n.Type == repo.NodeDir && (n.Subtree == nil || n.Subtree.IsNull()):
			fail("folder %q has no tree", n.Name)
		case n.Type == repo.NodeFile && n.Content == nil:
			fail("file %q has no list of blobs", n.Name)
		case !knownType[n.Type]:
			fail("node %q has type %q, which is not known", n.Name, n.Type)
		}
		if n.Subtree != nil && !n.Subtree.IsNull() {
			subtrees = append(subtrees, *n.Subtree)
		}
		lost, firstLost := 0, repo.ID{}
		for _, blob := range n.Content {
			_, ok, err := c.catalog.Find(dataBlob(blob))
			if err != nil {
				return nil, err
			}
			if !ok {
				if lost++; lost == 1 {
					firstLost = blob
				}
			}
		}
		if lost > 0 {
			c.lacks()
			fail("%d of %d blobs of file %q are in no index, the first is %s", lost, len(n.Content), n.Name, firstLost.Str())
		}
	}
	return subtrees, nil
}

var knownType = map[repo.NodeType]bool{
	repo.NodeFile: true, repo.NodeDir: true, "symlink": true, "dev": true, "chardev": true, "fifo": true, "socket": true,
}

func treeBlob(id repo.ID) repo.BlobHandle { return repo.BlobHandle{Type: repo.TreeBlob, ID: id} }
func dataBlob(id repo.ID) repo.BlobHandle { return repo.BlobHandle{Type: repo.DataBlob, ID: id} }
