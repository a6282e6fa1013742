// SPDX-License-Identifier: BSD-2-Clause

package vm

import (
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/dsync-backup/dsync-backup/snapshot"
)

const (
	cowDisk = 128 << 20
	mapped  = "/dev/mapper/data-dm"
)

// busyGuest is a guest with a disk that the kernel module tracks, or a logical
// volume, a file system on it, and programs that write to that.
type busyGuest struct {
	*Machine
	t      *testing.T
	way    string // of --snapshot: "dm" or "lvm"
	device string // what is backed up
	snap   string // pattern of the device-mapper name of its snapshot
	in     func(...string) []string
	load   *Process
}

func newBusyGuest(t *testing.T, k Kernel, fs, way string) *busyGuest {
	t.Helper()
	size := int64(cowDisk)
	if fs == "xfs" {
		size = 320 << 20
	}
	data := size
	modules := []string{"loop", "dm-mod", "dm-snapshot", fs}
	if way == "lvm" {
		data += 100 << 20
	} else {
		modules = append(modules, dsyncModule(t, k))
	}
	m := Start(t, k, Config{
		Memory: 1536, Backup: true, Scratch: 1200, Modules: modules,
		Tools: []string{"dmsetup", "mkfs." + fs, "fsck.ext4", "xfs_repair", "btrfs", "fsfreeze", "lvm"},
		Disks: []Disk{{Name: "data", Size: data}, {Name: "target", Size: size}, {Name: "copy", Size: size}},
	})
	m.Shell("mkdir -p /mnt /tmp/state /run/load; echo secret >/root/password")
	g := &busyGuest{Machine: m, t: t, way: way, device: mapped, snap: "data-dm-cow", in: func(args ...string) []string {
		return append([]string{
			"env", "RESTIC_REPOSITORY=/tmp/repo", "RESTIC_PASSWORD_FILE=/root/password", "DSYNC_STATE_DIR=/tmp/state",
		}, args...)
	}}
	m.Run(g.in("dsync-backup", "init")...)
	if way == "lvm" {
		g.device, g.snap = "/dev/vg/lv", "vg-dsync[^:]*"
		m.Run("lvm", "pvcreate", "-q", m.Device("data"))
		m.Run("lvm", "vgcreate", "-q", "vg", m.Device("data"))
		m.Run("lvm", "lvcreate", "-q", "-y", "-n", "lv", "-L", fmt.Sprintf("%db", size), "vg")
	} else {
		m.Run("dsync-backup", "--state-dir", "/tmp/state", "track", "start", m.Device("data"), "--tracker", "dm", "--as", "data-dm")
	}
	m.Run("mkfs."+fs, "-q", g.device)
	m.Run("mount", "-t", fs, g.device, "/mnt")
	return g
}

// loadScript commits numbered records with fsync, says which are committed, and
// makes, changes and removes files beside it.
const loadScript = `
( n=1; while [ -e /run/load/go ]; do
    echo $n >/run/load/record
    dd if=/run/load/record of=/mnt/log oflag=append conv=notrunc,fsync 2>/dev/null || exit 1
    echo $n >/run/load/new; mv /run/load/new /run/load/committed
    n=$((n+1))
  done ) &
i=0; while [ -e /run/load/go ]; do
  i=$(((i+7)%20))
  dd if=/dev/urandom of=/mnt/file$i bs=16k count=$((i%5+1)) 2>/dev/null
  dd if=/dev/urandom of=/mnt/file$(((i+3)%20)) bs=4k seek=3 count=2 conv=notrunc 2>/dev/null
  [ $i = 14 ] && rm -f /mnt/file5
  sleep 0.05
done
wait
`

func (g *busyGuest) start() {
	g.t.Helper()
	g.Shell(": >/run/load/go; rm -f /run/load/committed /mnt/log")
	g.load = g.Machine.Start(Command{Args: []string{"sh", "-c", loadScript}})
	g.Shell("while [ ! -e /run/load/committed ]; do sleep 0.1; done")
}

func (g *busyGuest) stop() {
	g.t.Helper()
	g.Run("rm", "/run/load/go")
	if r := g.load.Wait(); r.Err != nil {
		g.t.Errorf("the load: %v: %s", r.Err, r.Stderr)
	}
}

func (g *busyGuest) committed() int {
	g.t.Helper()
	n, err := strconv.Atoi(g.Run("cat", "/run/load/committed"))
	if err != nil {
		g.t.Fatal(err)
	}
	return n
}

