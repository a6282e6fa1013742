// SPDX-License-Identifier: BSD-2-Clause

package systemtest

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/kernel/bpf"
	"github.com/dsync-backup/dsync-backup/snapshot"
	"github.com/dsync-backup/dsync-backup/systemtest/matrix"
)

const matrixSize = 32 << 20

// scene is a tracked device with an ext4, twice backed up.
type scene struct {
	*env
	t    *testing.T
	rng  *rand.Rand
	c    *content
	d    *disk
	name string // of the device in the repository
	end  int64  // of what may be written, in blocks

	fresh string // why the newest start did not take up a history
}

// event is something that happens to it, and what the backups after it do.
type event struct {
	name  string
	do    func(s *scene)
	next  snapshot.Changes
	why   string // part of the reason, if it falls back
	after snapshot.Changes
	how   int // alone, or 0
}

// TestMatrixOfEvents makes everything happen that can happen to an eBPF tracker without
// a machine of its own, one event to a device each. The next backup is incremental where
// it can be, and says why where it is not; its image, and that of the one
// after, are what the device holds. docs/matrix.md has the table; the rest of it is
// made in virtual machines (systemtest/vm).
func TestMatrixOfEvents(t *testing.T) {
	rows := make([]matrix.Row, len(events))
	t.Cleanup(func() {
		for _, r := range rows {
			if r.Event == "" {
				return // not all have run
			}
		}
		matrix.Check(t, filepath.Join(moduleDir, "docs/matrix.md"), "eBPF, on loop devices", rows)
	})
	for i, ev := range events {
		t.Run(ev.name, func(t *testing.T) {
			if ev.how != alone {
				t.Parallel()
			}
			s := newScene(t)
			ev.do(s)
			next := s.round()
			why := next.FallbackReason
			if s.fresh != "" && why != "" {
				why += ". `track start` said: " + s.fresh
			}
			if next.Changes != ev.next || !strings.Contains(why, ev.why) || (ev.why == "") != (why == "") {
				t.Errorf("the next backup: %s, because %q; want %s, %q", next.Changes, why, ev.next, ev.why)
			}
			after := s.round()
			if after.Changes != ev.after {
				t.Errorf("the one after: %s (%s), want %s", after.Changes, after.FallbackReason, ev.after)
			}
			rows[i] = matrix.Row{Event: ev.name, Next: string(next.Changes), Why: why, After: string(after.Changes)}
		})
	}
}

func newScene(t *testing.T) *scene {
	r := random(t)
	s := &scene{env: lightEnv(t), t: t, rng: r, c: newContent(r, true), d: newDisk(t, matrixSize), name: "/dev/matrix", end: matrixSize/kernel.BlockSize - 64}
	t.Cleanup(func() { s.try("track", "stop", s.d.path) })
	run(t, "mkfs.ext4", "-q", "-b", "4096", s.d.path)
	s.start()
	s.write(500)
	if sum := s.backup(s.d.path, "--name", s.name); sum.Changes != snapshot.ChangesFull {
		t.Fatalf("the first backup: %+v", sum)
	}
	s.write(20)
	if sum := s.backup(s.d.path, "--name", s.name); sum.Changes != snapshot.ChangesTracker {
		t.Fatalf("the second backup: %+v", sum)
	}
	s.fresh = ""
	return s
}

// round writes, backs up, restores and compares.
func (s *scene) round() snapshot.Summary {
	s.t.Helper()
	s.write(20)
	sum := s.backup(s.d.path, "--name", s.name)
	file := s.restored(sum.SnapshotID.String())
	run(s.t, "blockdev", "--flushbufs", s.d.path)
	same(s.t, s.d.path, file)
	return sum
}

// freeFrom is the first of the blocks that the file system does not use.
const freeFrom = 6 << 10

// write writes n blocks past the file system, where it has nothing.
func (s *scene) write(n int) {
	s.t.Helper()
	var blocks []int64
	for _, i := range someBlocks(s.rng, (s.end-freeFrom)*kernel.BlockSize, n) {
		blocks = append(blocks, freeFrom+i)
	}
	f := direct(s.t, s.d.path)
	writeBlocks(s.t, f, s.c, blocks)
	_ = f.Close()
}

func (s *scene) start(flags ...string) {
	s.t.Helper()
	out := s.must(append([]string{"track", "start", "--json", "--tracker", "bpf", s.d.path}, flags...)...)
	var said struct {
		Fresh string `json:"fresh_reason"`
	}
	if err := json.Unmarshal([]byte(out), &said); err != nil {
		s.t.Fatal(err)
	}
	s.fresh = said.Fresh
}

func (s *scene) stop(flags ...string) {
	s.t.Helper()
	s.must(append([]string{"track", "stop", s.d.path}, flags...)...)
}

// save stops the tracker, and wants its history to be saved.
func (s *scene) save() {
	s.t.Helper()
	if out := s.must("track", "stop", "--save", "--json", s.d.path); !strings.Contains(out, `"saved":true`) {
		s.t.Fatal(out)
	}
}

// attach attaches a file to a loop device, whichever, in place of the one of the scene.
func (s *scene) attach(file string, flags ...string) {
	s.t.Helper()
	run(s.t, "losetup", "-d", s.d.path)
	s.d.file = file
	s.d.path = run(s.t, "losetup", append(append([]string{"--find", "--show"}, flags...), file)...)
}

