// SPDX-License-Identifier: BSD-2-Clause

package vm

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/snapshot"
)

// dsyncModule is the file of the kernel module, built for k.
func dsyncModule(t testing.TB, k Kernel) string {
	t.Helper()
	return filepath.Join(BuildModule(t, k, "kernel/module"), "dm-dsync.ko")
}

// The tracker of the kernel module keeps what kernel.Tracker promises, and the epoch
// log works with it.
func TestDMTracker(t *testing.T) {
	Each(t, func(t *testing.T, k Kernel) {
		m := Start(t, k, Config{
			Memory: 1024, Modules: []string{"loop", "ext4", "dm-mod", "dm-zero", dsyncModule(t, k)}, Tools: []string{"losetup", "mkfs.ext4", "fsfreeze"},
		})
		t.Run("devmapper", func(t *testing.T) { m.In(t).GoTest("./kernel/devmapper", Tests{}) })
		t.Run("dm", func(t *testing.T) { m.In(t).GoTest("./kernel/dm", Tests{}) })
		t.Run("epochlog", func(t *testing.T) {
			m.In(t).GoTest("./kernel/epochlog", Tests{
				Run: "Session|Since|Grew|Killed|Commit|Lock|Kernel|Nothing", Env: []string{"DSYNC_TEST_TRACKER=dm"},
			})
		})
	})
}

// track runs dsync-backup track, and reads what it says of one tracker.
func track(t *testing.T, m *Machine, args ...string) kernel.Status {
	t.Helper()
	out := m.Run(append([]string{"dsync-backup", "--json", "track"}, args...)...)
	var st kernel.Status
	if err := json.Unmarshal([]byte(strings.Trim(out, "[]")), &st); err != nil {
		t.Fatalf("track %v: %v: %s", args, err, out)
	}
	return st
}

// wantRefused runs a command that must fail with one line that has all the words.
func wantRefused(t *testing.T, m *Machine, words []string, args ...string) {
	t.Helper()
	r := m.Try(args...)
	said := strings.TrimSpace(string(r.Stderr))
	if r.Status != 1 || strings.Contains(said, "\n") {
		t.Errorf("%v: status %d: %s%s", args, r.Status, r.Stdout, said)
	}
	for _, w := range words {
		if !strings.Contains(said, w) {
			t.Errorf("%v: %q has no %q", args, said, w)
		}
	}
}

