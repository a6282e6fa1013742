// SPDX-License-Identifier: BSD-2-Clause

package vm

import (
	"strings"
	"testing"

	"github.com/dsync-backup/dsync-backup/snapshot"
)

// File systems in use on a logical volume are backed up by LVM's own snapshots: each
// image is what the snapshot held, bit for bit, and the eBPF tracker on the volume goes
// on over their coming and going.
func TestLVMSnapshotsOfBusyFileSystems(t *testing.T) {
	t.Parallel()
	for n, fs := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(fs, func(t *testing.T) {
			Turn(t, n, func(t *testing.T, k Kernel) {
				g := newBusyGuest(t, k, fs, byLVM)
				round := func(want snapshot.Changes) {
					t.Helper()
					g.start()
					committed := g.committed()
					s := g.backup(g.copySnapshot, g.slowly()...)
					if s.PointInTime != "lvm" || s.Changes != want || want == snapshot.ChangesTracker && s.BytesRead > 40<<20 {
						t.Errorf("%+v", s)
					}
					g.tidy()
					g.stop()
					g.checkCopied(committed)
				}
				// Without a tracker a snapshot is compared.
				round(snapshot.ChangesFull)
				if fs == "ext4" {
					round(snapshot.ChangesCompare)
				}
				g.track()
				round(snapshot.ChangesCompare)
				for range rounds() - 2 {
					round(snapshot.ChangesTracker)
				}
				if st := track(t, g.Machine, "status", g.device); !st.Reliable {
					t.Errorf("after the snapshots: %+v", st)
				}
			})
		})
	}
}

