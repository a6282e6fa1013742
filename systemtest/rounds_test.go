// SPDX-License-Identifier: BSD-2-Clause

package systemtest

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/dsync-backup/dsync-backup/repo/backend/miniotest"
	"github.com/dsync-backup/dsync-backup/snapshot"
)

// kept is a snapshot, and an image of what the device held at that moment. The
// tree stays the same when restic gives the snapshot another ID.
type kept struct {
	id, tree, truth string
}

// rounds is a device in use, and two repositories that both back it up.
type rounds struct {
	t      *testing.T
	disk   *disk
	spare  *disk // restored to, over and over
	truths string
	seed   func() uint64
	stores []*store
}

// store is a repository and what was saved there, oldest first.
type store struct {
	*env
	name string
	kept []kept
}

// TestEverySnapshotRestoresWhatTheDeviceHeld uses a file system, backs it up
// into two repositories after every round of changes, in use and at rest in
// turn, and restores every snapshot from both. Then restic copies, forgets,
// prunes, tags and rewrites, and what is left restores, and is gone on from.
func TestEverySnapshotRestoresWhatTheDeviceHeld(t *testing.T) {
	r := startRounds(t)
	local, remote := r.stores[0], r.stores[1]
	for i := range count(20, 6) {
		r.round(i)
		local.check()
	}
	remote.check()
	r.momentsDiffer()
	for _, s := range r.stores {
		for i, k := range s.kept {
			r.restore(i, s, k)
		}
	}
	copied := r.copyAndForget(local)
	r.renameAll(local)
	r.goOn(local)
	r.goOn(copied)
}

func startRounds(t *testing.T) *rounds {
	random := random(t)
	minio := miniotest.Start(t)
	minio.Setenv(t)
	minio.MakeBucket("backups")
	local := newEnv(t, filepath.Join(t.TempDir(), "repo"))
	remote := local.sibling(minio.Location("backups", "host/disk"), minio.Environ()...)
	r := &rounds{
		t: t, disk: newDisk(t, 1<<30), spare: newDisk(t, 1<<30), truths: t.TempDir(), seed: random.Uint64,
		stores: []*store{{env: local, name: "local"}, {env: remote, name: "MinIO"}},
	}
	for _, s := range r.stores {
		s.initLight()
	}
	r.disk.mkfs("ext4")
	r.disk.track(local)
	run(t, "cp", "-r", filepath.Join(goRoot(), "src"), r.disk.mnt)
	return r
}

// round changes the file system and backs it up, in use in every second round.
func (r *rounds) round(i int) {
	r.t.Helper()
	u := startUser(r.t, r.disk.mnt, r.seed(), count(200, 80))
	if trims(i) {
		run(r.t, "fstrim", r.disk.mnt)
	}
	truth := filepath.Join(r.truths, fmt.Sprintf("round-%02d", i))
	if !inUse(i) {
		u.stop()
		r.disk.umount()
		r.disk.image(truth)
	}
	for _, s := range r.stores {
		var sum snapshot.Summary
		if inUse(i) {
			// Another freeze is another moment.
			truth = filepath.Join(r.truths, fmt.Sprintf("round-%02d-%s", i, s.name))
			durable := u.committed.Load()
			sum = r.disk.backupFrozen(s.env, truth)
			r.checkFrozen(s, sum, truth, durable)
		} else if sum = s.backup(r.disk.path); sum.PointInTime != string(snapshot.PointInTimeUnmounted) {
			r.t.Fatalf("round %d, %s: the point in time is %q", i, s.name, sum.PointInTime)
		}
		r.t.Logf("round %d, %s: %s, dirty %d, read %d, stored %d + %d, %d layers, %.2f s", i, s.name, sum.Changes, sum.DirtyBytes,
			sum.BytesRead, sum.DataAddedPacked, sum.MetadataAddedPacked, sum.Layers, sum.DurationSeconds)
		r.checkSummary(i, s, sum)
		id := sum.SnapshotID.String()
		s.kept = append(s.kept, kept{id, s.treeOf(id), truth})
	}
	if inUse(i) {
		u.stop()
	} else {
		r.disk.mount()
	}
}

// inUse says in which rounds the file system stays mounted, and is written to
// during the backup.
func inUse(i int) bool { return i%2 == 1 }

// trims says in which rounds all that is free is discarded. A discard is a
// write, so there the dirty blocks are more than what is in use.
func trims(i int) bool { return i%3 == 2 }

func (r *rounds) checkSummary(i int, s *store, sum snapshot.Summary) {
	r.t.Helper()
	want := snapshot.ChangesTracker
	if i == 0 {
		want = snapshot.ChangesFull
	}
	if sum.Changes != want || sum.FallbackReason != "" {
		r.t.Fatalf("round %d, %s: changes %s, want %s; reason %q", i, s.name, sum.Changes, want, sum.FallbackReason)
	}
	if i > 0 && (sum.BytesRead != sum.DirtyBytes || sum.DirtyBytes == 0 || !trims(i) && sum.DirtyBytes > sum.DeviceSize/4) {
		r.t.Fatalf("round %d, %s: read %d bytes, dirty %d of %d", i, s.name, sum.BytesRead, sum.DirtyBytes, sum.DeviceSize)
	}
	if st := s.tracked(r.disk); !st.Reliable {
		r.t.Fatalf("round %d: the tracker is not reliable: %s", i, st.Reason)
	}
}

// checkFrozen looks whether an image of a moment is one that a database can
// start from: all file systems were frozen before the copy began.
func (r *rounds) checkFrozen(s *store, sum snapshot.Summary, truth string, durable int64) {
	r.t.Helper()
	s.restoresOver(sum.SnapshotID.String(), truth, r.spare)
	r.spare.mount()
	checkDatabase(r.t, r.spare.mnt, durable)
	r.spare.umount()
}