// A device is tracked with the module, backed up, changed, backed up by what changed,
// and restored; all by the command.
func TestTrackWithTheModule(t *testing.T) {
	Turn(t, 1, func(t *testing.T, k Kernel) {
		const size = 64 << 20
		m := Start(t, k, Config{
			Memory: 1024, Backup: true, Modules: []string{"dm-mod", "ext4", dsyncModule(t, k)}, Tools: []string{"mkfs.ext4", "dmsetup", "cmp"},
			Disks: []Disk{{Name: "data", Size: size}, {Name: "target", Size: size}, {Name: "busy", Size: size}},
		})
		data, target, busy := m.Device("data"), m.Device("target"), m.Device("busy")
		m.Shell("dd if=/dev/urandom of=" + data + " bs=1M count=8 2>/dev/null")
		putRepository(t, m, "/root/repo")
		in := func(args ...string) []string {
			return append([]string{"env", "RESTIC_REPOSITORY=/root/repo", "RESTIC_PASSWORD_FILE=/root/password"}, args...)
		}

		// In use: auto takes eBPF or says why not, dm refuses.
		m.Run("mkfs.ext4", "-q", busy)
		m.Run("mount", busy, "/mnt")
		wantRefused(t, m, []string{"in use", "mounted at", "/mnt", "/dev/mapper/vdc-dsync"}, "dsync-backup", "track", "start", busy, "--tracker", "dm")
		if st := track(t, m, "start", busy); st.Tracker != "bpf" || st.Device != busy {
			t.Errorf("auto on a device in use: %+v", st)
		}
		m.Run("umount", "/mnt")
		wantRefused(t, m, []string{"tracked already"}, "dsync-backup", "track", "start", busy, "--tracker", "dm")
		m.Run("dsync-backup", "track", "stop", busy)
		wantRefused(t, m, []string{"--as"}, "dsync-backup", "track", "start", data, "--tracker", "bpf", "--as", "x")

		st := track(t, m, "start", data, "--as", "my-disk")
		const mapped = "/dev/mapper/my-disk"
		if st.Tracker != "dm" || st.Device != mapped || st.Below != data || !st.Reliable || st.Epoch != 1 {
			t.Errorf("started: %+v", st)
		}
		for _, path := range []string{data, mapped, "/dev/dm-0"} {
			if got := track(t, m, "status", path); got.UUID != st.UUID || got.Device != mapped {
				t.Errorf("status by %s: %+v", path, got)
			}
		}
		out := m.Run("dsync-backup", "track", "status")
		if !strings.Contains(out, mapped) || !strings.Contains(out, "on "+data) {
			t.Errorf("status of all: %s", out)
		}
		wantRefused(t, m, []string{"tracked already", mapped}, "dsync-backup", "track", "start", data, "--tracker", "bpf")

		run := func() snapshot.Summary { return backupIn(t, m, in, mapped) }
		if s := run(); s.Changes != "full" || s.FallbackReason != "" {
			t.Errorf("the first backup: %+v", s)
		}
		m.Shell("dd if=/dev/urandom of=" + mapped + " bs=4k seek=100 count=10 conv=notrunc 2>/dev/null")
		if s := run(); s.Changes != "tracker" || s.DirtyBytes != 10*4096 {
			t.Errorf("an incremental backup: %+v", s)
		}
		// The paper's interface, from the shell.
		m.Shell("dd if=/dev/urandom of=" + mapped + " bs=4k seek=200 count=3 conv=notrunc 2>/dev/null; sync")
		const blocks = "/proc/dsync/my-disk/blocks"
		if got := m.Run("cat", blocks); got != "200\n201\n202" {
			t.Errorf("blocks: %q", got)
		}
		m.Shell("echo clear >" + blocks)
		if got := m.Run("cat", blocks); got != "" {
			t.Errorf("blocks after a clear: %q", got)
		}
		if s := run(); s.Changes != "compare" || !strings.Contains(s.FallbackReason, "epoch") || s.DirtyBytes != 3*4096 {
			t.Errorf("after a clear: %+v", s)
		}
		if s := run(); s.Changes != "tracker" || s.DirtyBytes != 0 {
			t.Errorf("the one after that: %+v", s)
		}
		wantRefused(t, m, []string{"is tracked as " + mapped, "back that up"}, in("dsync-backup", "backup", data, "--snapshot", "none")...)

		// With a file system: it cannot be stopped, and is frozen.
		m.Run("mkfs.ext4", "-q", mapped)
		m.Run("mount", mapped, "/mnt")
		m.Shell("dd if=/dev/urandom of=/mnt/file bs=1M count=3 2>/dev/null")
		wantRefused(t, m, []string{"in use", "mounted at", "/mnt"}, "dsync-backup", "track", "stop", mapped)
		freeze := append(in("dsync-backup", "--json", "backup", mapped), "--snapshot", "freeze")
		m.Run(freeze...)
		m.Run("umount", "/mnt")
		if s := run(); s.Changes != "tracker" {
			t.Errorf("after the freeze: %+v", s)
		}
		m.Run(in("dsync-backup", "restore", "latest", target)...)
		m.Run("cmp", mapped, target)

		m.Run("dsync-backup", "track", "stop", data)
		if out := m.Run("dsync-backup", "--json", "track", "status"); out != "[]" {
			t.Errorf("after the stop: %s", out)
		}
		// A new history of the same device: its position cannot be bridged.
		track(t, m, "start", data, "--tracker", "dm", "--as", "my-disk")
		if s := run(); s.Changes != "compare" || s.FallbackReason == "" || s.DirtyBytes != 0 {
			t.Errorf("after a new start: %+v", s)
		}
		m.Run("cmp", mapped, target)

		// It goes away while it is read.
		count := func() int { return strings.Count(m.Run(in("dsync-backup", "--json", "snapshots")...), `"short_id"`) }
		was := count()
		p := m.Start(Command{Args: in("dsync-backup", "backup", mapped, "--changes", "full", "--limit-upload", "64")})
		m.Shell(`while ! awk '/^read_bytes/ {exit !($2 > 1000000)}' /proc/$(pidof dsync-backup)/io; do sleep 0.1; done`)
		if r := m.Try("dmsetup", "remove", "my-disk"); r.Status == 0 {
			t.Error("removed while it was read")
		}
		m.Run("dmsetup", "wipe_table", "--force", "my-disk")
		if r := p.Wait(); r.Status != 1 || !strings.Contains(string(r.Stderr), mapped) {
			t.Errorf("its device is gone: status %d: %s", r.Status, r.Stderr)
		}
		if n := count(); n != was {
			t.Errorf("%d snapshots, %d before", n, was)
		}
		m.Run("dmsetup", "remove", "my-disk")
		track(t, m, "start", data, "--tracker", "dm", "--as", "my-disk")
		if s := run(); s.Changes != "compare" {
			t.Errorf("after that: %+v", s)
		}
	})
}

