// SPDX-License-Identifier: BSD-2-Clause

package index

import (
	"slices"
	"sync"
	"testing"

	"github.com/dsync-backup/dsync-backup/repo/pack"
)

// A table of more pages than are kept answers many at once as it should, and reads a page that is
// kept from memory.
func TestPagesThatAreKeptAreTheRightOnes(t *testing.T) {
	rng := newRand(t)
	packs := randomPacks(rng, 6000, 60)
	m := model{}
	m.add(packs)
	table := open(t, buildTable(t, pack.ID{9}, packs))
	if n := len(table.directory); n < recentPages*5/4 {
		t.Fatalf("the table has only %d pages of entries", n)
	}
	handles := slices.Collect(func(yield func(pack.Handle) bool) {
		for h := range m {
			if !yield(h) {
				return
			}
		}
	})
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			for i := range handles {
				h := handles[(i*7919+g*len(handles)/8)%len(handles)]
				got, err := table.Find(nil, h, false)
				if err != nil || !slices.Equal(sorted(got), sorted(m[h])) {
					t.Errorf("%s: found at %v, want %v: %v", h, got, m[h], err)
					return
				}
			}
		})
	}
	wg.Wait()
	h := handles[0]
	want, err := table.Find(nil, h, false)
	if err != nil {
		t.Fatal(err)
	}
	table.r = nothing{}
	if got, err := table.Find(nil, h, false); err != nil || !slices.Equal(got, want) {
		t.Errorf("what was found before is not found without the file: %v", err)
	}
}

// nothing is a file that must not be read.
type nothing struct{}

func (nothing) ReadAt([]byte, int64) (int, error) { panic("the file was read") }
