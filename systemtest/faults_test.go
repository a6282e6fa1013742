// SPDX-License-Identifier: BSD-2-Clause

package systemtest

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/repo/backend/faulty"
	"github.com/dsync-backup/dsync-backup/repo/backend/retry"
)

// fault is a kind of fault.
type fault struct {
	name string
	rule faulty.Rule
	// mended says that retries get over it also when it stays.
	mended bool
	// parts says that it may leave a file that is not whole.
	parts bool
}

var faults = []fault{
	{name: "late answer", rule: faulty.Rule{Ops: faulty.Any, Every: 8, Delay: 200 * time.Millisecond}, mended: true},
	{name: "slow transfer", rule: faulty.Rule{Ops: faulty.Save | faulty.Load, Rate: 8 << 20}, mended: true},
	{name: "throttled", rule: faulty.Rule{Ops: faulty.Any, Every: 3, Where: faulty.Before, Err: faulty.ErrThrottled}, mended: true},
	{name: "save fails", rule: faulty.Rule{Ops: faulty.Save, Where: faulty.Before}},
	{name: "save done, answer lost", rule: faulty.Rule{Ops: faulty.Save, Where: faulty.After}},
	{name: "save breaks off", rule: faulty.Rule{Ops: faulty.Save, Where: faulty.Truncate, Keep: 100}, parts: true},
	{name: "save leaves nothing in a file", rule: faulty.Rule{Ops: faulty.Save, Where: faulty.Truncate}, parts: true},
	{name: "load fails", rule: faulty.Rule{Ops: faulty.Load, Where: faulty.Before}},
	{name: "load breaks off", rule: faulty.Rule{Ops: faulty.Load, Where: faulty.Truncate, Keep: 100}},
	{name: "stat fails", rule: faulty.Rule{Ops: faulty.Stat, Where: faulty.Before}},
	{name: "list fails", rule: faulty.Rule{Ops: faulty.List, Where: faulty.Before}},
	{name: "list breaks off", rule: faulty.Rule{Ops: faulty.List, Where: faulty.Truncate, Keep: 1}},
	{name: "removal fails", rule: faulty.Rule{Ops: faulty.Remove, Where: faulty.Before}},
	{name: "removed, answer lost", rule: faulty.Rule{Ops: faulty.Remove, Where: faulty.After}},
	{name: "all fails", rule: faulty.Rule{Ops: faulty.Any, Where: faulty.Before}},
	{name: "refused", rule: faulty.Rule{Ops: faulty.Any, Where: faulty.Before, Err: backend.Permanent(errors.New("access denied"))}},
}

// TestEveryFaultOfTheStore: with each fault that a store can have, for a few calls or
// for good, at a random call of backup, restore and prune, the command succeeds and
// has done its work, or it fails and says why, and nothing is lost by that.
func TestEveryFaultOfTheStore(t *testing.T) {
	t.Parallel()
	h := newHostile(t)
	h.retries = retry.Options{Budget: 150 * time.Millisecond, FirstWait: 5 * time.Millisecond, MaxWait: 20 * time.Millisecond}
	for _, command := range commands {
		for _, f := range faults {
			if h.count(command, f.rule.Ops) == 0 {
				continue
			}
			t.Run(command+"/"+f.name, func(t *testing.T) {
				h.on(t)
				for range count(10, 1) {
					h.passes(command, f)
					h.stays(command, f, func(early int) {
						rule := f.rule
						rule.Skip = h.skip(command, f) / early
						h.store.Inject(rule)
					})
				}
			})
		}
		t.Run(command+"/full", func(t *testing.T) {
			h.on(t)
			h.stays(command, fault{}, func(early int) { h.store.SetSpace(h.r.Int64N(1<<20) >> (4 * early)) })
		})
		t.Run(command+"/gone", func(t *testing.T) {
			h.on(t)
			h.stays(command, fault{}, func(int) { h.store.Kill(nil) })
		})
	}
	h.on(t)
	h.check() // restic's: after all that
	t.Logf("%d commands failed", h.failed)
}

