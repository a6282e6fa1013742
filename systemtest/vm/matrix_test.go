// SPDX-License-Identifier: BSD-2-Clause

package vm

import (
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/repo/backend/location"
	"github.com/dsync-backup/dsync-backup/repo/crypto"
	"github.com/dsync-backup/dsync-backup/snapshot"
	"github.com/dsync-backup/dsync-backup/systemtest/matrix"
)

const sceneSize = 16 << 20

// scene is a guest with a disk that is tracked and backed up, one that has the
// repository (/keep), and one that has the state directory and the cache (/state).
type scene struct {
	*Machine
	t    *testing.T
	kind string // of the tracker
	raw  string // the device
	name string // in the repository

	fresh string // why the newest start did not take up a history
}

// newScene boots a guest.
func newScene(t *testing.T, k Kernel, kind string, modules ...string) *scene {
	t.Helper()
	modules = append([]string{"dm-mod", "dm-snapshot", "ext4"}, modules...)
	if kind == "dm" {
		modules = append(modules, dsyncModule(t, k))
	}
	m := Start(t, k, Config{
		Memory: 640, Backup: true, Monitor: true, Modules: modules, Tools: []string{"lvm", "dmsetup", "mkfs.ext4"},
		Disks: []Disk{
			{Name: "data", Size: sceneSize},
			{Name: "keep", Size: 192 << 20, From: keepImage(t, 192<<20)},
			{Name: "state", Size: 32 << 20},
			{Name: "target", Size: sceneSize},
			{Name: "lvm", Size: 2*sceneSize + 8<<20},
		},
	})
	s := &scene{Machine: m, t: t, kind: kind}
	s.Run("mkfs.ext4", "-q", s.Device("state"))
	s.booted()
	return s
}

// keepImage is a file system with an empty repository, whose password costs little to
// check.
func keepImage(t *testing.T, size int64) string {
	t.Helper()
	dir, image := t.TempDir(), filepath.Join(t.TempDir(), "keep")
	ctx := context.Background()
	be, err := location.Open(ctx, filepath.Join(dir, "repo"), location.Options{})
	if err != nil {
		t.Fatal(err)
	}
	r, err := repo.Init(ctx, be, "secret", repo.Options{KDF: crypto.Params{N: 1024, R: 8, P: 1}})
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	be.Close()
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, size); err != nil {
		t.Fatal(err)
	}
	mkfs, err := lookTool("mkfs.ext4")
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(mkfs, "-q", "-d", dir, image).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v\n%s", err, out)
	}
	return image
}

func (s *scene) booted() {
	s.t.Helper()
	s.Shell("mkdir -p /keep /state /mnt; mount " + s.Device("keep") + " /keep; mount " + s.Device("state") + " /state")
}

// reboot switches the guest off and on, or cuts its power.
func (s *scene) reboot(cut bool) {
	s.t.Helper()
	if cut {
		s.Kill()
	} else {
		s.Shell("umount /keep /state")
		s.PowerOff()
	}
	s.Boot()
	s.booted()
	if strings.HasPrefix(s.raw, "/dev/vg") {
		s.Run("lvm", "vgchange", "-q", "-ay", "vg")
	}
}

func (s *scene) in(args ...string) []string {
	return append([]string{
		"env", "RESTIC_REPOSITORY=/keep/repo", "RESTIC_PASSWORD=secret", "DSYNC_STATE_DIR=/state/dsync", "DSYNC_CACHE_DIR=/state/cache",
		"dsync-backup",
	}, args...)
}

// device is what is used and backed up.
func (s *scene) device() string {
	if s.kind == "dm" {
		return "/dev/mapper/scene"
	}
	return s.raw
}

func (s *scene) start(flags ...string) {
	s.t.Helper()
	args := []string{"--json", "track", "start", s.raw, "--tracker", s.kind}
	if s.kind == "dm" {
		args = append(args, "--as", "scene")
	}
	var said struct {
		Fresh string `json:"fresh_reason"`
	}
	out := s.Run(s.in(append(args, flags...)...)...)
	if err := json.Unmarshal([]byte(out), &said); err != nil {
		s.t.Fatal(err)
	}
	s.fresh = said.Fresh
}

func (s *scene) save() {
	s.t.Helper()
	if out := s.Run(s.in("--json", "track", "stop", "--save", s.raw)...); !strings.Contains(out, `"saved":true`) {
		s.t.Fatal(out)
	}
}

func (s *scene) stop() {
	s.t.Helper()
	s.Run(s.in("track", "stop", s.raw)...)
}

