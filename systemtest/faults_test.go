// SPDX-License-Identifier: BSD-2-Clause

package systemtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/repo/backend/faulty"
	"github.com/dsync-backup/dsync-backup/repo/backend/local"
	"github.com/dsync-backup/dsync-backup/repo/backend/retry"
	"github.com/dsync-backup/dsync-backup/repo/prune"
	"github.com/dsync-backup/dsync-backup/restore"
	"github.com/dsync-backup/dsync-backup/snapshot"
	"github.com/dsync-backup/dsync-backup/snapshot/device"
)

// hostile is a repository in a store that fails on command, and what is backed
// up to it, restored from it and pruned in it.
type hostile struct {
	*env
	r       *rand.Rand
	c       *content
	img, to string
	store   *faulty.Backend
	failed  int            // commands
	calls   map[string]int // of each command, in a store that is well
}

func newHostile(t testing.TB) *hostile {
	r := random(t)
	h := &hostile{env: lightEnv(t), r: r, c: newContent(r, false), to: filepath.Join(t.TempDir(), "to"), calls: map[string]int{}}
	h.img = image(t, h.c, 6<<20)
	be, err := local.Open(h.repo, local.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { be.Close() })
	h.store = faulty.New(be)
	return h
}

// run makes one command of a process of its own: it opens and locks the
// repository, and no try takes longer than the budget.
func (h *hostile) run(command string) (err error) {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	be := retry.New(h.store, retry.Options{Budget: 150 * time.Millisecond, FirstWait: 5 * time.Millisecond, MaxWait: 20 * time.Millisecond})
	r, err := repo.Open(ctx, be, "geheim", repo.Options{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	l, err := r.Lock(ctx, command == "prune", 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.Unlock()) }()
	ctx = l.Context()
	if err = r.LoadIndex(ctx); err == nil {
		err = map[string]func(context.Context, *repo.Repository) error{
			"backup": h.save, "restore": h.write, "prune": h.free,
		}[command](ctx, r)
	}
	if errors.Is(err, context.DeadlineExceeded) {
		h.t.Errorf("%s hangs: %v", command, err)
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
		Device: dev, Name: "/disk", Host: "here", Time: time.Now(),
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

func (h *hostile) free(ctx context.Context, r *repo.Repository) error {
	_, err := prune.Prune(ctx, r, prune.Options{})
	return err
}

// prepare gives a command something to do.
func (h *hostile) prepare(command string) {
	h.t.Helper()
	switch command {
	case "restore":
		if err := os.WriteFile(h.to, bytes.Repeat([]byte("old"), 100), 0o644); err != nil {
			h.t.Fatal(err)
		}
		return
	case "prune":
		h.must("forget", "-q", "--keep-last", "1")
	}
	f := direct(h.t, h.img)
	defer f.Close()
	fillRange(h.t, f, h.c, h.r.Int64N(5)<<20, 1<<20)
	if command == "prune" {
		if err := h.run("backup"); err != nil {
			h.t.Fatal(err)
		}
		h.must("forget", "-q", "--keep-last", "1")
	}
}

// right makes sure that a command that says it succeeded has done its work.
func (h *hostile) right(command string) {
	h.t.Helper()
	if command == "backup" {
		if err := h.run("restore"); err != nil {
			h.t.Fatal(err)
		}
	}
	if command != "prune" {
		same(h.t, h.img, h.to)
	}
}

// TestEveryFaultOfTheStore: with each fault that a store can have, once or for
// good, at a random call of backup, restore and prune, the command succeeds and
// has done its work, or it fails and says why, and nothing is lost by that.
func TestEveryFaultOfTheStore(t *testing.T) {
	h := newHostile(t)
	for _, command := range []string{"backup", "restore", "prune"} {
		h.prepare(command)
		before := h.store.Count(faulty.Any)
		if err := h.run(command); err != nil {
			t.Fatal(err)
		}
		h.right(command)
		h.calls[command] = h.store.Count(faulty.Any) - before
	}
	type fault struct {
		name string
		rule faulty.Rule
	}
	faults := []fault{
		{"late answer", faulty.Rule{Ops: faulty.Any, Delay: 200 * time.Millisecond}},
		{"save fails", faulty.Rule{Ops: faulty.Save, Where: faulty.Before}},
		{"save done, answer lost", faulty.Rule{Ops: faulty.Save, Where: faulty.After}},
		{"load fails", faulty.Rule{Ops: faulty.Load, Where: faulty.Before}},
		{"load breaks off", faulty.Rule{Ops: faulty.Load, Where: faulty.Truncate, Keep: 100}},
		{"stat fails", faulty.Rule{Ops: faulty.Stat, Where: faulty.Before}},
		{"list fails", faulty.Rule{Ops: faulty.List, Where: faulty.Before}},
		{"list breaks off", faulty.Rule{Ops: faulty.List, Where: faulty.Truncate, Keep: 1}},
		{"removal fails", faulty.Rule{Ops: faulty.Remove, Where: faulty.Before}},
		{"removed, answer lost", faulty.Rule{Ops: faulty.Remove, Where: faulty.After}},
		{"all fails", faulty.Rule{Ops: faulty.Any, Where: faulty.Before}},
		{"refused", faulty.Rule{Ops: faulty.Any, Where: faulty.Before, Err: backend.Permanent(errors.New("access denied"))}},
	}
	for _, command := range []string{"backup", "restore", "prune"} {
		for _, f := range faults {
			t.Run(command+"/"+f.name, func(t *testing.T) {
				h.t, h.env.t = t, t
				for range count(10, 1) {
					h.passes(command, f.rule)
					h.stays(command, func() {
						rule := f.rule
						rule.Skip = h.r.IntN(h.skips(command, rule.Ops))
						if rule.Where == faulty.Nowhere {
							rule.Every = 8 // of all calls, or it takes minutes
						}
						h.store.Inject(rule)
					})
				}
			})
		}
		t.Run(command+"/full", func(t *testing.T) {
			h.t, h.env.t = t, t
			h.stays(command, func() { h.store.SetSpace(h.r.Int64N(1 << 20)) })
		})
		t.Run(command+"/gone", func(t *testing.T) {
			h.t, h.env.t = t, t
			h.stays(command, func() { h.store.Kill(nil) })
		})
	}
	t.Logf("%d commands failed", h.failed)
	if h.failed < 10 {
		t.Error("hardly a fault came")
	}
}

// skips is how many calls may pass before the fault, so that it mostly comes.
func (h *hostile) skips(command string, ops faulty.Op) int {
	if ops == faulty.Any {
		return h.calls[command]
	}
	return 1 + h.calls[command]/8
}

// passes has a fault that a few calls in a row meet.
func (h *hostile) passes(command string, rule faulty.Rule) {
	h.t.Helper()
	h.prepare(command)
	rule.Skip, rule.Times = h.r.IntN(h.skips(command, rule.Ops)), 1+h.r.IntN(2)
	h.store.Inject(rule)
	err := h.run(command)
	h.store.Heal()
	switch {
	case err == nil:
		h.right(command)
	case rule.Err == nil: // a retry would have mended it
		h.t.Errorf("%s fails of what passes: %v", command, err)
		fallthrough
	default:
		h.mends(command, err)
	}
}

// stays has a fault that stays.
func (h *hostile) stays(command string, begin func()) {
	h.t.Helper()
	h.prepare(command)
	begin()
	err := h.run(command)
	h.store.Heal()
	if err == nil {
		h.right(command)
		return
	}
	h.mends(command, err)
}

// mends makes sure that a failure said why, that it did no harm, and that the
// command succeeds in a store that is well again.
func (h *hostile) mends(command string, err error) {
	h.t.Helper()
	known := errors.Is(err, faulty.ErrInjected) || errors.Is(err, backend.ErrPermanent) || errors.Is(err, repo.ErrLockLost)
	if line := fmt.Sprint(err); !known || strings.TrimSpace(line) == "" {
		h.t.Errorf("%s does not say why it failed: %v", command, err)
	}
	h.failed++
	h.must("-q", "unlock", "--remove-all") // as its error says
	if count(1, 0) > 0 {
		h.check() // restic's too
	} else {
		h.must("-q", "check")
	}
	if err := h.run(command); err != nil {
		h.t.Fatalf("%s in a store that is well again: %v", command, err)
	}
	h.right(command)
}
