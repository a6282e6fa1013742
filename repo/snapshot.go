// SPDX-License-Identifier: BSD-2-Clause

package repo

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/dsync-backup/dsync-backup/repo/backend"
)

// Snapshot is a backup: a root directory and what is said of it. The fields
// and their order are restic's; restic drops fields that it does not know when
// it rewrites a snapshot, so there are no others.
type Snapshot struct {
	Time           time.Time        `json:"time"`
	Parent         *ID              `json:"parent,omitempty"`
	Tree           *ID              `json:"tree"`
	Paths          []string         `json:"paths"`
	Hostname       string           `json:"hostname,omitempty"`
	Username       string           `json:"username,omitempty"`
	UID            uint32           `json:"uid,omitempty"`
	GID            uint32           `json:"gid,omitempty"`
	Excludes       []string         `json:"excludes,omitempty"`
	Tags           []string         `json:"tags,omitempty"`
	Original       *ID              `json:"original,omitempty"` // the snapshot that this one is a changed copy of
	ProgramVersion string           `json:"program_version,omitempty"`
	Summary        *SnapshotSummary `json:"summary,omitempty"` // since restic 0.17
}

// SnapshotSummary says what making the snapshot took. Sizes are in bytes.
type SnapshotSummary struct {
	BackupStart         time.Time `json:"backup_start"`
	BackupEnd           time.Time `json:"backup_end"`
	FilesNew            uint      `json:"files_new"`
	FilesChanged        uint      `json:"files_changed"`
	FilesUnmodified     uint      `json:"files_unmodified"`
	DirsNew             uint      `json:"dirs_new"`
	DirsChanged         uint      `json:"dirs_changed"`
	DirsUnmodified      uint      `json:"dirs_unmodified"`
	DataBlobs           int       `json:"data_blobs"`
	TreeBlobs           int       `json:"tree_blobs"`
	DataAdded           uint64    `json:"data_added"`
	DataAddedPacked     uint64    `json:"data_added_packed"`
	TotalFilesProcessed uint      `json:"total_files_processed"`
	TotalBytesProcessed uint64    `json:"total_bytes_processed"`
}

const snapshotFolder = "snapshots"

// SaveSnapshot stores a snapshot and returns its ID and stored size in bytes.
// Everything that it needs must be flushed before. If the lock that ctx belongs
// to is gone by then, the snapshot stays, and it is [ErrLockLost].
func (r *Repository) SaveSnapshot(ctx context.Context, s *Snapshot) (ID, int64, error) {
	if err := r.RequireWritable(); err != nil {
		return ID{}, 0, fmt.Errorf("save snapshot: %w", err)
	}
	if s.Tree == nil {
		return ID{}, 0, errors.New("save snapshot: it has no tree")
	}
	plain, err := json.Marshal(s)
	if err != nil {
		return ID{}, 0, fmt.Errorf("encode snapshot: %w", err)
	}
	if err := r.CheckLock(ctx); err != nil {
		return ID{}, 0, fmt.Errorf("save snapshot: %w", err)
	}
	id, raw, err := r.saveUnpacked(ctx, backend.SnapshotFile, plain)
	if err != nil {
		return ID{}, 0, err
	}
	r.cache.save(snapshotFolder+"/"+id.String(), raw)
	if err := r.lockStillThere(ctx); err != nil {
		return id, int64(len(raw)), fmt.Errorf("snapshot %s was saved, and what it needs may have been pruned meanwhile: %w; run `check`", id.Str(), err)
	}
	return id, int64(len(raw)), nil
}

// LoadSnapshot loads a snapshot, from the cache if it is there: call it with
// IDs that the store lists.
func (r *Repository) LoadSnapshot(ctx context.Context, id ID) (*Snapshot, error) {
	name := snapshotFolder + "/" + id.String()
	raw, ok := r.cache.load(name)
	if ok && Hash(raw) != id {
		r.cache.remove(name)
		ok = false
	}
	if !ok {
		var err error
		if raw, err = r.loadRaw(ctx, backend.SnapshotFile, id); err != nil {
			return nil, err
		}
		if r.cache != nil {
			r.cache.save(name, bytes.Clone(raw))
		}
	}
	plain, err := r.openUnpacked(backend.SnapshotFile, id, raw)
	if err != nil {
		return nil, err
	}
	var s Snapshot
	if err := json.Unmarshal(plain, &s); err != nil {
		return nil, fmt.Errorf("decode snapshot %s: %w: %w", id.Str(), ErrDamaged, err)
	}
	return &s, nil
}

// ListSnapshots calls fn for every snapshot, in no order, from one goroutine at
// a time, with the error if it could not be loaded. That is [backend.ErrNotExist]
// for one that the store does not have and goes on listing; one that was removed
// meanwhile is left out. An error of fn ends it.
func (r *Repository) ListSnapshots(ctx context.Context, fn func(ID, *Snapshot, error) error) error {
	files, err := listIDs(ctx, r.be, backend.SnapshotFile)
	if err != nil {
		return err
	}
	r.forgetCachedSnapshots(files)
	var mu sync.Mutex
	var gone map[ID]error
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(max(1, r.be.Connections()))
	for _, f := range files {
		g.Go(func() error {
			s, err := r.LoadSnapshot(gctx, f.id)
			mu.Lock()
			defer mu.Unlock()
			if gctx.Err() != nil {
				return gctx.Err()
			}
			if errors.Is(err, backend.ErrNotExist) {
				if gone == nil {
					gone = map[ID]error{}
				}
				gone[f.id] = err
				return nil
			}
			return fn(f.id, s, err)
		})
	}
	if err := g.Wait(); err != nil || len(gone) == 0 {
		return err
	}
	if files, err = listIDs(ctx, r.be, backend.SnapshotFile); err != nil {
		return err
	}
	for _, f := range files {
		if err := gone[f.id]; err != nil {
			if err := fn(f.id, nil, fmt.Errorf("%w, and the store lists it", err)); err != nil {
				return err
			}
		}
	}
	return nil
}

func (r *Repository) forgetCachedSnapshots(files []listed) {
	present := make(map[string]bool, len(files))
	for _, f := range files {
		present[f.id.String()] = true
	}
	for _, name := range r.cache.list(snapshotFolder) {
		if !present[name] {
			r.cache.remove(snapshotFolder + "/" + name)
		}
	}
}

// RemoveSnapshot deletes a snapshot; what only it needed stays until a prune.
func (r *Repository) RemoveSnapshot(ctx context.Context, id ID) error {
	if err := r.CheckLock(ctx); err != nil {
		return fmt.Errorf("remove snapshot %s: %w", id.Str(), err)
	}
	if err := r.be.Remove(ctx, backend.Handle{Type: backend.SnapshotFile, Name: id.String()}); err != nil {
		return fmt.Errorf("remove snapshot %s: %w", id.Str(), err)
	}
	r.cache.remove(snapshotFolder + "/" + id.String())
	return nil
}

// RemoveSnapshots deletes snapshots, several at a time, and calls done with
// each, one at a time. What it does about errors is as with [Repository.RemoveFiles].
func (r *Repository) RemoveSnapshots(ctx context.Context, ids []ID, done func(ID, error)) error {
	if err := r.CheckLock(ctx); err != nil {
		return fmt.Errorf("remove snapshots: %w", err)
	}
	return r.RemoveFiles(ctx, backend.SnapshotFile, ids, func(id ID, err error) {
		if err == nil {
			r.cache.remove(snapshotFolder + "/" + id.String())
		}
		done(id, err)
	})
}
