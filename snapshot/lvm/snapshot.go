// SPDX-License-Identifier: BSD-2-Clause

package lvm

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel/devmapper"
	"github.com/dsync-backup/dsync-backup/snapshot/cow"
)

// Tag is what all snapshots made here are tagged with.
const Tag = "dsync-backup"

const (
	chunkSize      = "4k" // small writes copy little
	removePatience = 10 * time.Second
)

// Options tune New.
type Options struct {
	// Size of the copy-on-write space in bytes; 0: a tenth of the volume, or what
	// there is. A thin volume needs none.
	Size int64
	// Look, if not nil, is called before and after each change of the volume's
	// table: a tracker that counts changes can then tell one from the other.
	Look func(context.Context) error
}

// Snapshot is one snapshot of a logical volume. The calls come in this order:
// New, Take, Watch, Check, Drop; Drop may come at any time, and again.
type Snapshot struct {
	*volume
	o     Options
	lock  *os.File
	asked int64  // bytes of copy-on-write space
	snap  string // name of the snapshot's volume
	dm    string // its name in device-mapper
	taken bool   // it may be there
}

// New prepares a snapshot of the logical volume at a path: it removes what a
// process that died has left, and looks whether there is room.
func New(ctx context.Context, path string, o Options) (*Snapshot, error) {
	s := &Snapshot{o: o}
	if s.o.Look == nil {
		s.o.Look = func(context.Context) error { return nil }
	}
	if err := s.open(ctx, path); err != nil {
		return nil, errors.Join(fmt.Errorf("prepare an LVM snapshot of %s: %w", path, err), s.unlock())
	}
	return s, nil
}

func (s *Snapshot) open(ctx context.Context, path string) error {
	uuid := uuidOf(path)
	if uuid == "" {
		return ErrNotVolume
	}
	if _, err := program(); err != nil {
		return err
	}
	var err error
	if s.lock, err = cow.Lock("lvm-" + uuid); err != nil {
		return err
	}
	if s.volume, err = find(ctx, path, uuid, s.lock); err != nil {
		return err
	}
	if err := s.clean(ctx); err != nil {
		return err
	}
	// LVM asks for it even where the snapshot is a thin one.
	if _, err := devmapper.TargetVersion("snapshot"); err != nil {
		return fmt.Errorf("%w: the kernel module dm-snapshot is not there: %w", ErrUnsupported, err)
	}
	s.snap = s.prefix() + strings.ToLower(rand.Text()[:8])
	s.dm = mapperName(s.vg, s.snap)
	if s.thin {
		return s.poolRoom(ctx, s.lock)
	}
	s.asked, err = s.space(s.o.Size)
	return err
}

// prefix begins the names of our snapshots of this volume, and tells them from
// those of others even where LVM was stopped before it knew the origin.
func (v *volume) prefix() string { return "dsync-" + v.uuid[:12] + "-" }

// mapperName is what LVM calls a volume in device-mapper.
func mapperName(vg, name string) string {
	return strings.ReplaceAll(vg, "-", "--") + "-" + strings.ReplaceAll(name, "-", "--")
}

// clean removes snapshots of processes that died: whoever lives has the lock.
func (s *Snapshot) clean(ctx context.Context) error {
	names, err := s.ours(ctx)
	if err != nil || len(names) == 0 {
		return err
	}
	for _, name := range names {
		if err := s.remove(ctx, name); err != nil {
			return fmt.Errorf("remove the snapshot %s/%s that a backup which died has left: %w", s.vg, name, err)
		}
	}
	// There is more room now.
	s.volume, err = find(ctx, s.path, s.uuid, s.lock)
	return err
}

// ours lists the snapshots of the volume that were made here.
func (s *Snapshot) ours(ctx context.Context) ([]string, error) {
	rows, err := report(ctx, s.lock, "lv_name,lv_tags", s.vg)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, r := range rows {
		if strings.HasPrefix(r["lv_name"], s.prefix()) && slices.Contains(strings.Split(r["lv_tags"], ","), Tag) {
			names = append(names, r["lv_name"])
		}
	}
	return names, nil
}

