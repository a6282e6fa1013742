// SPDX-License-Identifier: BSD-2-Clause

package repo

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/dsync-backup/dsync-backup/repo/backend"
)

// eachLock calls fn for every lock but the caller's own, which it does not read, one at a
// time. Locks that go away meanwhile do not count, nor do empty files, which a store that is
// not atomic may leave. Locks do not change, so that none is loaded again: where they cannot
// be deleted they pile up, and each command looks twice.
func (r *Repository) eachLock(ctx context.Context, own ID, fn func(ID, lockFile, error) error) error {
	files, err := listIDs(ctx, r.be, backend.LockFile)
	if err != nil {
		return fmt.Errorf("lock repository: %w", err)
	}
	known := r.locks.retain(files)
	var unknown []ID
	for _, f := range files {
		l, ok := known[f.id]
		switch {
		case f.id == own:
		case ok:
			if err := fn(f.id, l, nil); err != nil {
				return err
			}
		case f.size > 0:
			unknown = append(unknown, f.id)
		}
	}
	var mu sync.Mutex
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(max(1, r.be.Connections()))
	for _, id := range unknown {
		g.Go(func() error {
			if gctx.Err() != nil {
				return nil // who ended it says why
			}
			l, err := r.loadLock(gctx, id)
			mu.Lock()
			defer mu.Unlock()
			if gctx.Err() != nil || errors.Is(err, backend.ErrNotExist) {
				return nil
			}
			return fn(id, l, err)
		})
	}
	err = g.Wait()
	if err == nil && ctx.Err() != nil {
		err = fmt.Errorf("lock repository: %w", ctx.Err())
	}
	return err
}

// LockInfo is a lock in the repository, for people.
type LockInfo struct {
	ID        ID        `json:"id"`
	Time      time.Time `json:"time,omitzero"`
	Exclusive bool      `json:"exclusive,omitempty"`
	Hostname  string    `json:"hostname,omitempty"`
	Username  string    `json:"username,omitempty"`
	PID       int       `json:"pid,omitempty"`
	StaleAt   time.Time `json:"stale_at,omitzero"` // from then on it counts as left behind
	Error     string    `json:"error,omitempty"`   // it cannot be read, and nothing else is known
}

func (l LockInfo) String() string {
	if l.Error != "" {
		return fmt.Sprintf("a lock that cannot be read (%s); it never counts as left behind", l.Error)
	}
	f := lockFile{Time: l.Time, Exclusive: l.Exclusive, Hostname: l.Hostname, Username: l.Username, PID: l.PID}
	return fmt.Sprintf("%s; unless it is refreshed it counts as left behind from %s on", f, l.StaleAt.Local().Format(lockTimeFormat))
}

// Locks are the locks that there are, the oldest first.
func (r *Repository) Locks(ctx context.Context) ([]LockInfo, error) {
	list := []LockInfo{}
	err := r.eachLock(ctx, ID{}, func(id ID, l lockFile, err error) error {
		info := LockInfo{ID: id}
		if err != nil {
			info.Error = err.Error()
		} else {
			info = LockInfo{id, l.Time, l.Exclusive, l.Hostname, l.Username, l.PID, l.staleAt(), ""}
		}
		list = append(list, info)
		return nil
	})
	slices.SortFunc(list, func(a, b LockInfo) int { return cmp.Or(a.Time.Compare(b.Time), a.ID.Compare(b.ID)) })
	return list, err
}

func (r *Repository) loadLock(ctx context.Context, id ID) (l lockFile, err error) {
	plain, err := r.loadUnpacked(ctx, backend.LockFile, id)
	if err != nil {
		return l, err
	}
	if err := json.Unmarshal(plain, &l); err != nil {
		return l, fmt.Errorf("decode lock %s: %w", id.Str(), err)
	}
	r.locks.add(id, l)
	return l, nil
}

// knownLocks are locks that were read. The zero value is empty.
type knownLocks struct {
	mu   sync.Mutex
	byID map[ID]lockFile
}

func (k *knownLocks) add(id ID, l lockFile) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.byID == nil {
		k.byID = map[ID]lockFile{}
	}
	k.byID[id] = l
}

// retain forgets those that are not listed any more, and gives the others.
func (k *knownLocks) retain(files []listed) map[ID]lockFile {
	k.mu.Lock()
	defer k.mu.Unlock()
	out := make(map[ID]lockFile, len(k.byID))
	for _, f := range files {
		if l, ok := k.byID[f.id]; ok {
			out[f.id] = l
		}
	}
	k.byID = maps.Clone(out)
	return out
}
