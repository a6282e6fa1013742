// SPDX-License-Identifier: BSD-2-Clause

package repo

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/repo/backend/faulty"
	"github.com/dsync-backup/dsync-backup/repo/backend/local"
	"github.com/dsync-backup/dsync-backup/repo/backend/retry"
)

// removable is a repository on a store that can be made to fail, behind retries,
// with so many index files to remove.
func removable(t testing.TB, files int) (*Repository, *faulty.Backend, []ID) {
	t.Helper()
	_, dir := newRepo(t, Options{})
	plain, err := local.Open(dir, local.Options{Connections: 2})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { plain.Close() })
	be := faulty.New(plain)
	o := retry.Options{Budget: 1, FirstWait: time.Microsecond, MaxWait: time.Microsecond}
	r, err := Open(t.Context(), retry.New(be, o), testPassword, Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	var ids []ID
	for i := range files {
		data := []byte{byte(i)}
		ids = append(ids, Hash(data))
		if err := be.Save(t.Context(), backend.Handle{Type: backend.IndexFile, Name: Hash(data).String()}, data); err != nil {
			t.Fatal(err)
		}
	}
	return r, be, ids
}

func TestRemovalsEndWithTheFirstThatNoRetryMended(t *testing.T) {
	r, be, ids := removable(t, 100)
	be.Inject(faulty.Rule{Ops: faulty.Remove, Skip: 10, Where: faulty.Before})
	told, stayed := map[ID]bool{}, 0
	err := r.RemoveFiles(t.Context(), backend.IndexFile, ids, func(id ID, err error) {
		if told[id] {
			t.Errorf("%s was told of twice", id.Str())
		}
		if told[id] = true; err != nil {
			stayed++
		}
	})
	if !errors.Is(err, faulty.ErrInjected) || !strings.Contains(err.Error(), "tried 2 times") {
		t.Errorf("error %v", err)
	}
	// Two at a time, each tried twice; and what was done before it went wrong.
	if n := be.Count(faulty.Remove); n > 10+2*2 {
		t.Errorf("the store was asked %d times", n)
	}
	left, err := r.ListFiles(t.Context(), backend.IndexFile)
	if err != nil || len(told) != len(ids) || stayed != 90 || len(left) != 90 {
		t.Errorf("told of %d of %d files, %d failures, %d files are left, %v", len(told), len(ids), stayed, len(left), err)
	}
}

func TestARemovalThatIsRefusedLeavesTheOthersAlone(t *testing.T) {
	r, be, ids := removable(t, 50)
	refused := backend.Permanent(errors.New("this one is locked"))
	be.Inject(faulty.Rule{Ops: faulty.Remove, Skip: 3, Times: 2, Where: faulty.Before, Err: refused})
	stayed := 0
	err := r.RemoveFiles(t.Context(), backend.IndexFile, ids, func(_ ID, err error) {
		if err != nil {
			stayed++
		}
	})
	left, lerr := r.ListFiles(t.Context(), backend.IndexFile)
	if !errors.Is(err, refused) || lerr != nil || stayed != 2 || len(left) != 2 {
		t.Errorf("%d failures, %d files are left, errors %v, %v", stayed, len(left), err, lerr)
	}
}