// backup runs one, and calls during while the snapshot of it is there.
func (g *busyGuest) backup(during func(), args ...string) (s snapshot.Summary) {
	g.t.Helper()
	p := g.Machine.Start(Command{Args: g.in(append([]string{"dsync-backup", "--json", "backup", g.device}, args...)...)})
	if during != nil {
		g.awaitSnapshot()
		during()
	}
	r := p.Wait()
	lines := strings.Split(strings.TrimSpace(string(r.Stdout)), "\n")
	if r.Err != nil || json.Unmarshal([]byte(lines[len(lines)-1]), &s) != nil {
		g.t.Fatalf("backup: %v: %s%s", r.Err, r.Stdout, r.Stderr)
	}
	return s
}

// awaitSnapshot waits until there is one.
func (g *busyGuest) awaitSnapshot() {
	g.t.Helper()
	g.Shell("while ! dmsetup status | grep -q '^" + g.snap + ": .* snapshot '; do sleep 0.05; done")
}

// copySnapshot copies what the snapshot holds, while the backup is stopped.
func (g *busyGuest) copySnapshot() {
	g.t.Helper()
	g.Shell("kill -STOP $(pidof dsync-backup); name=$(dmsetup status | sed -n 's/^\\(" + g.snap + "\\): .* snapshot .*/\\1/p'); " +
		"dd if=/dev/dm-$(dmsetup info -c --noheadings -o minor $name) of=" + g.Device("copy") + " bs=1M iflag=direct 2>/dev/null; kill -CONT $(pidof dsync-backup)")
}

// tidy fails the test if anything of a snapshot is left.
func (g *busyGuest) tidy() {
	g.t.Helper()
	if out := g.Run("dmsetup", "ls"); strings.Contains(out, "-cow") || strings.Contains(out, "-origin") {
		g.t.Errorf("left: %s", out)
	}
	if out := g.Shell("cat /sys/block/loop*/loop/backing_file 2>/dev/null || true"); out != "" {
		g.t.Errorf("left: %s", out)
	}
	if g.way == "lvm" {
		if out := g.Run("lvm", "lvs", "-a", "--noheadings", "-o", "lv_name"); out != "lv" {
			g.t.Errorf("left: %s", out)
		}
		if out := g.Run("dmsetup", "table", "vg-lv"); !strings.Contains(out, " linear ") {
			g.t.Errorf("the table is %s", out)
		}
		return
	}
	if out := g.Run("dmsetup", "table", "data-dm"); !strings.Contains(out, "dsync 25") {
		g.t.Errorf("the table is %s", out)
	}
}

// check restores the latest snapshot and looks into it.
func (g *busyGuest) check(fs string, atLeast int) {
	g.t.Helper()
	g.Run(g.in("dsync-backup", "restore", "latest", g.Device("target"), "--force")...)
	g.checkTarget(fs, atLeast)
}

func (g *busyGuest) checkTarget(fs string, atLeast int) {
	g.t.Helper()
	target := g.Device("target")
	// The journal is replayed by the mount: what a crash would have left is whole.
	opts := "rw"
	if fs == "xfs" {
		opts = "rw,nouuid"
	}
	if fs == "btrfs" {
		g.Run("umount", "/mnt") // it knows a file system by its ID alone
	}
	g.Shell(fmt.Sprintf("mkdir -p /look; mount -t %s -o %s %s /look", fs, opts, target))
	log := strings.Fields(g.Run("cat", "/look/log"))
	g.Run("umount", "/look")
	switch fs {
	case "ext4":
		g.Run("fsck.ext4", "-fn", target)
	case "xfs":
		g.Run("xfs_repair", "-n", target)
	case "btrfs":
		g.Run("btrfs", "check", target)
		g.Run("mount", "-t", fs, g.device, "/mnt")
	}
	for i, record := range log {
		if record != strconv.Itoa(i+1) {
			g.t.Errorf("record %d is %q", i+1, record)
			break
		}
	}
	if len(log) < atLeast {
		g.t.Errorf("%d records, but %d were committed before the backup began", len(log), atLeast)
	}
}

