// SPDX-License-Identifier: BSD-2-Clause

package systemtest

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/repo/backend/faulty"
	"github.com/dsync-backup/dsync-backup/repo/backend/local"
	"github.com/dsync-backup/dsync-backup/repo/backend/retry"
	"github.com/dsync-backup/dsync-backup/repo/check"
	"github.com/dsync-backup/dsync-backup/repo/prune"
	"github.com/dsync-backup/dsync-backup/restore"
	"github.com/dsync-backup/dsync-backup/snapshot"
	devicecheck "github.com/dsync-backup/dsync-backup/snapshot/check"
	"github.com/dsync-backup/dsync-backup/snapshot/device"
)

// commands are what is run in a hostile store.
var commands = []string{"backup", "restore", "prune"}

// hostile is a repository in a store that fails on command, and what is backed
// up to it, restored from it and pruned in it. While the store is well commands run in
// bubbles of synctest, which have a clock of their own: nobody waits for a lock to settle.
type hostile struct {
	*env
	r       *rand.Rand
	c       *content
	img, to string
	store   *faulty.Backend
	retries retry.Options
	now     time.Time // of the newest backup
	failed  int       // commands

	calls map[string]map[faulty.Op]int // of each command, in a store that is well
}

func newHostile(t testing.TB) *hostile {
	r := random(t)
	h := &hostile{env: lightEnv(t), r: r, c: newContent(r, false), to: filepath.Join(t.TempDir(), "to"), now: time.Now()}
	h.img = image(t, h.c, 6<<20)
	be, err := local.Open(h.repo, local.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { be.Close() })
	h.store = faulty.New(be)
	// The first to ask for signals starts a goroutine, which is to be in no bubble.
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	t.Cleanup(func() { signal.Stop(hup) })

	h.calls = map[string]map[faulty.Op]int{}
	for _, command := range commands {
		h.prepare(command)
		before := map[faulty.Op]int{}
		for _, op := range []faulty.Op{faulty.Save, faulty.Load, faulty.Stat, faulty.List, faulty.Remove} {
			before[op] = h.store.Count(op)
		}
		if err := h.run(command); err != nil {
			t.Fatal(err)
		}
		for op, n := range before {
			before[op] = h.store.Count(op) - n
		}
		h.calls[command] = before
		h.right(command)
	}
	return h
}

// count is how often a command calls the store.
func (h *hostile) count(command string, ops faulty.Op) (n int) {
	for op, calls := range h.calls[command] {
		if op&ops != 0 {
			n += calls
		}
	}
	return n
}

// on has the subtest t use it.
func (h *hostile) on(t *testing.T) { h.t, h.env.t = t, t }

// run makes one command in a bubble, in a store that is well.
func (h *hostile) run(command string) error {
	h.t.Helper()
	_, err := h.timed(command)
	return err
}

// timed says as well for how long the command waited, by the clock of the bubble. That
// stands still if somebody waits for a mutex while its holder sleeps in the store: with
// a store that sleeps it is for a repository of one snapshot.
func (h *hostile) timed(command string) (took time.Duration, err error) {
	h.t.Helper()
	synctest.Test(h.t.(*testing.T), func(*testing.T) {
		began := time.Now()
		err = h.process(context.Background(), command)
		took = time.Since(began)
	})
	return took, err
}

// process does what a process of its own does: it opens and locks the repository.
func (h *hostile) process(ctx context.Context, command string) (err error) {
	be := retry.New(h.store, h.retries)
	r, err := repo.Open(ctx, be, "geheim", repo.Options{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	l, err := r.Lock(ctx, command == "prune" || command == "check", 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.Unlock()) }()
	ctx = l.Context()
	if err = r.LoadIndex(ctx); err == nil {
		err = map[string]func(context.Context, *repo.Repository) error{
			"backup": h.save, "restore": h.write, "prune": h.free, "check": h.look,
		}[command](ctx, r)
	}
	return err
}

func (h *hostile) save(ctx context.Context, r *repo.Repository) error {
	dev, err := device.Open(h.img, device.Options{})
	if err != nil {
		return err
	}
	defer dev.Close()
	still := func() error { return nil }
	_, err = snapshot.Backup(ctx, r, snapshot.Options{
		Device: dev, Name: "/disk", Host: "here", Time: h.now,
		Instant: &moment{kind: snapshot.PointInTimeFile, begins: still, ends: still},
	})
	return err
}

func (h *hostile) write(ctx context.Context, r *repo.Repository) error {
	var newest *repo.Snapshot
	var of repo.ID
	err := r.ListSnapshots(ctx, func(id repo.ID, s *repo.Snapshot, err error) error {
		if err == nil && (newest == nil || s.Time.After(newest.Time)) {
			newest, of = s, id
		}
		return err
	})
	if err != nil {
		return err
	}
	store := snapshot.Store{Repository: r}
	devices, err := snapshot.Devices(ctx, store, of, newest)
	if err != nil {
		return err
	}
	_, err = restore.Restore(ctx, store, restore.Options{Device: devices[0], Target: h.to, Changes: restore.ChangesAll, Force: true, Verify: true})
	return err
}

// look is a check of all data.
func (h *hostile) look(ctx context.Context, r *repo.Repository) error {
	var found []error
	res, err := check.Check(ctx, r, check.Options{ReadData: check.All(), Report: func(p check.Problem) {
		if !p.Harmless {
			found = append(found, errors.New(p.String()))
		}
	}})
	if err != nil {
		return err
	}
	defer res.Damage.Close()
	touched, err := res.Damage.Touched(ctx, res.Snapshots)
	if err != nil {
		return err
	}
	devices, err := devicecheck.Devices(ctx, snapshot.Store{Repository: r}, devicecheck.Options{
		Snapshots: res.Snapshots, Touched: touched, Blob: res.Damage.Blob,
		Report: func(f devicecheck.Finding) { found = append(found, errors.New(f.String())) },
	})
	if devices == 0 {
		found = append(found, errors.New("no device was checked"))
	}
	return errors.Join(append(found, err)...)
}

func (h *hostile) free(ctx context.Context, r *repo.Repository) error {
	_, err := prune.Prune(ctx, r, prune.Options{})
	return err
}

// prepare gives a command something to do.
func (h *hostile) prepare(command string) {
	h.t.Helper()
	if command == "restore" {
		h.forgetTarget()
		return
	}
	f := direct(h.t, h.img)
	defer f.Close()
	fillRange(h.t, f, h.c, h.r.Int64N(5)<<20, 1<<20)
	h.now = h.now.Add(time.Hour)
	if command == "prune" {
		if err := h.run("backup"); err != nil {
			h.t.Fatal(err)
		}
		h.must("forget", "-q", "--keep-last", "1")
	}
}

// forgetTarget leaves nothing in the target that could be taken for restored.
func (h *hostile) forgetTarget() {
	h.t.Helper()
	if err := os.WriteFile(h.to, bytes.Repeat([]byte("old"), 100), 0o644); err != nil {
		h.t.Fatal(err)
	}
}

// right makes sure that a command that says it succeeded has done its work, and no
// harm: all that is stored is whole, and the newest snapshot is what was backed up.
func (h *hostile) right(command string) {
	h.t.Helper()
	if command != "restore" {
		for _, after := range []string{"check", "restore"} {
			h.forgetTarget()
			if err := h.run(after); err != nil {
				h.t.Fatalf("%s after %s: %v", after, command, err)
			}
		}
	}
	same(h.t, h.img, h.to)
}
