// SPDX-License-Identifier: BSD-2-Clause

package systemtest

import (
	"os"
	"path/filepath"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/snapshot"
)

const (
	byTracker = snapshot.ChangesTracker
	byCompare = snapshot.ChangesCompare
)

// alone marks an event during which no other test of this package may attach loop devices.
const alone = 1

// events are the rows of the table, in its order.
var events = []event{
	{"nothing", func(*scene) {}, byTracker, "", byTracker, 0},
	{"mounted, written to, unmounted", func(s *scene) { s.use(s.d.path) }, byTracker, "", byTracker, 0},
	{"`track stop --save`, detached, attached under another name, `track start`", func(s *scene) {
		s.save()
		s.attach(s.d.file)
		s.start()
	}, byTracker, "", byTracker, 0},
	{"`track stop --save`, `track start --fresh`", func(s *scene) {
		s.save()
		s.start("--fresh")
	}, byCompare, "--fresh", byTracker, 0},
	{"`track stop`, `track start` (the programs are loaded anew)", func(s *scene) {
		s.stop()
		s.start()
	}, byCompare, "started afresh", byTracker, 0},
	{"`track stop --save`, written past the file system (2 %), `track start`", func(s *scene) {
		s.save()
		s.write(164)
		s.start()
	}, byCompare, "blocks of a sample", byTracker, 0},
	{"`track stop --save`, mounted elsewhere and written to, `track start`", func(s *scene) {
		s.save()
		s.use(s.d.file)
		s.start()
	}, byCompare, "ext4 at byte 0 was used", byTracker, 0},
	{"`track stop --save`, `e2fsck -f`, `track start`", func(s *scene) {
		s.save()
		run(s.t, "e2fsck", "-f", "-p", s.d.path)
		s.start()
	}, byCompare, "ext4 at byte 0 was used", byTracker, 0},
	{"`track stop --save`, `track start` while it is mounted", func(s *scene) {
		s.save()
		dir := s.t.TempDir()
		run(s.t, "mount", s.d.path, dir)
		s.start()
		run(s.t, "umount", dir)
	}, byCompare, "in use", byTracker, 0},
	{"`track stop --save`, the loop device reused for another file, `track start`", func(s *scene) {
		s.save()
		s.attach(s.copyOf(s.d.file))
		s.write(3)
		s.start()
	}, byCompare, "another file", byTracker, 0},
	{"a tracing link removed", func(s *scene) {
		if err := os.Remove(filepath.Join(s.pins(), "link_rq_complete_1")); err != nil {
			s.t.Fatal(err)
		}
	}, byCompare, "tracing link", byTracker, 0},
	{"a tracing link replaced by another", func(s *scene) {
		if err := os.Rename(filepath.Join(s.pins(), "link_rq_issue_1"), filepath.Join(s.pins(), "link_rq_issue_0")); err != nil {
			s.t.Fatal(err)
		}
	}, byCompare, "tracing link", byTracker, 0},
	{"the state directory lost", func(s *scene) {
		if err := os.RemoveAll(s.stateDir()); err != nil {
			s.t.Fatal(err)
		}
	}, byCompare, "not in the log", byTracker, 0},
	{"the state directory from yesterday, copied back", func(s *scene) {
		yesterday := s.copyOf(s.stateDir())
		s.round()
		s.replace(s.stateDir(), yesterday)
	}, byCompare, "not in the log", byTracker, 0},
	{"the state directory from a stop yesterday, copied back before `track start`", func(s *scene) {
		s.save()
		yesterday := s.copyOf(s.stateDir())
		s.start()
		s.round()
		s.save()
		s.replace(s.stateDir(), yesterday)
		s.start()
	}, byCompare, "is a copy", byTracker, 0},
	{"the state directory's file system rolled back to a stop yesterday, a block that the sample misses written since, `track start`", func(s *scene) {
		image, dir := s.stateOnDisk()
		s.save()
		block := s.unseen()
		run(s.t, "umount", dir)
		yesterday := s.copyOf(image)
		run(s.t, "mount", "-o", "loop", image, dir)
		s.start()
		f := direct(s.t, s.d.path)
		writeBlocks(s.t, f, s.c, []int64{block})
		_ = f.Close()
		s.backup(s.d.path, "--name", s.name)
		s.stop()
		run(s.t, "umount", dir)
		s.replace(image, yesterday)
		run(s.t, "mount", "-o", "loop", image, dir)
		s.start()
	}, byCompare, "reverted to an older state", byTracker, 0},
	{"the repository restored from an old copy", func(s *scene) {
		old := s.copyOf(s.repo)
		s.round()
		s.replace(s.repo, old)
	}, byTracker, "", byTracker, 0},
	{"the newest snapshot forgotten, by restic, and pruned", func(s *scene) {
		s.restic("0.18", "forget", "latest", "--prune")
	}, byTracker, "", byTracker, 0},
	{"all snapshots forgotten", func(s *scene) {
		s.restic("0.18", "forget", "--keep-last", "1", "--prune")
		s.restic("0.18", "forget", "latest")
	}, snapshot.ChangesFull, "", byTracker, 0},
	{"the snapshots tagged by restic", func(s *scene) { s.restic("0.18", "tag", "--add", "important") }, byTracker, "", byTracker, 0},
	{"the snapshots rewritten by restic, to other times and another host", func(s *scene) {
		s.restic("0.18", "rewrite", "--forget", "--new-time", "2001-02-03 04:05:06", "--new-host", "elsewhere")
	}, byTracker, "", byTracker, 0},
	{"the snapshots copied by restic to another repository, which is used from then on", func(s *scene) {
		to := s.sibling(filepath.Join(s.t.TempDir(), "copy"))
		to.initLight()
		to.vars = append(to.vars, "RESTIC_FROM_REPOSITORY="+s.repo, "RESTIC_FROM_PASSWORD=geheim")
		to.restic("0.18", "copy")
		s.env = to
	}, byTracker, "", byTracker, 0},
	{"another repository backed up to in between", func(s *scene) {
		other := s.sibling(filepath.Join(s.t.TempDir(), "other"))
		other.initLight()
		for range 3 {
			s.write(5)
			s.backupThere(other)
		}
	}, byTracker, "", byTracker, 0},
	{"another tool ended an epoch, and kept it to itself", func(s *scene) {
		s.write(5)
		s.rotateElsewhere()
	}, byCompare, "not in the log", byTracker, 0},
	{"backed up with another state directory in between", func(s *scene) {
		other := newEnv(s.t, filepath.Join(s.t.TempDir(), "other"))
		other.initLight()
		s.write(5)
		s.backupThere(other)
	}, byCompare, "not in the log", byTracker, 0},
	{"a snapshot made with the clock set back by years", func(s *scene) {
		s.write(5)
		s.backup(s.d.path, "--name", s.name, "--time", "2001-02-03 04:05:06")
	}, byTracker, "", byTracker, 0},
	{"the device grown", func(s *scene) { s.resize(matrixSize + 4<<20) }, byCompare, "changed its size", byTracker, 0},
	{"the device shrunk", func(s *scene) { s.resize(matrixSize - 64*kernel.BlockSize) }, byCompare, "changed its size", byTracker, 0},
	{"the device replaced by another of the same size", func(s *scene) {
		other := s.copyOf(s.d.file)
		s.write(3)
		run(s.t, "losetup", "-d", s.d.path)
		run(s.t, "losetup", s.d.path, other)
		s.d.file = other
	}, byCompare, "was replaced by another", byTracker, alone},
	{"the loop device moved in its file", func(s *scene) {
		run(s.t, "truncate", "-s", "+1M", s.d.file)
		run(s.t, "losetup", "-d", s.d.path)
		run(s.t, "losetup", "-o", "1M", s.d.path, s.d.file)
	}, byCompare, "was replaced by another", byTracker, alone},
	{"`track stop --save`, the partition moved, `track start`", func(s *scene) {
		disk := s.partition()
		s.save()
		run(s.t, "delpart", disk, "1")
		run(s.t, "addpart", disk, "1", "4096", "57344")
		s.start()
	}, byCompare, "started afresh", byTracker, 0},
}
