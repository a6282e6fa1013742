// SPDX-License-Identifier: BSD-2-Clause

package systemtest

import (
	"encoding/json"
	"path/filepath"
	"testing"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/snapshot"
)

// heldBy is what `track status --json` says of a repository.
type heldBy struct {
	Repository  string `json:"repository"`
	Location    string `json:"location"`
	Snapshot    string `json:"snapshot"`
	DirtyBlocks int64  `json:"dirty_blocks"`
	Reason      string `json:"reason"`
}

func (e *env) heldBy(path string) map[string]heldBy {
	e.t.Helper()
	var list []struct {
		Repositories []heldBy `json:"repositories"`
	}
	out := e.must("track", "status", path, "--json")
	if err := json.Unmarshal([]byte(out), &list); err != nil || len(list) != 1 {
		e.t.Fatalf("%v: %s", err, out)
	}
	held := map[string]heldBy{}
	for _, h := range list[0].Repositories {
		held[h.Location] = h
	}
	return held
}

// TestTwoRepositoriesWithSchedulesOfTheirOwn backs up one device to two
// repositories at random. Each reads only what was written since its own last
// snapshot, and the status says beforehand how much that is.
func TestTwoRepositoriesWithSchedulesOfTheirOwn(t *testing.T) {
	rounds := count(50, 12)
	rng := random(t)
	const size = 64 << 20
	a := lightEnv(t)
	b := a.sibling(filepath.Join(t.TempDir(), "b"))
	b.initLight()
	d := newDisk(t, size)
	d.track(a)
	f := direct(t, d.path)
	c := newContent(rng, true)
	dirty := map[*env]*kernel.Bitmap{} // the model; nil before the first backup
	for round := range rounds {
		blocks := someBlocks(rng, size, 1+rng.IntN(300))
		writeBlocks(t, f, c, blocks)
		for _, m := range dirty {
			for _, i := range blocks {
				m.Set(i)
			}
		}
		held := a.heldBy(d.path)
		for e, m := range dirty {
			if h := held[e.repo]; h.DirtyBlocks != m.Count() || h.Reason != "" {
				t.Fatalf("round %d: the status says %+v of %s, want %d blocks", round, h, e.repo, m.Count())
			}
		}
		e := a
		if rng.IntN(4) == 0 || round == 3 {
			e = b
		}
		s := e.backup(d.path, "--spot-check", "0")
		if m := dirty[e]; m == nil {
			if s.Changes != snapshot.ChangesFull {
				t.Fatalf("round %d: %+v", round, s)
			}
		} else if s.Changes != snapshot.ChangesTracker || s.BytesRead != m.Count()*kernel.BlockSize {
			t.Fatalf("round %d: read %d bytes from %s, want %d blocks: %s", round, s.BytesRead, s.Changes, m.Count(), s.FallbackReason)
		}
		dirty[e] = kernel.NewBitmap(kernel.BlocksOf(size))
		if round%5 == 4 || round == rounds-1 {
			e.sameAtRest(d)
		}
	}
	for _, e := range []*env{a, b} {
		e.backup(d.path)
		e.sameAtRest(d)
		e.check()
	}
}
