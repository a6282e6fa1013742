// SPDX-License-Identifier: BSD-2-Clause

package vm

import (
	"testing"

	"github.com/dsync-backup/dsync-backup/snapshot"
)

// File systems in use are copied while they are, under both trackers: each image is
// what the device held during the freeze, bit for bit.
func TestPrecopyOfBusyFileSystems(t *testing.T) {
	t.Parallel()
	type load struct {
		fs string
		way
	}
	loads := []load{{"ext4", byPrecopyDM}, {"ext4", byPrecopyBPF}, {"xfs", byPrecopyDM}, {"btrfs", byPrecopyDM}}
	if soak() { // systemtest has these on the host's kernel
		loads = append(loads, load{"xfs", byPrecopyBPF}, load{"btrfs", byPrecopyBPF})
	}
	for n, c := range loads {
		t.Run(c.fs+" "+c.tracker, func(t *testing.T) {
			Turn(t, n, func(t *testing.T, k Kernel) {
				g := newBusyGuest(t, k, c.fs, c.way)
				for round := range rounds() {
					g.start()
					committed := g.committed()
					s := g.backupCaught("--snapshot", "precopy")
					want := snapshot.ChangesTracker
					if round == 0 && s.Parent == nil {
						want = snapshot.ChangesFull
					}
					if s.PointInTime != "precopy" || s.Changes != want || s.FreezeSeconds <= 0 || s.Rounds < 1 {
						t.Errorf("round %d: %+v", round, s)
					}
					g.stop()
					g.checkCopied(committed)
				}
			})
		})
	}
}