// write writes some blocks past the file system, where that has nothing.
func (s *scene) write() {
	s.t.Helper()
	s.Shell("dd if=/dev/urandom of=" + s.device() + " bs=4k seek=$((3072 + RANDOM % 900)) count=20 conv=notrunc,fsync 2>/dev/null")
}

// use mounts a device, writes to it, and unmounts it.
func (s *scene) use(device string) {
	s.t.Helper()
	s.Shell("mount " + device + " /mnt; dd if=/dev/urandom of=/mnt/file bs=64k count=8 2>/dev/null; umount /mnt")
}

// backup backs up without a look at the image.
func (s *scene) backup() (sum snapshot.Summary) {
	s.t.Helper()
	lines := strings.Split(s.Run(s.in("--json", "backup", s.device(), "--name", s.name)...), "\n")
	if err := json.Unmarshal([]byte(lines[len(lines)-1]), &sum); err != nil {
		s.t.Fatalf("%v: %q", err, lines)
	}
	return sum
}

// round writes, backs up, restores and compares.
func (s *scene) round() snapshot.Summary {
	s.t.Helper()
	s.write()
	sum := s.backup()
	s.Run(s.in("restore", sum.SnapshotID.String(), s.Device("target"), "--force")...)
	s.Shell("echo 1 >/proc/sys/vm/drop_caches; cmp " + s.device() + " " + s.Device("target"))
	return sum
}

// begin has the device tracked from its first backup on.
func (s *scene) begin(raw, name string) {
	s.t.Helper()
	s.raw, s.name = raw, name
	s.Run("mkfs.ext4", "-q", "-F", "-b", "4096", raw)
	s.start()
	s.write()
	s.backup()
	s.write()
	if sum := s.backup(); sum.Changes != snapshot.ChangesTracker {
		s.t.Fatalf("the second backup: %+v", sum)
	}
	s.fresh = ""
}

// revert takes the machine back to before a backup, with the disks that are named.
func (s *scene) revert(disks ...string) {
	s.t.Helper()
	// What the disk holds that stays must not be in the memory that is saved.
	s.Shell("umount /keep; echo 3 >/proc/sys/vm/drop_caches")
	saved := s.SaveMemory()
	s.Run("mount", s.Device("keep"), "/keep")
	s.round()
	s.Shell("umount /keep; sync")
	s.Revert(saved, disks...)
	s.Run("mount", s.Device("keep"), "/keep")
}

// event is something that happens, and what the next backup does.
type event struct {
	name string
	do   func(s *scene)
	next snapshot.Changes
	why  string
}

// both are the events for either tracker. What needs no machine of its own,
// systemtest.TestMatrixOfEvents does with eBPF.
var both = []event{
	{"clean reboot: `track stop --save`, off, on, `track start`", func(s *scene) {
		s.save()
		s.reboot(false)
		s.start()
	}, snapshot.ChangesTracker, ""},
	{"power cut, after a history was taken up", func(s *scene) {
		s.save()
		s.reboot(false)
		s.start()
		s.write()
		s.reboot(true)
		s.start()
	}, snapshot.ChangesCompare, "no state of this device was saved"},
	{"the clock set back by a year", func(s *scene) {
		s.Shell("date -s @$(($(date +%s) - 31536000)) >/dev/null")
		s.round()
	}, snapshot.ChangesTracker, ""},
	{"the machine reverted to an older memory, with its disks, the repository not", func(s *scene) {
		s.revert("data", "state", "target")
	}, snapshot.ChangesCompare, "reverted to an older state"},
	{"the machine reverted to an older memory, without the tracked disk", func(s *scene) {
		s.revert("state", "target")
	}, snapshot.ChangesCompare, "reverted to an older state"},
}

// merge begins with a logical volume, and makes a snapshot of it that is merged.
func merge(s *scene, before, after func()) {
	s.Shell("lvm pvcreate -q " + s.Device("lvm") + "; lvm vgcreate -q vg " + s.Device("lvm") + "; lvm lvcreate -q -y -n lv -L 16M vg")
	s.begin("/dev/vg/lv", "/dev/lv")
	s.Run("lvm", "lvcreate", "-q", "-y", "-s", "-n", "before", "-L", "16M", "vg/lv")
	s.use(s.device())
	s.round()
	before()
	s.Run("lvm", "lvconvert", "-q", "--merge", "-i", "1", "vg/before")
	after()
}

var onlyBPF = []event{
	{"a snapshot merged into the logical volume", func(s *scene) {
		s.stop()
		merge(s, func() {}, func() { s.Shell("while lvm lvs vg/before 2>/dev/null; do sleep 0.2; done") })
	}, snapshot.ChangesCompare, "table"},
}

