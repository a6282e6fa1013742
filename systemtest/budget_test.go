// SPDX-License-Identifier: BSD-2-Clause

package systemtest

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/repo/backend/backendtest"
	"github.com/dsync-backup/dsync-backup/repo/backend/faulty"
	"github.com/dsync-backup/dsync-backup/repo/backend/retry"
)

// TestCommandsEndWithinTheBudget: when the store dies for good in the middle of a
// command, or does one thing no more, all of the command ends within the budget of one
// call, and a minute for its lock, however much there was still to do. The clock is that
// of a bubble: it says how long all waited, and nobody does.
func TestCommandsEndWithinTheBudget(t *testing.T) {
	h := newHostile(t)
	h.retries = retry.Options{Budget: 5 * time.Minute}
	for _, command := range commands {
		for quarter := range 4 {
			t.Run(fmt.Sprintf("%s/dead%d", command, quarter), func(t *testing.T) {
				h.on(t)
				h.endsWithin(command, faulty.Rule{Ops: faulty.Any, Skip: quarter * h.count(command, faulty.Any) / 4}, 1)
			})
		}
	}
	packs := []backend.FileType{backend.PackFile}
	for _, c := range []struct {
		command string
		ops     faulty.Op
	}{
		{"backup", faulty.Load}, {"backup", faulty.Save}, {"restore", faulty.Load}, {"prune", faulty.Load}, {"prune", faulty.Save},
	} {
		t.Run(fmt.Sprintf("%s/operation%d", c.command, c.ops), func(t *testing.T) {
			h.on(t)
			h.endsWithin(c.command, faulty.Rule{Ops: c.ops, Types: packs}, 1)
		})
	}
	t.Run("prune/manyRemovals", func(t *testing.T) {
		h.on(t)
		for range 40 { // packs in no index
			b := make([]byte, 64)
			h.c.fill(b)
			if err := h.store.Save(t.Context(), backendtest.HandleOf(backend.PackFile, b), b); err != nil {
				t.Fatal(err)
			}
		}
		// What is in no index is deleted first, and what is packed anew last.
		h.endsWithin("prune", faulty.Rule{Ops: faulty.Remove, Types: packs}, 2)
	})
}

// endsWithin makes sure that a command ends after some budgets when it meets a rule.
func (h *hostile) endsWithin(command string, rule faulty.Rule, budgets time.Duration) {
	h.t.Helper()
	h.prepare(command)
	defer func() {
		h.store.Heal()
		h.must("-q", "unlock", "--remove-all")
	}()
	const ofTheLock = time.Minute
	rule.Where = faulty.Before
	h.store.Inject(rule)
	took, err := h.timed(command)
	h.t.Logf("%v, then: %v", took, err)
	switch {
	case !errors.Is(err, faulty.ErrInjected):
		h.t.Errorf("it ends with %v", err)
	case took > budgets*h.retries.Budget+ofTheLock+time.Second:
		h.t.Errorf("it goes on for %v without a store", took)
	case took < h.retries.Budget/2:
		h.t.Errorf("it gives up after %v", took)
	}
}