// restore restores a snapshot after all that came later. The default takes one
// way a snapshot, beside checkFrozen's restores to a device.
func (r *rounds) restore(i int, s *store, k kept) {
	r.t.Helper()
	every := count(1, 0) == 1
	if every || !inUse(i) {
		s.restoresTo(k.id, k.truth)
	}
	if every || inUse(i) {
		s.dumpsAs(k.id, k.truth)
	}
	if every {
		s.restoresOver(k.id, k.truth, r.spare)
	}
}

// momentsDiffer looks whether the tests would notice a snapshot of another
// moment: no two images are the same.
func (r *rounds) momentsDiffer() {
	r.t.Helper()
	local, remote := r.stores[0].kept, r.stores[1].kept
	for i := range local {
		if i > 0 && local[i].tree == local[i-1].tree {
			r.t.Fatalf("rounds %d and %d left the same image", i-1, i)
		}
		if i%2 == 1 && local[i].truth == remote[i].truth {
			r.t.Fatalf("round %d has one truth for two moments", i)
		}
	}
}

// listed is a snapshot as `snapshots --json` has it.
type listed struct {
	ID, Tree, Hostname string
	Tags               []string
	Paths              []string
}

func (e *env) snapshots() (list []listed) {
	e.t.Helper()
	if err := json.Unmarshal([]byte(e.must("snapshots", "--json")), &list); err != nil {
		e.t.Fatal(err)
	}
	return list
}

func (e *env) treeOf(id string) string {
	e.t.Helper()
	for _, s := range e.snapshots() {
		if s.ID == id {
			return s.Tree
		}
	}
	e.t.Fatalf("snapshot %s is not listed", id)
	return ""
}

// found gives what is kept the IDs that the snapshots have now, and drops what
// is gone.
func (s *store) found() {
	s.t.Helper()
	list := s.snapshots()
	s.kept = slices.DeleteFunc(slices.Clone(s.kept), func(k kept) bool {
		return !slices.ContainsFunc(list, func(l listed) bool { return l.Tree == k.tree })
	})
	if len(s.kept) != len(list) {
		s.t.Fatalf("%s: %d snapshots are listed, %d of them are known", s.name, len(list), len(s.kept))
	}
	for i := range s.kept {
		at := slices.IndexFunc(list, func(l listed) bool { return l.Tree == s.kept[i].tree })
		s.kept[i].id = list[at].ID
	}
}

// copyAndForget has one restic copy the repository, both forget all but three
// snapshots and prune, and restores those three from both.
func (r *rounds) copyAndForget(from *store) *store {
	r.t.Helper()
	to := &store{env: from.sibling(filepath.Join(r.t.TempDir(), "copy"),
		"RESTIC_FROM_REPOSITORY="+from.repo, "RESTIC_FROM_PASSWORD=geheim"), name: "copy", kept: slices.Clone(from.kept)}
	to.restic("0.18", "init", "--copy-chunker-params")
	to.restic("0.18", "copy")
	to.found()
	if len(to.kept) != len(from.kept) {
		r.t.Fatalf("restic copied %d of %d snapshots", len(to.kept), len(from.kept))
	}
	from.restic("0.18", "forget", "--keep-last", "3", "--prune")
	to.restic("0.14", "forget", "--keep-last", "3", "--prune")
	for _, s := range []*store{from, to} {
		all := s.kept
		s.found()
		if len(s.kept) != 3 || s.kept[0].truth != all[len(all)-3].truth {
			r.t.Fatalf("%s: restic kept %d snapshots, or the wrong ones", s.name, len(s.kept))
		}
		s.check()
		for _, k := range s.kept {
			s.restoresTo(k.id, k.truth)
		}
	}
	return to
}

// renameAll has restic change the snapshots' tags, times, hosts and so IDs.
func (r *rounds) renameAll(s *store) {
	r.t.Helper()
	s.restic("0.14", "tag", "--remove", "dsync", "--add", "kept")
	s.restic("0.18", "rewrite", "--exclude", "nothing-like-that", "--forget")
	s.found()
	// The oldest becomes the newest by its time, and another host's.
	s.restic("0.18", "rewrite", "--forget", "--new-host", "elsewhere", "--new-time", "2037-01-01 00:00:00", s.kept[0].id)
	before := s.kept[0].id
	s.found()
	if s.kept[0].id == before {
		r.t.Fatal("restic rewrite changed nothing")
	}
	for _, k := range s.kept {
		s.restoresTo(k.id, k.truth)
	}
	s.check()
}

// goOn changes the device once more and backs it up: from the snapshot of the
// last round, whatever was made of it.
func (r *rounds) goOn(s *store) {
	r.t.Helper()
	u := startUser(r.t, r.disk.mnt, r.seed(), 30)
	u.stop()
	r.disk.umount()
	truth := filepath.Join(r.truths, "on-from-"+s.name)
	r.disk.image(truth)
	sum := s.backup(r.disk.path)
	r.disk.mount()
	r.checkSummary(1, s, sum)
	if last := s.kept[len(s.kept)-1]; sum.Parent == nil || sum.Parent.String() != last.id {
		r.t.Fatalf("%s: the parent is %v, want the one with the highest position, %s", s.name, sum.Parent, last.id)
	}
	s.restoresTo(sum.SnapshotID.String(), truth)
	s.restoresOver(sum.SnapshotID.String(), truth, r.spare)
	s.check()
	if err := os.Remove(truth); err != nil {
		r.t.Fatal(err)
	}
}
