// SPDX-License-Identifier: BSD-2-Clause

package repo

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dsync-backup/dsync-backup/repo/backend"
)

func TestOneBadSnapshotDoesNotHideTheOthers(t *testing.T) {
	for _, cached := range []bool{false, true} {
		opts := Options{}
		if cached {
			opts.CacheDir = t.TempDir()
		}
		r, dir := newRepo(t, opts)
		rng := newRand(t)
		bad, _ := testBackup(t, r, rng)
		good, _ := testBackup(t, r, rng)
		damage(t, filepath.Join(dir, "snapshots", bad.String()), func(b []byte) []byte { return b[:50] })
		r = reopen(t, dir, Options{})
		seen := map[ID]error{}
		if err := r.ListSnapshots(t.Context(), func(id ID, s *Snapshot, err error) error {
			if (s == nil) == (err == nil) {
				t.Errorf("%v and %v", s, err)
			}
			seen[id] = err
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		if len(seen) != 2 || seen[good] != nil || !errors.Is(seen[bad], ErrDamaged) {
			t.Errorf("%v", seen)
		}
		_, _, err := r.FindSnapshot(t.Context(), "latest", SnapshotFilter{})
		if !errors.Is(err, ErrDamaged) {
			t.Errorf("latest although it may be the bad one: %v", err)
		}
		mustBeOneLine(t, err, bad.Str())
		if id, _, err := r.FindSnapshot(t.Context(), good.String()[:6], SnapshotFilter{}); err != nil || id != good {
			t.Errorf("%v, %v", id, err)
		}
	}
}

// TestNoSnapshotIsTheLatestWhileOneCannotBeRead: with the error comes no ID, since what was
// good so far is neither the latest nor what is damaged.
func TestNoSnapshotIsTheLatestWhileOneCannotBeRead(t *testing.T) {
	r, dir := newRepo(t, Options{})
	rng := newRand(t)
	bad, _ := testBackup(t, r, rng)
	for range 15 {
		testBackup(t, r, rng)
	}
	damage(t, filepath.Join(dir, "snapshots", bad.String()), func(b []byte) []byte { return b[:50] })
	for range 20 { // in which order they are loaded is left to chance
		id, s, err := r.FindSnapshot(t.Context(), "latest", SnapshotFilter{})
		if !errors.Is(err, ErrDamaged) || !id.IsNull() || s != nil {
			t.Fatalf("latest beside a damaged snapshot is %s, %v: %v", id.Str(), s, err)
		}
		mustBeOneLine(t, err, bad.Str())
	}
}

func TestSnapshotsAreFoundByPrefixAndFilter(t *testing.T) {
	r, _ := newRepo(t, Options{})
	tree := ID{1}
	var ids []ID
	base := time.Date(2024, 5, 1, 0, 0, 0, 0, time.UTC)
	for i := range 17 { // more than there are hex digits: two share their first
		id, size, err := r.SaveSnapshot(t.Context(), &Snapshot{
			Time: base.AddDate(0, 0, -i), Tree: &tree, Hostname: fmt.Sprint("h", i%2), Paths: []string{fmt.Sprint("/dev/", i%3)}, Tags: []string{"all", fmt.Sprint("t", i%5)},
		})
		if err != nil || size < 100 {
			t.Fatal(size, err)
		}
		ids = append(ids, id)
	}
	for i, id := range ids {
		for _, name := range []string{id.String(), id.String()[:20], strings.ToUpper(id.String()[:20])} {
			if got, s, err := r.FindSnapshot(t.Context(), name, SnapshotFilter{}); err != nil || got != id || !s.Time.Equal(base.AddDate(0, 0, -i)) {
				t.Errorf("%s: %v, %v", name, got, err)
			}
		}
	}
	shared := ""
	for _, d := range "0123456789abcdef" {
		n := 0
		for _, id := range ids {
			if strings.HasPrefix(id.String(), string(d)) {
				n++
			}
		}
		if n > 1 {
			shared = string(d)
		}
	}
	for name, want := range map[string]string{shared: "give more", "": "not an ID", "xyz": "not an ID", strings.Repeat("0", 64): "none has", ids[0].String() + "0": "not an ID"} {
		_, _, err := r.FindSnapshot(t.Context(), name, SnapshotFilter{})
		if !errors.Is(err, ErrNoSnapshot) {
			t.Error(err)
		}
		mustBeOneLine(t, err, want)
	}
	for _, c := range []struct {
		filter SnapshotFilter
		want   int // number of the snapshot, the lower the later; -1: none
	}{
		{SnapshotFilter{}, 0},
		{SnapshotFilter{Hosts: []string{"h1"}}, 1},
		{SnapshotFilter{Paths: []string{"/dev/2"}}, 2},
		{SnapshotFilter{Tags: [][]string{{"t4"}}}, 4},
		{SnapshotFilter{Tags: [][]string{{"t4", "nope"}, {"t3", "all"}}}, 3},
		{SnapshotFilter{Hosts: []string{"h1"}, Paths: []string{"/dev/2"}, Tags: [][]string{{"t0"}}}, 5},
		{SnapshotFilter{Hosts: []string{"nope", "h0"}, Tags: [][]string{{"t1"}}}, 6},
		{SnapshotFilter{Hosts: []string{"nope"}}, -1},
		{SnapshotFilter{Tags: [][]string{{""}}}, -1},
	} {
		id, _, err := r.FindSnapshot(t.Context(), "latest", c.filter)
		if c.want < 0 {
			if !errors.Is(err, ErrNoSnapshot) {
				t.Errorf("%s: %v, %v", c.filter, id, err)
			}
			mustBeOneLine(t, err)
		} else if err != nil || id != ids[c.want] {
			t.Errorf("%s: %v, want %v, %v", c.filter, id, ids[c.want], err)
		}
	}
	if err := r.RemoveSnapshot(t.Context(), ids[0]); err != nil {
		t.Fatal(err)
	}
	if id, _, err := r.FindSnapshot(t.Context(), "latest", SnapshotFilter{}); err != nil || id != ids[1] {
		t.Errorf("%v, %v", id, err)
	}
	if err := r.RemoveSnapshot(t.Context(), ids[0]); !errors.Is(err, backend.ErrNotExist) {
		t.Error(err)
	}
}
