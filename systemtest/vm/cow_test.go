// SPDX-License-Identifier: BSD-2-Clause

package vm

import (
	"fmt"
	"strings"
	"testing"

	"github.com/dsync-backup/dsync-backup/snapshot"
)

// File systems in use are backed up by a device-mapper snapshot: each image is
// what the snapshot held, bit for bit, and what a crash at that instant would have
// left.
func TestSnapshotsOfBusyFileSystems(t *testing.T) {
	t.Parallel()
	for n, fs := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(fs, func(t *testing.T) {
			Turn(t, n+1, func(t *testing.T, k Kernel) {
				g := newBusyGuest(t, k, fs, byDM)
				for round := range rounds() {
					g.start()
					committed := g.committed()
					s := g.backup(g.copySnapshot, g.slowly()...)
					want := snapshot.ChangesTracker
					if round == 0 {
						want = snapshot.ChangesFull
					}
					if s.PointInTime != "dm" || s.Changes != want || s.FreezeSeconds <= 0 {
						t.Errorf("round %d: %+v", round, s)
					}
					g.tidy()
					g.stop()
					g.checkCopied(committed)
				}
			})
		})
	}
}

// What a snapshot needs can run out, or be pulled away: the backup fails, and nothing
// else does.
func TestSnapshotsThatFail(t *testing.T) {
	Turn(t, 0, func(t *testing.T, k Kernel) {
		g := newBusyGuest(t, k, "ext4", byDM)
		g.start()
		g.backup(nil)
		g.stop()
		fails := func(during func(), words []string, args ...string) {
			t.Helper()
			p := g.Machine.Start(Command{Args: g.in(append([]string{"dsync-backup", "backup", g.device}, args...)...)})
			if during != nil {
				g.awaitSnapshot()
				during()
			}
			r := p.Wait()
			if r.Status == 0 {
				t.Errorf("backup %v: went well", args)
			}
			for _, w := range words {
				if !strings.Contains(string(r.Stderr), w) {
					t.Errorf("backup %v: %q has no %q", args, r.Stderr, w)
				}
			}
			g.Shell("echo writable >/mnt/writable; sync")
			g.tidy()
			if n := strings.Count(g.Run(g.in("dsync-backup", "--json", "snapshots")...), `"short_id"`); n != 1 {
				t.Errorf("backup %v: %d snapshots", args, n)
			}
		}
		fill := func() {
			g.Shell("for i in 1 2 3 4 5 6; do dd if=/dev/urandom of=/mnt/fill$i bs=1M count=2 conv=fsync 2>/dev/null; done")
		}
		// Overwritten, not new: what is free is copied out all the same.
		fill()
		fails(fill, []string{"copy-on-write space is full", "--cow"}, "--cow", "memory:4M", "--limit-upload", "1024")
		fails(nil, []string{"lies on /mnt", "--cow"}, "--cow", "/mnt/space:16M")
		fails(nil, []string{"no size"}, "--cow", "memory:lots")
		fails(nil, []string{"in use"}, "--cow", g.Device("data"))
		fails(nil, []string{"freeze took too long: more than 1ms"}, "--max-freeze", "1ms")
		fails(nil, []string{"freeze"}, "--snapshot", "precopy", "--max-freeze", "1ms")
		fails(func() {
			r := g.Try(g.in("dsync-backup", "backup", g.device)...)
			if r.Status != 1 || !strings.Contains(string(r.Stderr), "another backup reads a snapshot") {
				t.Errorf("two at once: %s", r.Stderr)
			}
			// What is read cannot be taken away; it can be broken.
			for _, away := range [][]string{
				{"dmsetup", "remove", "data-dm"},
				{"dmsetup", "remove", "data-dm-cow"},
				{"dmsetup", "remove", "data-dm-origin"},
				g.in("dsync-backup", "track", "stop", mapped),
				{"rmmod", "dm_dsync"},
			} {
				if r := g.Try(away...); r.Status == 0 {
					t.Errorf("%v: went well while a backup reads", away)
				}
			}
			g.Shell("dmsetup wipe_table --force data-dm-cow")
		}, []string{"snapshot of " + mapped}, "--limit-upload", "1024")

		// Killed while the snapshot is there: the next one clears up.
		p := g.Machine.Start(Command{Args: g.in("dsync-backup", "backup", g.device, "--limit-upload", "512")})
		g.awaitSnapshot()
		g.Shell("kill -9 $(pidof dsync-backup)")
		p.Wait()
		g.Shell("echo more >/mnt/more; sync")
		g.start()
		committed := g.committed()
		s := g.backup(nil)
		if s.Changes != snapshot.ChangesTracker {
			t.Errorf("after the failures: %+v", s)
		}
		g.stop()
		g.tidy()
		g.check(committed)

		// Nearly full is said, and is no failure.
		p = g.Machine.Start(Command{Args: g.in("dsync-backup", "backup", g.device, "--changes", "full", "--cow", "memory:4M", "--limit-upload", "1024")})
		g.awaitSnapshot()
		g.Shell(`i=0; while :; do
			dd if=/dev/urandom of=/mnt/fill$((i/8%6+1)) bs=256k count=1 seek=$((i%8)) conv=notrunc,fsync 2>/dev/null; i=$((i+1))
			set -- $(dmsetup status data-dm-cow); used=${4%/*} all=${4#*/}
			[ $((used*100)) -lt $((all*83)) ] || break
		done; sleep 2`)
		if r := p.Wait(); r.Err != nil || !strings.Contains(string(r.Stderr), "% full; when it is full") {
			t.Errorf("nearly full: %v: %s", r.Err, r.Stderr)
		}
		g.tidy()

		// Its own state directory and its output on it: no file is written there while
		// it stands still. The repository on it is refused where there is a freeze for
		// longer than a moment.
		g.Shell("mkdir -p /mnt/state; cp -a /tmp/state/. /mnt/state/")
		out := g.Shell(strings.Join(g.in("env", "DSYNC_STATE_DIR=/mnt/state", "dsync-backup", "--json", "-v", "backup", g.device), " ") + " >/mnt/output 2>&1; tail -n 1 /mnt/output")
		if !strings.Contains(out, `"changes":"tracker"`) {
			t.Errorf("with state and output on the device: %s", out)
		}
		g.tidy()
		putRepository(t, g.Machine, "/mnt/repo")
		wantRefused(t, g.Machine, []string{"/mnt/repo lies on /mnt", "frozen"}, g.in("dsync-backup", "-r", "/mnt/repo", "backup", g.device, "--snapshot", "precopy")...)
		g.Run(g.in("dsync-backup", "-r", "/mnt/repo", "backup", g.device)...)
		g.tidy()
		g.Run("umount", "/mnt")
		g.Run("dsync-backup", "track", "stop", mapped)
	})
}