var onlyDM = []event{
	{"clean reboot, and mounted and written to before `track start`", func(s *scene) {
		s.save()
		s.reboot(false)
		s.use(s.raw)
		s.start()
	}, snapshot.ChangesCompare, "was used or changed"},
	{"the state directory lost", func(s *scene) { s.Shell("rm -r /state/dsync") }, snapshot.ChangesCompare, "not in the log"},
	{"`track stop --save`, the module unloaded and loaded, `track start`", func(s *scene) {
		s.save()
		s.Shell("rmmod dm_dsync; insmod $(find /lib/modules -name dm-dsync.ko)")
		s.start()
	}, snapshot.ChangesTracker, ""},
	{"`track stop --save` by the module, `track start` with eBPF, `track stop --save`, `track start` by the module", func(s *scene) {
		s.save()
		s.kind = "bpf"
		s.start()
		s.write()
		s.save()
		s.kind = "dm"
		s.start()
	}, snapshot.ChangesTracker, ""},
	{"another table was live for a moment", func(s *scene) {
		s.Shell("t=$(dmsetup table scene); set -- $t; echo \"0 $2 linear $4 0\" | dmsetup load scene; echo \"$t\" >/run/table; " +
			"dmsetup resume scene; dmsetup load scene </run/table; dmsetup resume scene")
	}, snapshot.ChangesCompare, ""},
	{"another tool ended an epoch, and kept it to itself", func(s *scene) {
		s.write()
		s.Shell("e=$(sed -n 's/^epoch //p' /proc/dsync/scene/status); dmsetup message scene 0 rotate 00112233445566778899aabbccddeeff; dmsetup message scene 0 ack $e")
	}, snapshot.ChangesCompare, "not in the log"},
	{"the bitmap cleared by `echo clear`", func(s *scene) {
		s.write()
		s.Shell("echo clear >/proc/dsync/scene/blocks")
	}, snapshot.ChangesCompare, "not in the log"},
	{"`track stop --save`, a snapshot merged into the logical volume beneath, `track start`", func(s *scene) {
		s.stop()
		merge(s, s.save, func() {
			s.Shell("while lvm lvs vg/before 2>/dev/null; do sleep 0.2; done")
			s.start()
		})
	}, snapshot.ChangesCompare, "was used or changed"},
}

// within is the same scene for a subtest.
func (s *scene) within(t *testing.T) *scene {
	s.t, s.Machine = t, s.Machine.In(t)
	return s
}

// happens makes an event happen, and tells what it comes to.
func (s *scene) happens(ev event) matrix.Row {
	s.fresh = ""
	ev.do(s)
	next := s.round()
	why := next.FallbackReason
	if s.fresh != "" && why != "" {
		why += ". `track start` said: " + s.fresh
	}
	if next.Changes != ev.next || !strings.Contains(why, ev.why) {
		s.t.Errorf("the next backup: %s, because %q; want %s, %q", next.Changes, why, ev.next, ev.why)
	}
	s.write() // the image is looked at after the next event
	after := s.backup()
	if after.Changes != snapshot.ChangesTracker {
		s.t.Errorf("the one after: %s, because %q", after.Changes, after.FallbackReason)
	}
	return matrix.Row{Event: ev.name, Next: string(next.Changes), Why: why, After: string(after.Changes)}
}

// TestMatrixOfEvents makes happen what needs a machine of its own: reboots, power
// cuts, the kernel module, LVM. Each image is what the device held; docs/matrix.md has
// the tables.
func TestMatrixOfEvents(t *testing.T) {
	for i, c := range []struct {
		kind, section string
		events        []event
	}{
		{"dm", "the kernel module, in a virtual machine", append(append([]event(nil), both...), onlyDM...)},
		{"bpf", "eBPF, in a virtual machine", append(append([]event(nil), both...), onlyBPF...)},
	} {
		t.Run(c.kind, func(t *testing.T) {
			Turn(t, i, func(t *testing.T, k Kernel) {
				s := newScene(t, k, c.kind)
				s.begin(s.Device("data"), "/dev/scene")
				var rows []matrix.Row
				for _, ev := range c.events {
					t.Run(ev.name, func(t *testing.T) {
						rows = append(rows, s.within(t).happens(ev))
					})
				}
				if t.Failed() || len(rows) < len(c.events) {
					return
				}
				root, err := Root()
				if err != nil {
					t.Fatal(err)
				}
				matrix.Check(t, filepath.Join(root, "docs/matrix.md"), c.section, rows)
			})
		})
	}
}
