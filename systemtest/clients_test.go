// SPDX-License-Identifier: BSD-2-Clause

package systemtest

import (
	"fmt"
	"path/filepath"
	"sync"
	"testing"
)

// TestManyClientsAtOnce: four clients back up their devices, and restic files,
// while snapshots are forgotten and pruned without a pause, by ours and by
// restic. Everybody waits for the locks, and whatever is kept is right.
func TestManyClientsAtOnce(t *testing.T) {
	e := lightEnv(t)
	type client struct {
		*env
		img string
		c   *content
	}
	var clients []*client
	for range 4 {
		c := newContent(random(t), true)
		own := *e.sibling(e.repo) // a cache of its own
		clients = append(clients, &client{&own, image(t, c, 4<<20), c})
	}
	files := sourceFiles(t, "archive")
	var mu sync.Mutex
	truth := map[string]string{}
	var wg sync.WaitGroup
	failed := func(res result, what string) bool {
		if res.code != 0 {
			t.Errorf("%s: %+v", what, res)
		}
		return res.code != 0
	}
	rounds := count(25, 5)
	copies := t.TempDir()
	for i, c := range clients {
		wg.Go(func() {
			f := direct(t, c.img)
			for n := range rounds {
				if _, err := writeSome(f, c.c, someBlocks(c.c.r, 4<<20, 60)); err != nil {
					t.Error(err)
					return
				}
				res := finish(t, c.command("backup", "--json", "--retry-lock", "9m", "--host", fmt.Sprint("client", i), c.img))
				if failed(res, "backup") {
					return
				}
				// Nobody else writes to the image.
				to := filepath.Join(copies, fmt.Sprintf("%d-%d", i, n))
				run(t, "cp", c.img, to)
				mu.Lock()
				truth[summary(t, res.stdout).SnapshotID.String()] = to
				mu.Unlock()
			}
		})
	}
	backups := make(chan struct{})
	var upkeep sync.WaitGroup
	upkeep.Go(func() {
		for n := 0; ; n++ {
			select {
			case <-backups:
				if n >= 4 {
					return
				}
			default:
			}
			policy := []string{"forget", "--retry-lock", "9m", "--keep-last", "2", "--prune", "--max-unused", "0"}
			if n%2 == 0 {
				failed(finish(t, e.command(policy...)), "forget and prune")
			} else {
				failed(finish(t, e.prepare(restics["0.18"], policy...)), "restic forget and prune")
			}
		}
	})
	wg.Go(func() {
		for range 3 {
			failed(finish(t, e.prepare(restics["0.18"], "backup", "--retry-lock", "9m", files)), "restic backup")
		}
	})
	wg.Wait()
	close(backups)
	upkeep.Wait()
	if t.Failed() {
		return
	}
	e.must("-q", "check", "--read-data")
	e.restic("0.18", "check", "--read-data")
	if locks := e.files("locks"); len(locks) > 0 {
		t.Errorf("locks are left: %v", locks)
	}
	devices := 0
	for _, id := range e.snapshotIDs() {
		if img, ok := truth[id]; ok {
			devices++
			e.restoresTo(id, img)
		}
	}
	if devices != 8 {
		t.Errorf("%d snapshots of 4 devices are kept, 2 of each were to be", devices)
	}
}