// A backup that is killed while the device stands still leaves it going, by its
// watchdog.
func TestAKilledSuspensionEnds(t *testing.T) {
	Turn(t, 1, func(t *testing.T, k Kernel) {
		g := newBusyGuest(t, k, "ext4", byDM)
		g.start()
		g.backup(nil)
		rounds := 5
		if soak() {
			rounds = 50
		}
		still := 0
		for i := range rounds {
			// At once, and later: what is done by then differs. What a kill leaves behind the next
			// backup clears away, and that, too, can be killed: every other time at once.
			late := i * i
			if i%2 == 1 {
				late = 0
			}
			out := g.Run(g.in("catch", "-kill", "/sys/block/dm-0/dm/suspended", fmt.Sprintf("%dms", late), "dsync-backup", "backup", g.device)...)
			if out == "still" {
				still++
			}
			g.Shell("timeout 60 sh -c 'echo alive >/mnt/alive; sync'")
		}
		t.Logf("killed %d times, %d of them while it stood still", rounds, still)
		if still == 0 {
			t.Error("no kill came in time")
		}
		committed := g.committed()
		if s := g.backup(nil); s.Changes != snapshot.ChangesTracker {
			t.Errorf("after the kills: %+v", s)
		}
		g.stop()
		g.tidy()
		g.check(committed)
	})
}
