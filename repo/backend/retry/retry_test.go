// SPDX-License-Identifier: BSD-2-Clause

package retry_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/repo/backend/backendtest"
	"github.com/dsync-backup/dsync-backup/repo/backend/faulty"
	"github.com/dsync-backup/dsync-backup/repo/backend/local"
	"github.com/dsync-backup/dsync-backup/repo/backend/retry"
)

// quick waits so little that a test does not notice.
var quick = retry.Options{FirstWait: time.Microsecond, MaxWait: time.Millisecond}

// stack is retry on faults on a directory.
func stack(t testing.TB, o retry.Options) (*retry.Backend, *faulty.Backend) {
	t.Helper()
	be, err := local.Open(filepath.Join(t.TempDir(), "repo"), local.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { be.Close() })
	if err := be.Create(context.Background()); err != nil {
		t.Fatal(err)
	}
	f := faulty.New(be)
	return retry.New(f, o), f
}

func conformance(t *testing.T, rules ...faulty.Rule) {
	backendtest.Run(t, backendtest.Decorated(func(be backend.Backend) backend.Backend {
		f := faulty.New(be)
		for _, r := range rules {
			f.Inject(r)
		}
		return retry.New(f, quick)
	}))
}

func TestRetryIsABackend(t *testing.T) { conformance(t) }

// A Remove that failed before it was done cannot be told from one whose answer
// got lost, so it is not failed here: the suite wants to see ErrNotExist.
func TestNobodyNoticesFaultsThatPass(t *testing.T) {
	conformance(t,
		faulty.Rule{Ops: faulty.Any &^ faulty.Remove, Every: 3, Where: faulty.Before},
		faulty.Rule{Ops: faulty.Any, Every: 4, Where: faulty.After})
}

// eachCall has a call of each operation, about one file.
func eachCall(ctx context.Context, h backend.Handle, data []byte) map[faulty.Op]func(backend.Backend) error {
	return map[faulty.Op]func(backend.Backend) error{
		faulty.Create: func(be backend.Backend) error { return be.Create(ctx) },
		faulty.Save:   func(be backend.Backend) error { return be.Save(ctx, h, data) },
		faulty.Load:   func(be backend.Backend) error { _, err := backendtest.Load(ctx, be, h, 0, 0); return err },
		faulty.Stat:   func(be backend.Backend) error { _, err := be.Stat(ctx, h); return err },
		faulty.List:   func(be backend.Backend) error { _, err := backendtest.List(ctx, be, h.Type); return err },
		faulty.Remove: func(be backend.Backend) error { return be.Remove(ctx, h) },
	}
}

func TestEachRetryIsLoggedOnceAndEndsInSuccess(t *testing.T) {
	data := []byte("data")
	h := backendtest.HandleOf(backend.PackFile, data)
	ctx := context.Background()
	for op, call := range eachCall(ctx, h, data) {
		var log bytes.Buffer
		o := quick
		o.Logger = slog.New(slog.NewTextHandler(&log, nil))
		be, f := stack(t, o)
		if err := f.Save(ctx, h, data); err != nil {
			t.Fatal(err)
		}
		before := f.Count(op)
		f.Inject(faulty.Rule{Ops: op, Times: 2, Where: faulty.Before})
		if err := call(be); err != nil {
			t.Errorf("operation %d: %v", op, err)
		}
		if n := f.Count(op) - before; n != 3 {
			t.Errorf("operation %d was tried %d times, want 3", op, n)
		}
		if n := strings.Count(log.String(), "level=WARN"); n != 2 {
			t.Errorf("operation %d logged %d warnings, want 2:\n%s", op, n, &log)
		}
	}
}

func TestFinalErrorsAreNotRetried(t *testing.T) {
	for _, final := range []error{
		backend.Permanent(errors.New("no")), faulty.ErrNoSpace, backend.ErrNotExist,
		backend.NoStore(backend.PackFile, "gone"), fmt.Errorf("save: %w", backend.ErrExist),
	} {
		be, f := stack(t, quick)
		f.Inject(faulty.Rule{Ops: faulty.Any, Where: faulty.Before, Err: final})
		_, err := be.Stat(context.Background(), backendtest.HandleOf(backend.PackFile, nil))
		if !errors.Is(err, final) || f.Count(faulty.Stat) != 1 {
			t.Errorf("final error %q: tried %d times, got %v", final, f.Count(faulty.Stat), err)
		}
	}
}

