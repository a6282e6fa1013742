// SPDX-License-Identifier: BSD-2-Clause

package check

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/repo/backend"
)

// TestWhatIsListedAndNotThereIsDamage: a store may list a file and not give it.
func TestWhatIsListedAndNotThereIsDamage(t *testing.T) {
	f := newFixture(t, 3, 64<<10)
	found, _, res, err := f.check(Options{ReadData: All()})
	if err != nil || len(found) > 0 {
		t.Fatalf("a repository that is whole: %q, %v", found, err)
	}
	packs := res.Packs
	if packs < 4 || res.PacksRead != packs {
		t.Errorf("%d of %d packs were read", res.PacksRead, packs)
	}
	f.be.lose(backend.PackFile, f.packs[1], -1, backend.ErrNotExist)
	found, touched, res, err := f.check(Options{ReadData: All()})
	if err != nil {
		t.Fatal(err)
	}
	if res.Packs != packs || res.PacksRead != packs-1 {
		t.Errorf("%d of %d packs were read, and one is not there", res.PacksRead, res.Packs)
	}
	f.names(found, []string{"pack " + f.packs[1].Str(), "does not have it"})
	if !slices.Equal(touched, []repo.ID{f.snapshots[1]}) || !slices.Equal(res.BrokenPacks, []repo.ID{f.packs[1]}) {
		t.Errorf("touched are %v, broken %v", touched, res.BrokenPacks)
	}

	f.be.lose(backend.SnapshotFile, f.snapshots[2], -1, backend.ErrNotExist)
	found, _, res, err = f.check(Options{})
	if err != nil {
		t.Fatal(err)
	}
	f.names(found, []string{"snapshot " + f.snapshots[2].Str(), "does not have it"})
	if len(res.Snapshots) != 2 || res.Errors != 1 || !slices.Equal(res.Unread, f.snapshots[2:]) {
		t.Errorf("%+v", res)
	}
}

// TestASubsetThatPicksNothingShows: most parts of a small repository hold no pack.
func TestASubsetThatPicksNothingShows(t *testing.T) {
	f := newFixture(t, 2, 64<<10)
	read, nothing := 0, 0
	for part := range 256 {
		s, err := ParseSubset(fmt.Sprintf("%d/256", part+1))
		if err != nil {
			t.Fatal(err)
		}
		_, _, res, err := f.check(Options{ReadData: s})
		if err != nil {
			t.Fatal(err)
		}
		if read += res.PacksRead; res.PacksRead == 0 {
			nothing++
		}
	}
	_, _, res, err := f.check(Options{})
	if err != nil || res.PacksRead != 0 || res.Packs < 3 || read != res.Packs || nothing < 256-read {
		t.Errorf("the parts read %d of %d packs, %d of them none, and a check without a part %d; %v", read, res.Packs, nothing, res.PacksRead, err)
	}
}

var (
	errSector = backend.Permanent(syscall.EIO)
	errBusy   = errors.New("the server is busy (tried 27 times in 15m0s)")
)

// TestABadPlaceTakesTheBlobThatLiesThere: a disk that cannot read one sector of a pack does
// not keep the check from naming what else is damaged.
func TestABadPlaceTakesTheBlobThatLiesThere(t *testing.T) {
	f := newFixture(t, 3, 64<<10)
	f.be.lose(backend.PackFile, f.packs[0], 20<<10, errSector)
	f.be.lose(backend.PackFile, f.packs[2], -1, backend.ErrNotExist)
	found, touched, res, err := f.check(Options{ReadData: All()})
	if err != nil {
		t.Fatal(err)
	}
	f.names(found,
		[]string{"pack " + f.packs[0].Str(), "it cannot be read", "input/output error"},
		[]string{"blob ", "from pack " + f.packs[0].Str(), "input/output error"},
		[]string{"pack " + f.packs[2].Str(), "does not have it"})
	if len(touched) != 2 || slices.Contains(touched, f.snapshots[1]) {
		t.Errorf("touched are %v", touched)
	}
	if want := []repo.ID{f.packs[0], f.packs[2]}; len(res.BrokenPacks) != 2 || !slices.Contains(want, res.BrokenPacks[0]) || !slices.Contains(want, res.BrokenPacks[1]) {
		t.Errorf("broken are %v", res.BrokenPacks)
	}
	lost := 0
	for b := range res.Damage.places {
		if b.pack == f.packs[0] {
			lost++
		}
	}
	if lost != 1 {
		t.Errorf("%d blobs of the pack are lost", lost)
	}
}