// File systems in use are backed up by a device-mapper snapshot: each image is
// what the snapshot held, bit for bit, and what a crash at that instant would have
// left.
func TestSnapshotsOfBusyFileSystems(t *testing.T) {
	rounds := 3
	if os.Getenv("SOAK") != "" {
		rounds = 10
	}
	for n, fs := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(fs, func(t *testing.T) {
			Turn(t, n+1, func(t *testing.T, k Kernel) {
				g := newBusyGuest(t, k, fs, "dm")
				for round := range rounds {
					g.start()
					committed := g.committed()
					s := g.backup(g.copySnapshot, "--limit-upload", "4096")
					want := snapshot.ChangesTracker
					if round == 0 {
						want = snapshot.ChangesFull
					}
					if s.PointInTime != "dm" || s.Changes != want || s.FreezeSeconds <= 0 || s.FreezeSeconds > 10 {
						t.Errorf("round %d: %+v", round, s)
					}
					t.Logf("round %d: dirty %d, read %d, frozen %.3f s", round, s.DirtyBytes, s.BytesRead, s.FreezeSeconds)
					g.tidy()
					g.stop()
					g.Run(g.in("dsync-backup", "restore", "latest", g.Device("target"), "--force")...)
					g.Run("cmp", g.Device("copy"), g.Device("target"))
					g.checkTarget(fs, committed)
				}
			})
		})
	}
}

// What a snapshot needs can run out, or be pulled away: the backup fails, and nothing
// else does.
func TestSnapshotsThatFail(t *testing.T) {
	Turn(t, 0, func(t *testing.T, k Kernel) {
		g := newBusyGuest(t, k, "ext4", "dm")
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
			g.Shell("for i in 1 2 3 4 5 6; do dd if=/dev/urandom of=/mnt/fill$i bs=1M count=4 conv=fsync 2>/dev/null; done")
		}
		// Overwritten, not new: what is free is copied out all the same.
		fill()
		fails(fill, []string{"copy-on-write space is full", "--cow"}, "--cow", "memory:4M", "--limit-upload", "1024")
		fails(nil, []string{"lies on /mnt", "--cow"}, "--cow", "/mnt/space:16M")
		fails(nil, []string{"no size"}, "--cow", "memory:lots")
		fails(nil, []string{"in use"}, "--cow", g.Device("data"))
		fails(func() {
			r := g.Try(g.in("dsync-backup", "backup", g.device)...)
			if r.Status != 1 || !strings.Contains(string(r.Stderr), "another backup reads a snapshot") {
				t.Errorf("two at once: %s", r.Stderr)
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
		g.check("ext4", committed)

		// Its own state directory on it: no file is written there while it stands still.
		g.Shell("mkdir -p /mnt/state; cp -a /tmp/state/. /mnt/state/")
		r := g.Try(g.in("env", "DSYNC_STATE_DIR=/mnt/state", "dsync-backup", "backup", g.device)...)
		if r.Err != nil {
			t.Errorf("with the state directory on the device: %s", r.Stderr)
		}
		g.tidy()
		g.Run("umount", "/mnt")
		g.Run("dsync-backup", "track", "stop", mapped)
	})
}

// A backup that is killed while the device stands still leaves it going, by its
// watchdog.
func TestAKilledSuspensionEnds(t *testing.T) {
	Turn(t, 1, func(t *testing.T, k Kernel) {
		g := newBusyGuest(t, k, "ext4", "dm")
		g.start()
		g.backup(nil)
		rounds := 5
		if os.Getenv("SOAK") != "" {
			rounds = 50
		}
		still := 0
		for i := range rounds {
			p := g.Machine.Start(Command{Args: g.in("dsync-backup", "backup", g.device)})
			// The guest looks for the moment itself: it lasts milliseconds.
			out := g.Shell(fmt.Sprintf(`
				for n in $(seq 2000); do
					s=$(cat /sys/block/dm-0/dm/suspended)
					[ "$s" = 1 ] && break
					[ -e /proc/$(pidof -s dsync-backup || echo none) ] || [ $n -lt 50 ] || break
				done
				[ %d = 0 ] || [ "$s" = 1 ] || sleep 0.0%d
				kill -9 $(ps -o pid,args | awk '/dsync-backup backup/ && !/awk/ {print $1}') 2>/dev/null; echo $s`, i, i+1))
			if strings.HasSuffix(out, "1") {
				still++
			}
			p.Wait()
			g.Shell("timeout 20 sh -c 'echo alive >/mnt/alive; sync'")
		}
		t.Logf("killed %d times, %d of them while it stood still", rounds, still)
		time.Sleep(time.Second)
		committed := g.committed()
		if s := g.backup(nil); s.Changes != snapshot.ChangesTracker {
			t.Errorf("after the kills: %+v", s)
		}
		g.stop()
		g.tidy()
		g.check("ext4", committed)
	})
}