// remove removes one of our snapshots. Somebody may have it open for a moment,
// such as udev.
func (s *Snapshot) remove(ctx context.Context, name string) error {
	if err := s.o.Look(ctx); err != nil {
		return err
	}
	for end := time.Now().Add(removePatience); ; time.Sleep(200 * time.Millisecond) {
		_, err := run(s.lock, "lvremove", "-f", "-y", s.vg+"/"+name)
		if err == nil {
			return s.o.Look(ctx)
		}
		left, listErr := s.ours(ctx)
		if listErr == nil && !slices.Contains(left, name) {
			return s.o.Look(ctx) // somebody else removed it
		}
		if time.Now().After(end) {
			return err
		}
	}
}

// Take makes the snapshot and gives its node. LVM freezes the file system that
// is mounted on the volume for it, and suspends the volume.
func (s *Snapshot) Take(ctx context.Context) (string, error) {
	path, err := s.take(ctx)
	if err != nil {
		return "", fmt.Errorf("make an LVM snapshot of %s: %w", s.path, err)
	}
	return path, nil
}

func (s *Snapshot) take(ctx context.Context) (string, error) {
	if err := ctx.Err(); err != nil {
		return "", context.Cause(ctx)
	}
	args := []string{"lvcreate", "-y", "-s", "-p", "r", "-n", s.snap, "--addtag", Tag}
	if s.thin {
		args = append(args, "-k", "n")
	} else {
		args = append(args, "-c", chunkSize, "-L", strconv.FormatInt(s.asked, 10)+"b")
	}
	s.taken = true
	if _, err := run(s.lock, append(args, s.vg+"/"+s.name)...); err != nil {
		return "", err
	}
	i, err := devmapper.Stat(s.dm)
	if err != nil {
		return "", err
	}
	return cow.Node(ctx, i)
}

// Watch returns a context that ends when the snapshot has run out of space, with
// the reason as its cause. warn is called once, before that.
func (s *Snapshot) Watch(ctx context.Context, warn func(error)) context.Context {
	return cow.Watch(ctx, "snapshot "+s.vg+"/"+s.snap, s.used, warn)
}

// Check says whether all that was read so far is what the volume held.
func (s *Snapshot) Check(context.Context) error {
	_, err := s.used()
	return err
}

// used is how full the space is, in percent.
func (s *Snapshot) used() (percent int, err error) {
	if s.thin {
		err = s.checkThin()
	} else {
		percent, err = cow.Used(s.dm)
	}
	switch {
	case errors.Is(err, cow.ErrFull):
		err = fmt.Errorf("back up %s: %w (the snapshot %s/%s, %d MiB): give it more with --cow, or say --snapshot precopy",
			s.path, err, s.vg, s.snap, s.asked>>20)
	case err != nil:
		err = fmt.Errorf("look at the snapshot %s/%s of %s: %w", s.vg, s.snap, s.path, err)
	}
	return percent, err
}

// checkThin looks whether the thin snapshot is there and its pool works. A pool
// that is full takes no more writes, but keeps what it holds.
func (s *Snapshot) checkThin() error {
	status, err := devmapper.Status(s.dm, devmapper.Query{NoFlush: true})
	if errors.Is(err, unix.ENXIO) {
		return errors.New("somebody removed it")
	}
	if err != nil {
		return err
	}
	if len(status) != 1 || status[0].Type != "thin" {
		return errors.New("somebody changed its table")
	}
	if said := strings.TrimSpace(status[0].Params); said == "Fail" || said == "Error" {
		return fmt.Errorf("its pool %s/%s says %q", s.vg, s.pool, said)
	}
	return nil
}

// Drop removes the snapshot.
func (s *Snapshot) Drop() error {
	if s.lock == nil {
		return nil
	}
	ctx := context.Background()
	var err error
	if s.taken {
		var left []string
		if left, err = s.ours(ctx); err == nil && slices.Contains(left, s.snap) {
			err = s.remove(ctx, s.snap)
		}
		if err != nil {
			err = fmt.Errorf("remove the snapshot of %s (by hand: lvremove %s/%s; else the next backup tries again): %w", s.path, s.vg, s.snap, err)
		}
		s.taken = err != nil
	}
	return errors.Join(err, s.unlock())
}

func (s *Snapshot) unlock() error {
	if s.lock == nil {
		return nil
	}
	err := s.lock.Close()
	s.lock = nil
	return err
}
