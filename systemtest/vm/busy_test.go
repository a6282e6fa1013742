// SPDX-License-Identifier: BSD-2-Clause

package vm

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"testing"

	"github.com/dsync-backup/dsync-backup/snapshot"
)

const mapped = "/dev/mapper/data-dm"

// way is how a busy guest's device is tracked and held still.
type way struct{ tracker, snapshot string }

var (
	byDM         = way{"dm", "dm"}
	byLVM        = way{"", "lvm"} // the scenario starts the tracker
	byPrecopyDM  = way{"dm", "precopy"}
	byPrecopyBPF = way{"bpf", "precopy"}
)

// busyGuest is a guest with a tracked disk or a logical volume, a file system on it,
// and programs that write to that.
type busyGuest struct {
	*Machine
	t      *testing.T
	way    way
	fs     string
	device string // what is backed up
	snap   string // pattern of the device-mapper name of its snapshot
	in     func(...string) []string
	load   *Process
}

func newBusyGuest(t *testing.T, k Kernel, fs string, w way) *busyGuest {
	t.Helper()
	size := map[string]int64{"ext4": 64 << 20, "xfs": 80 << 20, "btrfs": 128 << 20}[fs] // about what each needs
	data := size
	modules := []string{"loop", "dm-mod", "dm-snapshot", fs}
	if w == byLVM {
		data += 100 << 20
	}
	if w.tracker == "dm" {
		modules = append(modules, dsyncModule(t, k))
	}
	catch, err := buildProgram("./systemtest/vm/catch")
	if err != nil {
		t.Fatal(err)
	}
	m := Start(t, k, Config{
		Memory: 1536, Backup: true, Scratch: 1200, Modules: modules, Files: map[string]string{"/usr/bin/catch": catch},
		Tools: []string{"dmsetup", "mkfs." + fs, "fsck.ext4", "xfs_repair", "btrfs", "lvm", "cmp", "sqlite3"},
		Disks: []Disk{
			{Name: "data", Size: data, Cache: "unsafe"}, {Name: "target", Size: size, Cache: "unsafe"}, {Name: "copy", Size: size, Cache: "unsafe"},
		},
	})
	m.Run("mkdir", "-p", "/mnt", "/tmp/state", "/run/load")
	g := &busyGuest{Machine: m, t: t, way: w, fs: fs, device: mapped, snap: "data-dm-cow", in: func(args ...string) []string {
		return append([]string{
			"env", "RESTIC_REPOSITORY=/tmp/repo", "RESTIC_PASSWORD_FILE=/root/password", "DSYNC_STATE_DIR=/tmp/state",
		}, args...)
	}}
	putRepository(t, m, "/tmp/repo")
	switch {
	case w == byLVM:
		g.device, g.snap = "/dev/vg/lv", "vg-dsync[^:]*"
		m.Run("lvm", "pvcreate", "-q", m.Device("data"))
		m.Run("lvm", "vgcreate", "-q", "vg", m.Device("data"))
		m.Run("lvm", "lvcreate", "-q", "-y", "-n", "lv", "-L", fmt.Sprintf("%db", size), "vg")
	case w.tracker == "dm":
		g.track("--as", "data-dm")
	default:
		g.device = m.Device("data")
		g.track()
	}
	// The variables are those of the kernel's own tests, to which mkfs.xfs grants a small one.
	m.Run("env", "TEST_DIR=/mnt", "TEST_DEV="+g.device, "QA_CHECK_FS=1", "mkfs."+fs, "-q", g.device)
	m.Run("mount", "-t", fs, g.device, "/mnt")
	return g
}

// track starts the tracker.
func (g *busyGuest) track(args ...string) {
	g.t.Helper()
	device, tracker := g.Device("data"), g.way.tracker
	if g.way == byLVM {
		device, tracker = g.device, "bpf"
	}
	g.Run(g.in(append([]string{"dsync-backup", "track", "start", device, "--tracker", tracker}, args...)...)...)
}

// loadScript commits numbered records to a database, says which are committed, and
// makes, changes and removes files beside it.
const loadScript = `
( n=1; while [ -e /run/load/go ]; do
    sqlite3 /mnt/db "PRAGMA synchronous=EXTRA; INSERT INTO log VALUES($n, hex(randomblob(600)))" || exit 1
    echo $n >/run/load/new; mv /run/load/new /run/load/committed
    n=$((n+1)); sleep 0.1
  done ) &
i=0; while [ -e /run/load/go ]; do
  i=$(((i+7)%20))
  dd if=/dev/urandom of=/mnt/file$i bs=16k count=$((i%5+1)) 2>/dev/null
  dd if=/dev/urandom of=/mnt/file$(((i+3)%20)) bs=4k seek=3 count=2 conv=notrunc 2>/dev/null
  [ $i = 14 ] && rm -f /mnt/file5
  sleep 0.2
done
wait $! || exit 1
`

