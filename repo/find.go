// SPDX-License-Identifier: BSD-2-Clause

package repo

import (
	"context"
	"encoding/hex"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/dsync-backup/dsync-backup/repo/backend"
)

// SnapshotFilter says which snapshots are meant. What is empty matches all.
type SnapshotFilter struct {
	Hosts []string   // one of these
	Paths []string   // all of these
	Tags  [][]string // one of these lists, as a whole; an empty tag means no tags at all
}

// Match reports whether the filter lets s through.
func (f SnapshotFilter) Match(s *Snapshot) bool {
	if len(f.Hosts) > 0 && !slices.Contains(f.Hosts, s.Hostname) {
		return false
	}
	for _, p := range f.Paths {
		if !slices.Contains(s.Paths, p) {
			return false
		}
	}
	return len(f.Tags) == 0 || slices.ContainsFunc(f.Tags, s.HasTags)
}

// HasTags reports whether the snapshot has all of these tags. As with restic, an
// empty tag stands for no tags at all.
func (s *Snapshot) HasTags(tags []string) bool {
	for _, tag := range tags {
		if tag == "" && len(s.Tags) == 0 {
			return true
		}
		if !slices.Contains(s.Tags, tag) {
			return false
		}
	}
	return true
}

// Empty reports a filter that matches all.
func (f SnapshotFilter) Empty() bool { return len(f.Hosts)+len(f.Paths)+len(f.Tags) == 0 }

func (f SnapshotFilter) String() string {
	var parts []string
	for name, values := range map[string][]string{"host": f.Hosts, "path": f.Paths} {
		if len(values) > 0 {
			parts = append(parts, name+" "+strings.Join(values, ", "))
		}
	}
	for _, tags := range f.Tags {
		parts = append(parts, "tag "+strings.Join(tags, ","))
	}
	slices.Sort(parts)
	return strings.Join(parts, "; ")
}

// FindSnapshot finds the snapshot that a user means: an ID, a unique prefix of
// one, or "latest" among those that the filter matches. Nothing found, or too
// much, is [ErrNoSnapshot]. If it was found and cannot be read its ID comes with
// the error; while some snapshot cannot be read none is the latest, and no ID
// comes with that.
func (r *Repository) FindSnapshot(ctx context.Context, name string, filter SnapshotFilter) (ID, *Snapshot, error) {
	if name == "latest" {
		return r.findLatest(ctx, filter)
	}
	id, err := r.findPrefix(ctx, name)
	if err != nil {
		return ID{}, nil, err
	}
	s, err := r.LoadSnapshot(ctx, id)
	return id, s, err
}

func (r *Repository) findPrefix(ctx context.Context, name string) (ID, error) {
	prefix := strings.ToLower(name)
	if !isHex(prefix) || len(prefix) > hex.EncodedLen(len(ID{})) {
		return ID{}, fmt.Errorf("find snapshot %q: not an ID, a prefix of one, or latest: %w", name, ErrNoSnapshot)
	}
	files, err := listIDs(ctx, r.be, backend.SnapshotFile)
	if err != nil {
		return ID{}, err
	}
	var found []ID
	for _, f := range files {
		if strings.HasPrefix(f.id.String(), prefix) {
			found = append(found, f.id)
		}
	}
	switch len(found) {
	case 0:
		return ID{}, fmt.Errorf("find snapshot %q: none has an ID that begins so: %w", name, ErrNoSnapshot)
	case 1:
		return found[0], nil
	}
	return ID{}, fmt.Errorf("find snapshot %q: %w", name, tooMany(len(found)))
}

// tooMany is the [ErrNoSnapshot] of a name that so many snapshots have: they were found, so
// that it says something else.
type tooMany int

func (n tooMany) Error() string {
	return fmt.Sprintf("the IDs of %d snapshots begin so, give more of it", int(n))
}

// Is is for errors.Is.
func (tooMany) Is(target error) bool { return target == ErrNoSnapshot }

func isHex(s string) bool {
	return s != "" && strings.Trim(s, "0123456789abcdef") == ""
}

func (r *Repository) findLatest(ctx context.Context, filter SnapshotFilter) (id ID, latest *Snapshot, err error) {
	filter.Paths = slices.Clone(filter.Paths)
	for i, p := range filter.Paths {
		if filter.Paths[i], err = filepath.Abs(p); err != nil {
			return ID{}, nil, fmt.Errorf("find latest snapshot: %w", err)
		}
	}
	err = r.ListSnapshots(ctx, func(i ID, s *Snapshot, err error) error {
		if err != nil {
			// It may be the latest one: better no answer than a wrong one.
			return fmt.Errorf("find latest snapshot: %w (name a snapshot by its ID)", err)
		}
		if filter.Match(s) && (latest == nil || s.Time.After(latest.Time) || s.Time.Equal(latest.Time) && i.Compare(id) > 0) {
			id, latest = i, s
		}
		return nil
	})
	if err == nil && latest == nil {
		err = fmt.Errorf("find latest snapshot: %w", ErrNoSnapshot)
		if what := filter.String(); what != "" {
			err = fmt.Errorf("find latest snapshot for %s: %w", what, ErrNoSnapshot)
		}
	}
	if err != nil {
		// What was the latest so far has nothing to do with the error.
		return ID{}, nil, err
	}
	return id, latest, nil
}
