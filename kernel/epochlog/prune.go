// SPDX-License-Identifier: BSD-2-Clause

package epochlog

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/dsync-backup/dsync-backup/kernel"
)

// Limits say how much of a log is kept that no holder needs: it serves older
// snapshots, of a repository that forgot its newest or was restored from a
// copy. Zero keeps nothing of it.
type Limits struct {
	Count int           // entries
	Bytes int64         // of entries
	Age   time.Duration // of an entry
	// HolderAge is how long a repository counts as a holder after its last
	// backup. Whoever comes later compares once.
	HolderAge time.Duration
	// DeadAge is how long the log of a tracker is kept that is not there any
	// more.
	DeadAge time.Duration
}

// DefaultLimits keep three months, in at most 1 GiB.
func DefaultLimits() Limits {
	const day = 24 * time.Hour
	return Limits{Count: 10000, Bytes: 1 << 30, Age: 92 * day, HolderAge: 366 * day, DeadAge: 31 * day}
}

// Pruned says what was removed.
type Pruned struct {
	Entries int
	Bytes   int64
}

// Prune removes the oldest entries, as far as the limits ask for it and no
// holder needs them. What stays has no gap. It needs the lock.
func (s *Session) Prune(l Limits, now time.Time) (Pruned, error) {
	if s.lock == nil {
		return Pruned{}, fmt.Errorf("prune epoch log: %w", errUnlocked)
	}
	holders, err := s.log.holders()
	if err != nil {
		return Pruned{}, err
	}
	// An entry at a holder's position proves its nonce.
	needed := ^uint64(0)
	for _, h := range holders {
		if now.Sub(h.Time) <= l.HolderAge && s.verifies(h.Position) {
			needed = min(needed, h.Position.Epoch)
		}
	}
	if s.rotated != nil {
		needed = min(needed, s.rotated.Position.Epoch)
	}
	return s.log.prune(l, needed, now)
}

// prune removes entries from the oldest on, but none from needed on, and never
// the newest: a backup may be about to record its position.
func (l log) prune(lim Limits, needed uint64, now time.Time) (p Pruned, err error) {
	entries, err := l.list()
	if err != nil || len(entries) == 0 {
		return p, err
	}
	count, size := len(entries), int64(0)
	for _, e := range entries {
		size += e.size
	}
	for _, e := range entries[:len(entries)-1] {
		if e.epoch >= needed || count <= lim.Count && size <= lim.Bytes && now.Sub(e.time) <= lim.Age {
			break
		}
		if err := os.Remove(l.path(e.epoch)); err != nil {
			return p, fmt.Errorf("prune epoch log: %w", err)
		}
		count, size = count-1, size-e.size
		p.Entries, p.Bytes = p.Entries+1, p.Bytes+e.size
	}
	return p, nil
}

type listed struct {
	epoch uint64
	size  int64
	time  time.Time
}

// list gives the entries, oldest epoch first.
func (l log) list() ([]listed, error) {
	files, err := os.ReadDir(l.dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read epoch log: %w", err)
	}
	var out []listed
	for _, f := range files {
		n, err := strconv.ParseUint(f.Name(), 16, 64)
		if err != nil || l.path(n) != filepath.Join(l.dir, f.Name()) {
			continue
		}
		info, err := f.Info()
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read epoch log: %w", err)
		}
		out = append(out, listed{n, info.Size(), info.ModTime()})
	}
	// Names have a fixed width: already in order.
	return out, nil
}

// PruneDead removes the logs of trackers that are not among alive and whose
// last entry is older than the limit: a tracker's UUID comes back only with
// a saved state, which must not be older either.
func PruneDead(stateDir string, alive []kernel.UUID, l Limits, now time.Time) (removed []kernel.UUID, err error) {
	dir := filepath.Join(stateDir, "trackers")
	folders, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("prune epoch logs: %w", err)
	}
	for _, f := range folders {
		var u kernel.UUID
		if !f.IsDir() || u.UnmarshalText([]byte(f.Name())) != nil || slices.Contains(alive, u) {
			continue
		}
		newest, err := newestFile(filepath.Join(dir, f.Name()))
		if err != nil {
			return removed, err
		}
		if now.Sub(newest) <= l.DeadAge {
			continue
		}
		if err := os.RemoveAll(filepath.Join(dir, f.Name())); err != nil {
			return removed, fmt.Errorf("prune epoch logs: %w", err)
		}
		removed = append(removed, u)
	}
	return removed, nil
}

// newestFile is when something in a folder was last written.
func newestFile(dir string) (t time.Time, err error) {
	err = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err == nil && info.ModTime().After(t) {
			t = info.ModTime()
		}
		return err
	})
	if err != nil {
		return t, fmt.Errorf("prune epoch logs: %w", err)
	}
	return t, nil
}