func (s *scene) variable(name string) string {
	for _, v := range s.vars {
		if value, ok := strings.CutPrefix(v, name+"="); ok {
			return value
		}
	}
	s.t.Fatalf("no %s", name)
	return ""
}

func (s *scene) stateDir() string { return s.variable("DSYNC_STATE_DIR") }

// copyOf copies a folder or file beside it.
func (s *scene) copyOf(path string) string {
	s.t.Helper()
	run(s.t, "cp", "-a", path, path+".copy")
	return path + ".copy"
}

func (s *scene) replace(path, by string) {
	s.t.Helper()
	if err := errors.Join(os.RemoveAll(path), os.Rename(by, path)); err != nil {
		s.t.Fatal(err)
	}
}

// resize changes the size of the file, and tells the loop device.
func (s *scene) resize(size int64) {
	s.t.Helper()
	if err := os.Truncate(s.d.file, size); err != nil {
		s.t.Fatal(err)
	}
	run(s.t, "losetup", "-c", s.d.path)
}

// use mounts the device, through whatever, changes it, and unmounts it.
func (s *scene) use(device string) {
	s.t.Helper()
	dir := s.t.TempDir()
	run(s.t, "mount", device, dir)
	fillFile(s.t, filepath.Join(dir, "file"), s.c, 1<<20)
	run(s.t, "umount", dir)
}

// unseen is a block that the sample of the saved fingerprint leaves out.
func (s *scene) unseen() int64 {
	s.t.Helper()
	files, _ := filepath.Glob(filepath.Join(s.stateDir(), "trackers/*/saved"))
	if len(files) != 1 {
		s.t.Fatalf("saved states: %v", files)
	}
	text, err := os.ReadFile(files[0])
	if err != nil {
		s.t.Fatal(err)
	}
	_, body, _ := strings.Cut(string(text), "\n")
	var saved struct {
		Fingerprint struct{ Key string }
	}
	if err := json.Unmarshal([]byte(body), &saved); err != nil {
		s.t.Fatal(err)
	}
	key, err := hex.DecodeString(saved.Fingerprint.Key)
	if err != nil || len(key) != 32 {
		s.t.Fatalf("key %q: %v", saved.Fingerprint.Key, err)
	}
	random, sampled := rand.NewChaCha8([32]byte(key)), map[int64]bool{}
	for range 2048 {
		sampled[int64(random.Uint64()%(matrixSize/kernel.BlockSize))] = true
	}
	for i := int64(freeFrom); ; i++ {
		if !sampled[i] {
			return i
		}
	}
}

// backupThere backs up to another repository.
func (s *scene) backupThere(e *env) {
	s.t.Helper()
	e.backup(s.d.path, "--name", s.name)
}

func (s *scene) rotateElsewhere() {
	s.t.Helper()
	ctx := context.Background()
	tr, err := bpf.Open(s.d.path)
	if err != nil {
		s.t.Fatal(err)
	}
	defer tr.Close()
	e, err := tr.Rotate(ctx, kernel.NewNonce())
	if err := errors.Join(err, tr.Ack(ctx, e.Position.Epoch)); err != nil {
		s.t.Fatal(err)
	}
}

// pins is the folder of the tracker's pinned objects.
func (s *scene) pins() string {
	s.t.Helper()
	numbers := strings.ReplaceAll(run(s.t, "cat", "/sys/class/block/"+filepath.Base(s.d.path)+"/dev"), ":", "-")
	return filepath.Join("/sys/fs/bpf/dsync", numbers)
}

// stateOnDisk moves the state directory to a file system of its own, and gives its
// image and where it is mounted.
func (s *scene) stateOnDisk() (image, dir string) {
	s.t.Helper()
	image, dir = filepath.Join(s.t.TempDir(), "state.img"), s.t.TempDir()
	run(s.t, "truncate", "-s", "16M", image)
	run(s.t, "mkfs.ext4", "-q", "-F", image)
	run(s.t, "mount", "-o", "loop", image, dir)
	s.t.Cleanup(func() { _ = exec.Command("umount", dir).Run() })
	run(s.t, "cp", "-a", s.stateDir(), filepath.Join(dir, "state"))
	for i, v := range s.vars {
		if strings.HasPrefix(v, "DSYNC_STATE_DIR=") {
			s.vars[i] = "DSYNC_STATE_DIR=" + filepath.Join(dir, "state")
		}
	}
	return image, dir
}

// partition makes the scene one of a partition, which is tracked from its first
// backup on.
func (s *scene) partition() (disk string) {
	s.t.Helper()
	s.stop()
	disk = s.d.path
	run(s.t, "addpart", disk, "1", "2048", "57344")
	s.end = 57344 / 8
	s.d.path = disk + "p1"
	s.t.Cleanup(func() {
		s.try("track", "stop", disk+"p1")
		_ = exec.Command("delpart", disk, "1").Run()
		s.d.path = disk
	})
	s.name = "/dev/partition"
	run(s.t, "mkfs.ext4", "-q", "-b", "4096", s.d.path)
	s.start()
	s.backup(s.d.path, "--name", s.name)
	return disk
}