func backupIn(t *testing.T, m *Machine, in func(...string) []string, device string) snapshot.Summary {
	t.Helper()
	out := m.Run(in("dsync-backup", "--json", "backup", device)...)
	lines := strings.Split(out, "\n")
	var s snapshot.Summary
	if err := json.Unmarshal([]byte(lines[len(lines)-1]), &s); err != nil {
		t.Fatalf("backup %s: %v: %s", device, err, out)
	}
	return s
}

// A module of another version is noticed, and named; what it tracks is not touched.
func TestAModuleOfAnotherVersionIsRefused(t *testing.T) {
	Turn(t, 0, func(t *testing.T, k Kernel) {
		m := Start(t, k, Config{
			Memory: 1024, Backup: true, Modules: []string{"dm-mod", otherVersion(t, k)},
			Disks: []Disk{{Name: "data", Size: 1 << 20}},
		})
		data := m.Device("data")
		wantRefused(t, m, []string{"wrong version", "2.0.0", "1.x"}, "dsync-backup", "track", "start", data, "--tracker", "dm")
		r := m.Try("dsync-backup", "--json", "track", "start", data)
		if r.Err != nil || !bytes.Contains(r.Stdout, []byte(`"tracker":"bpf"`)) || !bytes.Contains(r.Stderr, []byte("wrong version")) {
			t.Errorf("auto: %+v: %s%s", r.Err, r.Stdout, r.Stderr)
		}
	})
}

// otherVersion builds the module as if it were a later one.
func otherVersion(t *testing.T, k Kernel) string {
	t.Helper()
	root, err := Root()
	if err != nil {
		t.Fatal(err)
	}
	sources, sum, err := moduleSources(filepath.Join(root, "kernel/module"))
	if err != nil {
		t.Fatal(err)
	}
	folder := filepath.Join(root, ".build/modules/sources-of-2-"+k.Name+"-"+sum[:12])
	if err := os.MkdirAll(folder, 0o755); err != nil {
		t.Fatal(err)
	}
	changed := 0
	for name, data := range sources {
		was := data
		data = bytes.ReplaceAll(data, []byte("1.0.0"), []byte("2.0.0"))
		data = regexp.MustCompile(`\.version(\s*)= \{ ?1, 0, 0 ?\}`).ReplaceAll(data, []byte(".version$1= {2, 0, 0}"))
		if !bytes.Equal(was, data) {
			changed++
		}
		if err := os.WriteFile(filepath.Join(folder, name), data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if changed == 0 {
		t.Fatal("the module's sources hold no version that could be changed")
	}
	folder, err = filepath.Rel(root, folder)
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(BuildModule(t, k, folder), "dm-dsync.ko")
}
