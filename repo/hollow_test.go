// SPDX-License-Identifier: BSD-2-Clause

package repo

import (
	"context"
	"errors"
	"io"
	"testing"

	"github.com/dsync-backup/dsync-backup/repo/backend"
)

// hollow lists a file that it does not have, the first so many times.
type hollow struct {
	backend.Backend
	without backend.Handle
	lists   int
}

func (b *hollow) Load(ctx context.Context, h backend.Handle, length int, offset int64, fn func(io.Reader) error) error {
	if h == b.without {
		return backend.ErrNotExist
	}
	return b.Backend.Load(ctx, h, length, offset, fn)
}

func (b *hollow) List(ctx context.Context, t backend.FileType, fn func(backend.FileInfo) error) error {
	if t == b.without.Type {
		b.lists--
	}
	return b.Backend.List(ctx, t, func(fi backend.FileInfo) error {
		if fi.Name == b.without.Name && b.lists < 0 {
			return nil
		}
		return fn(fi)
	})
}

// TestASnapshotIsPassedOverOnlyIfItIsNotListedAnyMore: one that somebody removed since it was
// listed is no snapshot; one that the store goes on listing and does not give is lost.
func TestASnapshotIsPassedOverOnlyIfItIsNotListedAnyMore(t *testing.T) {
	first, dir := newRepo(t, Options{})
	rng := newRand(t)
	lost, _ := testBackup(t, first, rng)
	good, _ := testBackup(t, first, rng)
	for lists, want := range map[int]bool{1: false, 1000: true} {
		be := &hollow{openLocal(t, dir), backend.Handle{Type: backend.SnapshotFile, Name: lost.String()}, lists}
		r, err := Open(t.Context(), be, testPassword, Options{})
		if err != nil {
			t.Fatal(err)
		}
		seen := map[ID]error{}
		err = r.ListSnapshots(t.Context(), func(id ID, s *Snapshot, err error) error {
			if (s == nil) == (err == nil) {
				t.Errorf("%v and %v", s, err)
			}
			seen[id] = err
			return nil
		})
		if err != nil {
			t.Error(err)
		}
		why, named := seen[lost]
		if goodErr, ok := seen[good]; !ok || goodErr != nil || named != want || errors.Is(why, backend.ErrNotExist) != want {
			t.Errorf("listed %d times: %v", lists, seen)
		}
		if named {
			mustBeOneLine(t, why, lost.Str(), "the store lists it")
		}
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	}
}
