// SPDX-License-Identifier: BSD-2-Clause

package check

import (
	"slices"
	"testing"

	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/repo/backend"
)

// TestWhatIsListedAndNotThereIsDamage: a store may list a file and not give it.
func TestWhatIsListedAndNotThereIsDamage(t *testing.T) {
	f := newFixture(t, 3, 64<<10)
	if found, _, _, err := f.check(Options{ReadData: All()}); err != nil || len(found) > 0 {
		t.Fatalf("a repository that is whole: %q, %v", found, err)
	}
	f.be.lose(backend.PackFile, f.packs[1], backend.ErrNotExist)
	found, touched, res, err := f.check(Options{ReadData: All()})
	if err != nil {
		t.Fatal(err)
	}
	f.names(found, []string{"pack " + f.packs[1].Str(), "does not have it"})
	if !slices.Equal(touched, []repo.ID{f.snapshots[1]}) || !slices.Equal(res.BrokenPacks, []repo.ID{f.packs[1]}) {
		t.Errorf("touched are %v, broken %v", touched, res.BrokenPacks)
	}

	f.be.lose(backend.SnapshotFile, f.snapshots[2], backend.ErrNotExist)
	found, _, res, err = f.check(Options{})
	if err != nil {
		t.Fatal(err)
	}
	f.names(found, []string{"snapshot " + f.snapshots[2].Str(), "does not have it"})
	if len(res.Snapshots) != 2 || res.Errors != 1 {
		t.Errorf("%+v", res)
	}
}
