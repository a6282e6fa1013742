// SPDX-License-Identifier: BSD-2-Clause

package snapshot

import (
	"context"
	"fmt"
	"sync"

	"github.com/dsync-backup/dsync-backup/repo"
)

// stageBytes bounds what a stage holds in memory: enough for the metadata of
// some GiB of scattered blocks.
const stageBytes = 32 << 20

// stage takes layers that are about to be merged. Their data go to the
// repository; what describes them is held in memory up to a bound, since most
// of it is not needed once they are one layer. It implements [layer.Saver] and
// [layer.Loader].
type stage struct {
	w     *repo.Writer
	store Store
	limit int

	mu     sync.Mutex
	held   map[repo.BlobHandle][]byte
	bytes  int
	passed bool // metadata went to the writer that the store does not give yet
}

func newStage(w *repo.Writer, store Store) *stage {
	return &stage{w: w, store: store, limit: stageBytes, held: map[repo.BlobHandle][]byte{}}
}

// SaveBlob implements [layer.Saver].
func (s *stage) SaveBlob(ctx context.Context, kind repo.Kind, data []byte) (repo.Saved, error) {
	if kind == repo.KindMeta {
		if saved, ok := s.take(repo.DataBlob, data); ok {
			return saved, nil
		}
	}
	return s.w.SaveBlob(ctx, kind, data)
}

// SaveTree implements [layer.Saver].
func (s *stage) SaveTree(ctx context.Context, t *repo.Tree) (repo.Saved, error) {
	data, err := t.Encode()
	if err != nil {
		return repo.Saved{}, err
	}
	if saved, ok := s.take(repo.TreeBlob, data); ok {
		return saved, nil
	}
	return keeper{s}.SaveTree(ctx, t)
}

// take holds a blob if there is room for it.
func (s *stage) take(typ repo.BlobType, data []byte) (repo.Saved, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.bytes+len(data) > s.limit {
		s.passed = true
		return repo.Saved{}, false
	}
	saved := repo.Saved{ID: repo.Hash(data), PlainSize: len(data)}
	h := repo.BlobHandle{Type: typ, ID: saved.ID}
	if _, saved.Known = s.held[h]; !saved.Known {
		s.held[h] = append([]byte(nil), data...)
		s.bytes += len(data)
	}
	return saved, true
}

func (s *stage) get(typ repo.BlobType, id repo.ID) ([]byte, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	b, ok := s.held[repo.BlobHandle{Type: typ, ID: id}]
	return b, ok
}

// loadable makes sure that everything saved so far can be loaded.
func (s *stage) loadable(ctx context.Context) error {
	if !s.passed {
		return nil
	}
	s.passed = false
	return s.w.Flush(ctx)
}

// LoadTree implements [layer.Loader].
func (s *stage) LoadTree(ctx context.Context, id repo.ID) (*repo.Tree, error) {
	if b, ok := s.get(repo.TreeBlob, id); ok {
		return repo.DecodeTree(b)
	}
	return s.store.LoadTree(ctx, id)
}

// LoadMeta implements [layer.Loader].
func (s *stage) LoadMeta(ctx context.Context, id repo.ID) ([]byte, error) {
	if b, ok := s.get(repo.DataBlob, id); ok {
		return b, nil
	}
	return s.store.LoadMeta(ctx, id)
}

// BlobSize implements [layer.Loader].
func (s *stage) BlobSize(h repo.BlobHandle) (int, bool) {
	if b, ok := s.get(h.Type, h.ID); ok {
		return len(b), true
	}
	return s.w.BlobSize(h)
}

// keep stores a tree that is held, and all that it needs.
func (s *stage) keep(ctx context.Context, id repo.ID) error {
	b, ok := s.get(repo.TreeBlob, id)
	if !ok {
		return nil // the repository has it
	}
	t, err := repo.DecodeTree(b)
	if err != nil {
		return err
	}
	saved, err := keeper{s}.SaveTree(ctx, t)
	if err == nil && saved.ID != id {
		err = fmt.Errorf("keep tree %s: it came out as %s", id.Str(), saved.ID.Str())
	}
	return err
}

// keeper saves for good: what its trees refer to leaves the stage with them.
type keeper struct{ *stage }

// SaveBlob implements [layer.Saver].
func (k keeper) SaveBlob(ctx context.Context, kind repo.Kind, data []byte) (repo.Saved, error) {
	k.pass()
	return k.w.SaveBlob(ctx, kind, data)
}

// SaveTree implements [layer.Saver].
func (k keeper) SaveTree(ctx context.Context, t *repo.Tree) (repo.Saved, error) {
	for _, n := range t.Nodes {
		if n.Subtree != nil {
			if err := k.keep(ctx, *n.Subtree); err != nil {
				return repo.Saved{}, err
			}
		}
		for _, id := range n.Content {
			if b, ok := k.get(repo.DataBlob, id); ok {
				k.pass()
				if _, err := k.w.SaveBlob(ctx, repo.KindMeta, b); err != nil {
					return repo.Saved{}, err
				}
			}
		}
	}
	k.pass()
	return k.w.SaveTree(ctx, t)
}

// pass notes that the store has to be flushed before all can be loaded.
func (s *stage) pass() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.passed = true
}
