// SPDX-License-Identifier: BSD-2-Clause

package check

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/dsync-backup/dsync-backup/repo"
)

// TestPacksAreReadAsFarAsTheyFitIntoMemory has many large packs read at the same time.
func TestPacksAreReadAsFarAsTheyFitIntoMemory(t *testing.T) {
	f := newFixture(t, 1, 64<<10)
	c := &checker{repo: f.repo}
	sizes := map[repo.ID]int64{}
	var ids []repo.ID
	for i := range 12 {
		id := repo.ID{byte(i + 1)}
		ids, sizes[id] = append(ids, id), 50<<20
		if i == 5 {
			sizes[id] = 3 * maxPackBytes
		}
	}
	var mu sync.Mutex
	var held, read int64
	together := 0
	err := c.eachPack(t.Context(), ids, sizes, func(_ context.Context, id repo.ID) error {
		mu.Lock()
		read++
		if held += sizes[id]; held > maxPackBytes && held != sizes[id] {
			t.Errorf("%d bytes of packs are held at a time", held)
		}
		if held == 2*50<<20 {
			together++
		}
		mu.Unlock()
		time.Sleep(20 * time.Millisecond) // so that others come, if they may
		mu.Lock()
		held -= sizes[id]
		mu.Unlock()
		return nil
	})
	if err != nil || read != 12 || together == 0 {
		t.Errorf("%d packs were read, %d times two together: %v", read, together, err)
	}
}