// skip is how many calls may pass before the fault, so that it comes.
func (h *hostile) skip(command string, f fault) int {
	return h.r.IntN(h.count(command, f.rule.Ops))
}

// struck runs a command in a store that begins to fail, until a fault really met it:
// no two runs call the store equally often. It begins earlier each time.
func (h *hostile) struck(command string, begin func(early int)) error {
	h.t.Helper()
	for early := 1; early <= 8; early++ {
		h.prepare(command)
		begin(early)
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
		err := h.process(ctx, command)
		hangs := ctx.Err()
		cancel()
		n := h.store.Struck()
		h.store.Heal()
		if hangs != nil {
			h.t.Fatalf("%s hangs: %v", command, err)
		}
		if n > 0 {
			return err
		}
		if err != nil {
			h.t.Fatalf("%s fails of nothing: %v", command, err)
		}
	}
	h.t.Fatalf("no fault met %s", command)
	return nil
}

// passes has a fault that a few calls in a row meet.
func (h *hostile) passes(command string, f fault) {
	h.t.Helper()
	err := h.struck(command, func(early int) {
		rule := f.rule
		rule.Skip, rule.Times, rule.Every = h.skip(command, f)/early, 1+h.r.IntN(2), 0
		h.store.Inject(rule)
	})
	switch {
	case err == nil:
		h.right(command)
	case errors.Is(err, backend.ErrPermanent):
		h.mends(command, f, err)
	default: // a retry would have mended it
		h.t.Fatalf("%s fails of what passes: %v", command, err)
	}
}

// stays has a fault that stays.
func (h *hostile) stays(command string, f fault, begin func(early int)) {
	h.t.Helper()
	err := h.struck(command, begin)
	switch {
	case err == nil:
		h.right(command)
	case f.mended:
		h.t.Fatalf("%s fails of what retries get over: %v", command, err)
	default:
		h.mends(command, f, err)
	}
}

// mends makes sure that a failure said why, that it did no harm, and that the
// command succeeds in a store that is well again.
func (h *hostile) mends(command string, f fault, err error) {
	h.t.Helper()
	known := errors.Is(err, faulty.ErrInjected) || errors.Is(err, backend.ErrPermanent) || errors.Is(err, repo.ErrLockLost)
	if line := fmt.Sprint(err); !known || strings.TrimSpace(line) == "" {
		h.t.Errorf("%s does not say why it failed: %v", command, err)
	}
	h.failed++
	h.must("-q", "unlock", "--remove-all") // as its error says
	if f.parts {
		h.mendParts()
	}
	if count(1, 0) > 0 {
		h.check() // restic's too
	}
	if command == "backup" {
		// Whether there is a snapshot of it, only the store knows.
		if err := h.run("check"); err != nil {
			h.t.Fatalf("a failed %s did harm: %v", command, err)
		}
	} else if command == "prune" {
		h.right(command)
	}
	if err := h.run(command); err != nil {
		h.t.Fatalf("%s in a store that is well again: %v", command, err)
	}
	h.right(command)
}

// mendParts does what the error messages say of files that a store left which are not
// whole. A pack of that kind is in no index, and the next prune deletes it. The rest
// is named by check.
func (h *hostile) mendParts() {
	h.t.Helper()
	r := h.try("check")
	for line := range strings.Lines(r.stdout) {
		switch word := strings.Fields(line); {
		case len(word) < 3 || word[0] != "error:":
		case word[1] == "index":
			h.must("-q", "repair", "index")
		case word[1] == "snapshot":
			h.must("-q", "forget", strings.TrimSuffix(word[2], ":"))
		default:
			h.t.Errorf("check names what no part can be: %s", line)
		}
	}
	h.must("-q", "check")
}