func TestBudgetEndsTheRetries(t *testing.T) {
	for _, c := range []struct {
		budget time.Duration
		tries  int
	}{{-1, 1}, {1, 2}} {
		o := quick
		o.Budget = c.budget
		be, f := stack(t, o)
		f.Kill(nil)
		_, err := be.Stat(context.Background(), backendtest.HandleOf(backend.PackFile, nil))
		if !errors.Is(err, faulty.ErrInjected) || f.Count(faulty.Stat) != c.tries {
			t.Errorf("budget %d: tried %d times, want %d; error %v", c.budget, f.Count(faulty.Stat), c.tries, err)
		}
		if c.tries > 1 && !strings.Contains(err.Error(), "tried 2 times") {
			t.Errorf("error %q does not say how often it was tried", err)
		}
	}
}

// TestCallsEndWithinTheBudget: for as long as a store fails, a call is tried again
// until the next wait would go beyond the budget, however long the tries themselves
// take; then it fails, and says for how long it was tried. The clock is the bubble's.
func TestCallsEndWithinTheBudget(t *testing.T) {
	data := []byte("data")
	h := backendtest.HandleOf(backend.PackFile, data)
	_, store := stack(t, quick)
	below := store.Unwrap()
	for _, c := range []struct {
		budget, first, most time.Duration // as in Options, 0: its default
		each                time.Duration // what a try takes
		least, tries        int
	}{
		// Waits of half a second, doubled up to a minute, each by a half more or less.
		{each: 0, least: 16, tries: 45},
		{each: 10 * time.Second, least: 14, tries: 30},
		{budget: time.Minute, least: 7, tries: 12},
		{budget: time.Minute, first: time.Second, most: time.Second, least: 40, tries: 120},
		{budget: time.Second, first: time.Minute, most: time.Minute, least: 2, tries: 2},
		{budget: time.Second, each: time.Minute, least: 2, tries: 2}, // one more all the same
		{budget: -1, each: time.Minute, least: 1, tries: 1},
	} {
		for op, call := range eachCall(context.Background(), h, data) {
			synctest.Test(t, func(t *testing.T) {
				f := faulty.New(below)
				be := retry.New(f, retry.Options{Budget: c.budget, FirstWait: c.first, MaxWait: c.most})
				f.Inject(faulty.Rule{Ops: op, Delay: c.each, Where: faulty.Before})
				began := time.Now()
				err := call(be)
				took, tries := time.Since(began), f.Count(op)
				if !errors.Is(err, faulty.ErrInjected) || tries < c.least || tries > c.tries {
					t.Errorf("%+v: operation %d was tried %d times: %v", c, op, tries, err)
				}
				budget := c.budget
				if budget == 0 {
					budget = retry.DefaultBudget
				}
				// The last try begins within the budget, or is the second one.
				most := max(budget, c.each+3*c.first/2, c.each+750*time.Millisecond) + c.each
				if budget < 0 {
					most = c.each
				}
				if took > most {
					t.Errorf("%+v: operation %d took %v, more than %v", c, op, took, most)
				}
				if said := fmt.Sprintf("(tried %d times in %s)", tries, took.Round(time.Second)); tries > 1 && !strings.HasSuffix(err.Error(), said) {
					t.Errorf("%+v: operation %d: %q does not end in %q", c, op, err, said)
				}
			})
		}
	}
}

func TestCancelEndsTheWait(t *testing.T) {
	be, f := stack(t, retry.Options{FirstWait: time.Hour, MaxWait: time.Hour, Budget: 100 * time.Hour})
	f.Kill(nil)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- be.Create(ctx) }()
	for f.Count(faulty.Create) == 0 {
		time.Sleep(time.Millisecond)
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) || !errors.Is(err, faulty.ErrInjected) {
		t.Errorf("error %v does not say that it was cancelled and why it waited", err)
	}
}