func (g *busyGuest) start() {
	g.t.Helper()
	g.Shell(`: >/run/load/go; rm -f /run/load/committed; sqlite3 /mnt/db "DROP TABLE IF EXISTS log; CREATE TABLE log(n INTEGER PRIMARY KEY, data)"`)
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

// committed is the last record of which the database said that it is durable.
func (g *busyGuest) committed() int {
	g.t.Helper()
	n, err := strconv.Atoi(g.Run("cat", "/run/load/committed"))
	if err != nil {
		g.t.Fatal(err)
	}
	return n
}

// backup runs one, and calls during while the snapshot of it is there.
func (g *busyGuest) backup(during func(), args ...string) snapshot.Summary {
	g.t.Helper()
	p := g.Machine.Start(Command{Args: g.in(append([]string{"dsync-backup", "--json", "backup", g.device}, args...)...)})
	if during != nil {
		g.awaitSnapshot()
		during()
	}
	return g.summary(p.Wait())
}

// backupCaught runs a backup that freezes, and copies what the device holds then.
func (g *busyGuest) backupCaught(args ...string) snapshot.Summary {
	g.t.Helper()
	for range 10 {
		s := g.summary(g.Try(g.in(append([]string{
			"catch", "/mnt/probe", g.device, g.Device("copy"), "dsync-backup", "--json", "backup", g.device, "--max-freeze", "2m",
		}, args...)...)...))
		if g.Try("test", "-e", "/run/caught").Err == nil {
			return s
		}
		g.t.Logf("the freeze of %.3f s went by unseen", s.FreezeSeconds)
	}
	g.t.Fatal("no freeze was seen")
	return snapshot.Summary{}
}

func (g *busyGuest) summary(r Result) (s snapshot.Summary) {
	g.t.Helper()
	lines := strings.Split(strings.TrimSpace(string(r.Stdout)), "\n")
	if r.Err != nil || json.Unmarshal([]byte(lines[len(lines)-1]), &s) != nil {
		g.t.Fatalf("backup: %v: %s%s", r.Err, r.Stdout, r.Stderr)
	}
	g.t.Logf("%s by %s: %d copies, dirty %d, read %d, frozen %.3f s %s", s.Changes, s.PointInTime, s.Rounds, s.DirtyBytes, s.BytesRead, s.FreezeSeconds, s.FallbackReason)
	return s
}

// slowly makes a backup of what the load has changed take some seconds, in which the
// snapshot is there. btrfs changes more.
func (g *busyGuest) slowly() []string {
	return []string{"--limit-upload", map[string]string{"ext4": "512", "xfs": "512", "btrfs": "2048"}[g.fs]}
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
		"dd if=/dev/dm-$(dmsetup info -c --noheadings -o minor $name) of=" + g.Device("copy") + " bs=1M iflag=direct oflag=direct 2>/dev/null; kill -CONT $(pidof dsync-backup)")
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
	if g.way == byLVM {
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
func (g *busyGuest) check(atLeast int) {
	g.t.Helper()
	g.Run(g.in("dsync-backup", "restore", "latest", g.Device("target"), "--force")...)
	g.checkTarget(atLeast)
}

// checkCopied does the same, and the image must be what was copied.
func (g *busyGuest) checkCopied(atLeast int) {
	g.t.Helper()
	g.Run(g.in("dsync-backup", "restore", "latest", g.Device("target"), "--force")...)
	g.Run("cmp", g.Device("copy"), g.Device("target"))
	g.checkTarget(atLeast)
}

func (g *busyGuest) checkTarget(atLeast int) {
	g.t.Helper()
	target := g.Device("target")
	// The journal is replayed by the mount: what a crash would have left is whole.
	opts := "rw"
	if g.fs == "xfs" {
		opts = "rw,nouuid"
	}
	if g.fs == "btrfs" {
		g.Run("umount", "/mnt") // it knows a file system by its ID alone
	}
	g.Shell(fmt.Sprintf("mkdir -p /look; mount -t %s -o %s %s /look", g.fs, opts, target))
	db := g.Run("sqlite3", "/look/db", "PRAGMA integrity_check; SELECT count(*), min(n), max(n) FROM log")
	g.Run("umount", "/look")
	switch g.fs {
	case "ext4":
		g.Run("fsck.ext4", "-fn", target)
	case "xfs":
		g.Run("xfs_repair", "-n", target)
	case "btrfs":
		g.Run("btrfs", "check", target)
		g.Run("mount", "-t", g.fs, g.device, "/mnt")
	}
	var count, first, last int
	if _, err := fmt.Sscanf(strings.ReplaceAll(db, "|", " "), "ok\n%d %d %d", &count, &first, &last); err != nil || first != 1 || last != count {
		g.t.Errorf("the database says %q", db)
	}
	if count < atLeast {
		g.t.Errorf("%d records, but %d were committed before the backup began", count, atLeast)
	}
}

// rounds is how many backups a busy file system gets.
func rounds() int {
	if soak() {
		return 10
	}
	return 3
}
