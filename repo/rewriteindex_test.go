// SPDX-License-Identifier: BSD-2-Clause

package repo

import (
	"maps"
	"slices"
	"testing"

	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/repo/index"
	"github.com/dsync-backup/dsync-backup/repo/pack"
)

// indexOf is what the index files of a repository list, all in one.
func indexOf(t testing.TB, r *Repository) (files []ID, packs []index.Pack) {
	t.Helper()
	list, err := r.ListFiles(t.Context(), backend.IndexFile)
	if err != nil {
		t.Fatal(err)
	}
	for id := range list {
		p, err := r.LoadIndexFile(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		files, packs = append(files, id), append(packs, p...)
	}
	return files, packs
}

func saveIndexFile(t testing.TB, r *Repository, packs []index.Pack) {
	t.Helper()
	plain, err := index.Encode(packs)
	if err == nil {
		_, _, err = r.saveUnpacked(t.Context(), backend.IndexFile, plain)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func byOffset(a, b pack.Blob) int { return int(a.Offset) - int(b.Offset) }

// TestPacksListedTwiceAreListedOnceAndNotHeld: when a rewrite is killed between its new index
// files and the old ones every pack is listed twice, by each program in an order of its own. The
// next rewrite holds only what is listed differently.
func TestPacksListedTwiceAreListedOnceAndNotHeld(t *testing.T) {
	rng := newRand(t)
	for _, known := range []bool{false, true} { // what is listed twice
		r, _ := newRepo(t, Options{})
		for range 3 {
			testBackup(t, r, rng)
		}
		_, packs := indexOf(t, r)
		want := map[ID][]pack.Blob{}
		twice := map[ID]bool{}
		var again []index.Pack
		parts := ID{}
		for _, p := range packs {
			want[p.ID] = slices.SortedFunc(slices.Values(p.Blobs), byOffset)
			twice[p.ID] = true
			other := index.Pack{ID: p.ID, Blobs: slices.Clone(p.Blobs)}
			rng.Shuffle(len(other.Blobs), func(i, j int) { other.Blobs[i], other.Blobs[j] = other.Blobs[j], other.Blobs[i] })
			again = append(again, other)
		}
		saveIndexFile(t, r, again)
		// One that programs of old have spread over three files: the middle blob is in each.
		for _, p := range packs {
			if n := len(p.Blobs); n >= 3 && parts.IsNull() {
				parts = p.ID
				saveIndexFile(t, r, []index.Pack{{ID: p.ID, Blobs: p.Blobs[:2]}})
				saveIndexFile(t, r, []index.Pack{{ID: p.ID, Blobs: p.Blobs[1:]}})
			}
		}
		o := IndexRewrite{}
		if known {
			o.Twice = twice
		}
		w := newIndexRewriter(r, o)
		if err := w.run(t.Context()); err != nil {
			t.Fatal(err)
		}
		if held := slices.Collect(maps.Keys(w.split)); !slices.Equal(held, []ID{parts}) {
			t.Errorf("known=%t: the blobs of %d packs were held, want those of the one that is listed in parts", known, len(held))
		}
		files, got := indexOf(t, r)
		if len(files) != 1 || len(got) != len(packs) {
			t.Errorf("known=%t: %d index files list %d packs, want 1 and %d", known, len(files), len(got), len(packs))
		}
		for _, p := range got {
			if !slices.Equal(slices.SortedFunc(slices.Values(p.Blobs), byOffset), want[p.ID]) {
				t.Errorf("known=%t: pack %s lists %d blobs, want %d", known, p.ID.Str(), len(p.Blobs), len(want[p.ID]))
			}
		}
	}
}

// TestAPackOfWhichAllIndexFilesListPartsIsListedWhole: no file lists all of it.
func TestAPackOfWhichAllIndexFilesListPartsIsListedWhole(t *testing.T) {
	r, _ := newRepo(t, Options{})
	testBackup(t, r, newRand(t))
	files, packs := indexOf(t, r)
	p := packs[slices.IndexFunc(packs, func(p index.Pack) bool { return len(p.Blobs) >= 3 })]
	rest := slices.DeleteFunc(slices.Clone(packs), func(o index.Pack) bool { return o.ID == p.ID })
	saveIndexFile(t, r, append(rest, index.Pack{ID: p.ID, Blobs: p.Blobs[:2]}))
	saveIndexFile(t, r, []index.Pack{{ID: p.ID, Blobs: p.Blobs[1:]}})
	if err := r.RemoveFiles(t.Context(), backend.IndexFile, files, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := r.RewriteIndex(t.Context(), IndexRewrite{}); err != nil {
		t.Fatal(err)
	}
	_, got := indexOf(t, r)
	if len(got) != len(packs) {
		t.Errorf("%d packs are listed, want %d", len(got), len(packs))
	}
	for _, g := range got {
		if g.ID == p.ID && !slices.Equal(slices.SortedFunc(slices.Values(g.Blobs), byOffset), slices.SortedFunc(slices.Values(p.Blobs), byOffset)) {
			t.Errorf("%d blobs of the pack are listed, want %d", len(g.Blobs), len(p.Blobs))
		}
	}
}