func TestBrokenLoadRunsFnAgain(t *testing.T) {
	be, f := stack(t, quick)
	data := bytes.Repeat([]byte("0123456789"), 1000)
	h := backendtest.HandleOf(backend.PackFile, data)
	if err := be.Save(context.Background(), h, data); err != nil {
		t.Fatal(err)
	}
	f.Inject(faulty.Rule{Ops: faulty.Load, Times: 2, Where: faulty.Truncate, Keep: 4321})
	calls, got := 0, []byte(nil)
	err := be.Load(context.Background(), h, 0, 0, func(r io.Reader) (err error) {
		calls++
		if got, err = io.ReadAll(r); err != nil {
			return errors.New("fn says it in its own words")
		}
		return nil
	})
	if err != nil || calls != 3 || !bytes.Equal(got, data) {
		t.Errorf("%d calls, %d bytes, error %v", calls, len(got), err)
	}
}

func TestErrorOfFnIsNotRetried(t *testing.T) {
	be, f := stack(t, quick)
	h := backendtest.HandleOf(backend.PackFile, []byte("x"))
	if err := be.Save(context.Background(), h, []byte("x")); err != nil {
		t.Fatal(err)
	}
	mine := errors.New("mine")
	err := be.Load(context.Background(), h, 0, 0, func(io.Reader) error { return mine })
	if !errors.Is(err, mine) || f.Count(faulty.Load) != 1 {
		t.Errorf("load was tried %d times, error %v", f.Count(faulty.Load), err)
	}
	err = be.List(context.Background(), h.Type, func(backend.FileInfo) error { return mine })
	if !errors.Is(err, mine) || f.Count(faulty.List) != 1 {
		t.Errorf("list was tried %d times, error %v", f.Count(faulty.List), err)
	}
}

func TestBrokenListNamesEachFileOnce(t *testing.T) {
	be, f := stack(t, quick)
	for i := range 20 {
		data := []byte{byte(i)}
		if err := be.Save(context.Background(), backendtest.HandleOf(backend.KeyFile, data), data); err != nil {
			t.Fatal(err)
		}
	}
	f.Inject(faulty.Rule{Ops: faulty.List, Times: 1, Where: faulty.Truncate, Keep: 7})
	f.Inject(faulty.Rule{Ops: faulty.List, Skip: 1, Times: 1, Where: faulty.Truncate, Keep: 20})
	files, err := backendtest.List(context.Background(), be, backend.KeyFile)
	if err != nil || len(files) != 20 || f.Count(faulty.List) != 3 {
		t.Errorf("%d files in %d tries, error %v", len(files), f.Count(faulty.List), err)
	}
}

func TestLostAnswers(t *testing.T) {
	ctx, config := context.Background(), backend.Handle{Type: backend.ConfigFile}
	t.Run("OfOurConfig", func(t *testing.T) {
		be, f := stack(t, quick)
		f.Inject(faulty.Rule{Ops: faulty.Save, Times: 1, Where: faulty.After})
		if err := be.Save(ctx, config, []byte("ours")); err != nil {
			t.Error(err)
		}
	})
	t.Run("OfAConfigThatLostTheRace", func(t *testing.T) {
		be, f := stack(t, quick)
		if err := f.Save(ctx, config, []byte("theirs")); err != nil {
			t.Fatal(err)
		}
		f.Inject(faulty.Rule{Ops: faulty.Save, Times: 1, Where: faulty.Before})
		if err := be.Save(ctx, config, []byte("ours")); !errors.Is(err, backend.ErrExist) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("OfARemoval", func(t *testing.T) {
		be, f := stack(t, quick)
		h := backendtest.HandleOf(backend.LockFile, nil)
		if err := be.Save(ctx, h, nil); err != nil {
			t.Fatal(err)
		}
		f.Inject(faulty.Rule{Ops: faulty.Remove, Times: 1, Where: faulty.After})
		if err := be.Remove(ctx, h); err != nil {
			t.Error(err)
		}
		if err := be.Remove(ctx, h); !errors.Is(err, backend.ErrNotExist) {
			t.Errorf("removal of a missing file: %v", err)
		}
	})
}
