// SPDX-License-Identifier: BSD-2-Clause

package repo

import (
	"context"
	"runtime"
	"sync"

	"golang.org/x/sync/errgroup"
)

// maxWalkers bounds how many trees are in memory at a time.
const maxWalkers = 16

// WalkTrees loads trees, from roots on, many at a time. For each it calls fn
// with the tree's JSON, or why it could not be loaded, and goes on with the
// trees that fn returns. first is asked about each tree that comes up, and must
// say true only the first time. Both are called from many goroutines. An error
// of fn ends the walk. What waits takes 32 bytes a tree.
func (r *Repository) WalkTrees(ctx context.Context, roots []ID, first func(ID) (bool, error), fn func(ctx context.Context, id ID, data []byte, err error) ([]ID, error)) error {
	w := &treeWalk{}
	w.changed.L = &w.mu
	push := func(ids []ID) error {
		for _, id := range ids {
			ok, err := first(id)
			if err != nil {
				return err
			}
			if ok {
				w.push(id)
			}
		}
		return nil
	}
	if err := push(roots); err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	defer context.AfterFunc(ctx, w.stop)()
	for range min(maxWalkers, max(r.be.Connections(), runtime.GOMAXPROCS(0))) {
		g.Go(func() error {
			for {
				id, ok := w.pop()
				if !ok {
					return context.Cause(ctx)
				}
				data, err := r.LoadBlob(ctx, BlobHandle{Type: TreeBlob, ID: id}, KindTree)
				if ctx.Err() != nil {
					return context.Cause(ctx)
				}
				next, err := fn(ctx, id, data, err)
				if err == nil {
					err = push(next)
				}
				if err != nil {
					return err
				}
				w.done()
			}
		})
	}
	return g.Wait()
}

// treeWalk is the trees that wait. The last in is the first out, which keeps
// few waiting.
type treeWalk struct {
	mu      sync.Mutex
	changed sync.Cond
	waiting []ID
	active  int
	stopped bool
}

func (w *treeWalk) push(id ID) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.waiting = append(w.waiting, id)
	w.changed.Signal()
}

// pop waits for a tree; there is none when the walk is over.
func (w *treeWalk) pop() (ID, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for len(w.waiting) == 0 && w.active > 0 && !w.stopped {
		w.changed.Wait()
	}
	n := len(w.waiting)
	if n == 0 || w.stopped {
		return ID{}, false
	}
	id := w.waiting[n-1]
	w.waiting = w.waiting[:n-1]
	w.active++
	return id, true
}

func (w *treeWalk) done() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.active--; w.active == 0 {
		w.changed.Broadcast()
	}
}

func (w *treeWalk) stop() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.stopped = true
	w.changed.Broadcast()
}
