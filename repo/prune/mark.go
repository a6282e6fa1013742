// SPDX-License-Identifier: BSD-2-Clause

package prune

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/dsync-backup/dsync-backup/repo"
)

// shownMissing is how many missing blobs an error names, and countedMissing how
// many are told apart: where an index file is gone there can be millions.
const (
	shownMissing   = 5
	countedMissing = 10_000
)

// marks is what snapshots use: a bit for each blob, at its first position in the
// catalog.
type marks struct {
	repo    *repo.Repository
	catalog *repo.Catalog
	isMeta  func(string) bool
	used    *repo.Bits
	meta    *repo.Bits // blobs of small metadata

	mu      sync.Mutex
	missing map[repo.BlobHandle]bool // up to countedMissing
}

// refs is all that a tree refers to, whoever wrote it and whatever the nodes
// are: more than is needed does no harm.
type refs struct {
	Nodes []struct {
		Name    string    `json:"name"`
		Content []repo.ID `json:"content"`
		Subtree *repo.ID  `json:"subtree"`
	} `json:"nodes"`
}

// mark finds all blobs that the snapshots need.
func (m *marks) mark(ctx context.Context, snapshots map[repo.ID]*repo.Snapshot) error {
	roots := make([]repo.ID, 0, len(snapshots))
	for id, s := range snapshots {
		if s.Tree == nil {
			return fmt.Errorf("snapshot %s has no tree: remove it with forget", id.Str())
		}
		roots = append(roots, *s.Tree)
	}
	err := m.repo.WalkTrees(ctx, roots, m.firstTree, func(_ context.Context, id repo.ID, data []byte, err error) ([]repo.ID, error) {
		if errors.Is(err, repo.ErrBlobNotFound) {
			// Only trees that the catalog lists come here: a table of the cache has gone
			// bad since, and what lies below this tree is not known.
			return nil, fmt.Errorf("tree %s is in the index, and could not be looked up again: %w; nothing was deleted, run prune again", id.Str(), err)
		}
		if err != nil {
			return nil, err
		}
		return m.tree(id, data)
	})
	if err != nil {
		return fmt.Errorf("find what is used: %w", err)
	}
	if len(m.missing) > 0 {
		return m.incomplete()
	}
	return nil
}

func (m *marks) incomplete() error {
	var names []string
	for h := range m.missing {
		names = append(names, h.String())
	}
	slices.Sort(names)
	more := ""
	if len(names) == countedMissing {
		more = " or more"
	}
	return fmt.Errorf("%w: %d%s blobs are in no index: %s; nothing was deleted; run `check`, which names the snapshots", ErrIncomplete, len(names), more, some(names))
}

func (m *marks) firstTree(id repo.ID) (bool, error) {
	first, _, err := m.set(repo.BlobHandle{Type: repo.TreeBlob, ID: id})
	return first, err
}

// set marks a blob and says whether that is news, and its position.
func (m *marks) set(h repo.BlobHandle) (first bool, at int64, err error) {
	at, ok, err := m.catalog.Find(h)
	if err != nil {
		return false, 0, err
	}
	if !ok {
		m.mu.Lock()
		defer m.mu.Unlock()
		if m.missing == nil {
			m.missing = map[repo.BlobHandle]bool{}
		}
		if len(m.missing) < countedMissing {
			m.missing[h] = true
		}
		return false, -1, nil
	}
	return m.used.Set(at), at, nil
}

func (m *marks) tree(id repo.ID, data []byte) (subtrees []repo.ID, err error) {
	var t refs
	if err := json.Unmarshal(data, &t); err != nil {
		return nil, fmt.Errorf("decode tree %s: %w", id.Str(), err)
	}
	for _, n := range t.Nodes {
		if n.Subtree != nil {
			subtrees = append(subtrees, *n.Subtree)
		}
		meta := m.isMeta != nil && m.isMeta(n.Name)
		for _, blob := range n.Content {
			_, at, err := m.set(repo.BlobHandle{Type: repo.DataBlob, ID: blob})
			if err != nil {
				return nil, err
			}
			if meta && at >= 0 {
				m.meta.Set(at)
			}
		}
	}
	return subtrees, nil
}