// What LVM cannot do is said in one line, and nothing of it stays.
func TestLVMSnapshotsThatFail(t *testing.T) {
	Turn(t, 0, func(t *testing.T, k Kernel) {
		g := newBusyGuest(t, k, "ext4", byLVM)
		g.track()
		g.Shell("for i in 1 2 3 4 5 6; do dd if=/dev/urandom of=/mnt/fill$i bs=1M count=2 conv=fsync 2>/dev/null; done")
		g.start()
		g.backup(nil)
		g.stop()
		fails := func(words []string, args ...string) {
			t.Helper()
			wantRefused(t, g.Machine, words, g.in(append([]string{"dsync-backup", "backup"}, args...)...)...)
			g.Shell("echo writable >/mnt/writable; sync")
			g.tidy()
			if n := strings.Count(g.Run(g.in("dsync-backup", "--json", "snapshots")...), `"short_id"`); n != 1 {
				t.Errorf("backup %v: %d snapshots", args, n)
			}
		}
		next := func(want snapshot.Changes) {
			t.Helper()
			g.start()
			committed := g.committed()
			s := g.backup(g.copySnapshot, g.slowly()...)
			if s.Changes != want || s.PointInTime != "lvm" {
				t.Errorf("the next one: %+v", s)
			}
			g.stop()
			g.tidy()
			g.checkCopied(committed)
		}
		fails([]string{"no room", "vg has", "--cow SIZE"}, g.device, "--snapshot", "lvm", "--cow", "1G")
		fails([]string{"no size"}, g.device, "--snapshot", "lvm", "--cow", "lots")
		fails([]string{"in its volume group"}, g.device, "--snapshot", "lvm", "--cow", "memory:1M")
		fails([]string{"logical volumes", "is none"}, g.Device("target"), "--snapshot", "lvm")
		g.Shell("mv /usr/bin/lvm /usr/bin/lvm.away")
		wantRefused(t, g.Machine, []string{"install lvm2"}, g.in("dsync-backup", "backup", g.device, "--snapshot", "lvm")...)
		// Without LVM, auto copies the tracked volume in use.
		if s := backupIn(t, g.Machine, g.in, g.device); s.PointInTime != "precopy" || s.Changes != snapshot.ChangesTracker {
			t.Errorf("auto without LVM: %+v", s)
		}
		g.Shell("mv /usr/bin/lvm.away /usr/bin/lvm")
		g.Run(g.in("dsync-backup", "forget", "latest")...)

		// The space runs out while the snapshot is read.
		p := g.Machine.Start(Command{Args: g.in("dsync-backup", "backup", g.device, "--changes", "compare", "--cow", "4M", "--limit-upload", "64")})
		g.awaitSnapshot()
		g.Shell("kill -STOP $(pidof dsync-backup); for i in 1 2 3 4 5 6; do dd if=/dev/urandom of=/mnt/fill$i bs=1M count=2 conv=notrunc,fsync 2>/dev/null; done; kill -CONT $(pidof dsync-backup)")
		if r := p.Wait(); r.Status != 1 || !strings.Contains(string(r.Stderr), "copy-on-write space is full (the snapshot vg/dsync-") || !strings.Contains(string(r.Stderr), "--cow") {
			t.Errorf("overflow: status %d: %s", r.Status, r.Stderr)
		}
		g.tidy()
		next(snapshot.ChangesTracker)

		// Two at once; the first is killed, and leaves its snapshot to the next one.
		p = g.Machine.Start(Command{Args: g.in("dsync-backup", "backup", g.device, "--changes", "full", "--limit-upload", "64")})
		g.awaitSnapshot()
		wantRefused(t, g.Machine, []string{"another backup reads a snapshot"}, g.in("dsync-backup", "backup", g.device)...)
		g.Shell("kill -9 $(pidof dsync-backup)")
		p.Wait()
		if out := g.Run("lvm", "lvs", "--noheadings", "-o", "lv_name,lv_tags", "-S", "lv_tags=dsync-backup"); !strings.Contains(out, "dsync-") {
			t.Errorf("a killed backup left no snapshot: %q", out)
		}
		// One of somebody else's stays, whatever its name.
		g.Run("lvm", "lvcreate", "-q", "-y", "-n", "dsync-mine", "-L", "4M", "vg")
		s := g.backup(nil)
		if s.Changes != snapshot.ChangesTracker {
			t.Errorf("after the kill: %+v", s)
		}
		g.Run("lvm", "lvremove", "-q", "-f", "-y", "vg/dsync-mine")
		g.tidy()
		next(snapshot.ChangesTracker)

		// No room at all: auto copies it in use, and says why.
		g.Run("lvm", "lvcreate", "-q", "-y", "-n", "other", "-l", "100%FREE", "vg")
		r := g.Try(g.in("dsync-backup", "--json", "backup", g.device)...)
		if r.Err != nil || !strings.Contains(string(r.Stdout), `"point_in_time":"precopy"`) || !strings.Contains(string(r.Stderr), "no room") {
			t.Errorf("auto without room: %s%s", r.Stdout, r.Stderr)
		}
		fails2 := g.Try(g.in("dsync-backup", "backup", g.device, "--snapshot", "lvm")...)
		if fails2.Status != 1 || !strings.Contains(string(fails2.Stderr), "0 MiB free") {
			t.Errorf("lvm without room: %s", fails2.Stderr)
		}
	})
}