// TestFilesThatCannotBeReadAreNamed: one of each kind.
func TestFilesThatCannotBeReadAreNamed(t *testing.T) {
	for _, err := range []error{errSector, errBusy} {
		f := newFixture(t, 3, 64<<10)
		f.be.lose(backend.SnapshotFile, f.snapshots[0], -1, err)
		f.be.lose(backend.PackFile, f.trees, -1, err)
		found, touched, res, endErr := f.check(Options{})
		if endErr != nil {
			t.Fatal(endErr)
		}
		if !slices.Equal(res.Unread, f.snapshots[:1]) {
			t.Errorf("unread are %v", res.Unread)
		}
		f.names(found,
			[]string{"snapshot " + f.snapshots[0].Str(), "it cannot be read", err.Error()},
			[]string{"tree ", "it cannot be read", "from pack " + f.trees.Str(), err.Error()})
		if !slices.Equal(touched, []repo.ID{f.snapshots[2]}) {
			t.Errorf("touched are %v", touched)
		}
	}
	f := newFixture(t, 1, 64<<10)
	files, err := f.repo.ListFiles(t.Context(), backend.IndexFile)
	if err != nil {
		t.Fatal(err)
	}
	r, err := repo.Open(t.Context(), f.be, testPassword, repo.Options{})
	if err != nil {
		t.Fatal(err)
	}
	f.repo = r
	t.Cleanup(func() { r.Close() })
	for id := range files {
		f.be.lose(backend.IndexFile, id, -1, errSector)
		found, _, _, err := f.check(Options{})
		if err != nil {
			t.Fatal(err)
		}
		if !slices.ContainsFunc(found, func(s string) bool { return strings.Contains(s, "index "+id.Str()+": it cannot be read") }) {
			t.Errorf("found %q", found)
		}
	}
}

// TestAStoreThatIsLostEndsTheCheck, and makes no finding of what it does not give.
func TestAStoreThatIsLostEndsTheCheck(t *testing.T) {
	f := newFixture(t, 5, 64<<10)
	for _, err := range []error{errSector, errBusy, backend.NoStore(backend.PackFile, "the bucket is gone")} {
		f.be.heal()
		found, _, _, endErr := f.check(Options{ReadData: All(), Progress: func(phase string, done, _ int64) {
			if phase == PhaseData && done > 0 {
				f.be.mu.Lock()
				f.be.all = err
				f.be.mu.Unlock()
			}
		}})
		if !errors.Is(endErr, err) || !strings.Contains(endErr.Error(), "config") || len(found) > 0 {
			t.Errorf("%v: found %q, and ends with %v", err, found, endErr)
		}
	}
	// It gives some files still, and each that it does not takes all the retries.
	f.be.heal()
	for i, id := range f.packs {
		f.be.lose(backend.PackFile, id, -1, errBusy)
		found, _, _, endErr := f.check(Options{ReadData: All()})
		if i < maxUnanswered && (endErr != nil || len(found) != i+1) {
			t.Errorf("%d packs: found %q, and ends with %v", i+1, found, endErr)
		}
		if i >= maxUnanswered && (!errors.Is(endErr, errBusy) || len(found) > maxUnanswered) {
			t.Errorf("%d packs: found %q, and ends with %v", i+1, found, endErr)
		}
	}
}
