// SPDX-License-Identifier: BSD-2-Clause

package systemtest

import (
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/snapshot"
)

// TestTwoBackupsOfADeviceAtOnce has two processes back up one device to one repository
// at the same time. Both snapshots are what the device holds, and none reads
// more than what was written since the round before. Where a backup claims the device,
// one of the two may come too late; then it says so, and what it would have
// stored is in the other's snapshot.
func TestTwoBackupsOfADeviceAtOnce(t *testing.T) {
	const size = 64 << 20
	rng := random(t)
	e := lightEnv(t)
	d := newDisk(t, size)
	d.track(e)
	f := direct(t, d.path)
	c := newContent(rng, true)
	writeBlocks(t, f, c, someBlocks(rng, size, 2000))
	e.backup(d.path)
	for round := range count(50, 8) {
		n := 1 + rng.IntN(400)
		writeBlocks(t, f, c, someBlocks(rng, size, n))
		args := []string{"backup", "--json", d.path}
		if round%2 == 0 {
			args = append(args, "--snapshot", "none")
		}
		results := make([]result, 2)
		var both sync.WaitGroup
		for i := range results {
			cmd := e.command(args...)
			both.Go(func() { results[i] = finish(t, cmd) })
		}
		both.Wait()
		done := 0
		for _, r := range results {
			if r.code != 0 {
				if round%2 == 0 || r.code != 1 || !strings.Contains(r.stderr, "in use") {
					t.Fatalf("round %d: %+v", round, r)
				}
				continue
			}
			done++
			s := summary(t, r.stdout)
			if s.Changes != snapshot.ChangesTracker || s.BytesRead-s.SpotCheckedBytes > int64(n)*kernel.BlockSize {
				t.Errorf("round %d: %d blocks were written, read %d bytes from %s: %s", round, n, s.BytesRead, s.Changes, s.FallbackReason)
			}
			file := filepath.Join(t.TempDir(), "restored")
			e.must("restore", s.SnapshotID.String(), file)
			same(t, d.file, file)
		}
		if done == 0 {
			t.Fatalf("round %d: neither came to an end: %+v", round, results)
		}
	}
	e.check()
}