// A thin volume gets a thin snapshot, and a volume of another kind none.
func TestLVMSnapshotsOfThinVolumes(t *testing.T) {
	Turn(t, 0, func(t *testing.T, k Kernel) {
		const size = 64 << 20
		m := Start(t, k, Config{
			Memory: 1024, Backup: true, Scratch: 600, Modules: []string{"dm-mod", "dm-thin-pool", "dm-snapshot", "dm-mirror", "raid1", "dm-raid", "ext4"}, Tools: []string{"lvm", "dmsetup", "mkfs.ext4"},
			Disks: []Disk{{Name: "data", Size: 4 * size}, {Name: "second", Size: 4 * size}, {Name: "target", Size: size}},
		})
		in := func(args ...string) []string {
			return append([]string{"env", "RESTIC_REPOSITORY=/tmp/repo", "RESTIC_PASSWORD_FILE=/root/password"}, args...)
		}
		putRepository(t, m, "/tmp/repo")
		m.Shell(`echo 'global { thin_check_executable = "" }' >>/etc/lvm/lvm.conf
			lvm vgcreate -q vg ` + m.Device("data") + " " + m.Device("second") + `
			lvm lvcreate -q -y -T -L 100M -V 64M -n lv vg/pool
			lvm lvcreate -q -y --type raid1 -m 1 -L 16M -n raid vg`)
		track(t, m, "start", "/dev/vg/lv", "--tracker", "bpf")
		m.Shell("mkfs.ext4 -q /dev/vg/lv; mount /dev/vg/lv /mnt; mkfs.ext4 -q /dev/vg/raid; mkdir /raid; mount /dev/vg/raid /raid")
		for round := range 3 {
			m.Shell("dd if=/dev/urandom of=/mnt/file bs=1M count=3 conv=fsync 2>/dev/null")
			s := backupIn(t, m, in, "/dev/vg/lv")
			want := snapshot.ChangesTracker
			if round == 0 {
				want = snapshot.ChangesFull
			}
			if s.PointInTime != "lvm" || s.Changes != want {
				t.Errorf("round %d: %+v", round, s)
			}
			if out := m.Run("lvm", "lvs", "--noheadings", "-o", "lv_name", "vg"); strings.Contains(out, "dsync") {
				t.Errorf("left: %s", out)
			}
		}
		m.Run(in("dsync-backup", "restore", "latest", m.Device("target"))...)
		m.Shell("sum=$(md5sum </mnt/file); umount /mnt; mount " + m.Device("target") + ` /mnt; [ "$sum" = "$(md5sum </mnt/file)" ]; umount /mnt; umount /raid`)
		if st := track(t, m, "status", "/dev/vg/lv"); !st.Reliable {
			t.Errorf("%+v", st)
		}
		wantRefused(t, m, []string{"not supported", "raid1"}, in("dsync-backup", "backup", "/dev/vg/raid", "--snapshot", "lvm")...)
		// Nobody uses it: it needs no snapshot.
		if s := backupIn(t, m, in, "/dev/vg/lv"); s.PointInTime != "unmounted" {
			t.Errorf("not in use: %+v", s)
		}
		m.Shell("dd if=/dev/urandom of=/dev/vg/lv bs=1M 2>/dev/null || true; lvm lvcreate -q -y -V 64M -n fill --thinpool vg/pool; dd if=/dev/urandom of=/dev/vg/fill bs=1M count=30 conv=fsync 2>/dev/null")
		wantRefused(t, m, []string{"no room", "vg/pool", "data_percent"}, in("dsync-backup", "backup", "/dev/vg/lv", "--snapshot", "lvm")...)
	})
}

// A backup that is killed while LVM makes its snapshot leaves that to LVM, and the
// snapshot to the next backup; the tracker looks between the coming and the going.
func TestAKilledLVMSnapshotIsRemoved(t *testing.T) {
	Turn(t, 1, func(t *testing.T, k Kernel) {
		g := newBusyGuest(t, k, "ext4", byLVM)
		g.track()
		g.start()
		g.backup(nil)
		p := g.Machine.Start(Command{Args: g.in("dsync-backup", "backup", g.device)})
		g.Shell("while ! ps -o args | grep -q '[l]vm lvcreate'; do :; done; kill -STOP $(pidof dsync-backup)")
		g.awaitSnapshot()
		g.Shell("kill -9 $(pidof dsync-backup); while ps -o args | grep -q '[l]vm lvcreate'; do sleep 0.1; done")
		p.Wait()
		committed := g.committed()
		if s := g.backup(nil); s.Changes != snapshot.ChangesTracker || s.PointInTime != "lvm" {
			t.Errorf("after the kill: %+v", s)
		}
		g.stop()
		g.tidy()
		g.check(committed)
	})
}
