// SPDX-License-Identifier: BSD-2-Clause

package faulty_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"path/filepath"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/repo/backend/backendtest"
	"github.com/dsync-backup/dsync-backup/repo/backend/faulty"
)

var ctx = context.Background()

func TestFaultyWithoutRulesIsABackend(t *testing.T) {
	backendtest.Run(t, backendtest.Decorated(func(be backend.Backend) backend.Backend { return faulty.New(be) }))
}

func newFaulty(t testing.TB) *faulty.Backend {
	t.Helper()
	be := backendtest.LocalStore(filepath.Join(t.TempDir(), "repo")).Open(t)
	t.Cleanup(func() { be.Close() })
	if err := be.Create(ctx); err != nil {
		t.Fatal(err)
	}
	return faulty.New(be)
}

func save(be backend.Backend, ft backend.FileType, content string) error {
	return be.Save(ctx, backendtest.HandleOf(ft, []byte(content)), []byte(content))
}

func stored(t testing.TB, be *faulty.Backend, ft backend.FileType) int {
	t.Helper()
	files, err := backendtest.List(ctx, be.Unwrap(), ft)
	if err != nil {
		t.Fatal(err)
	}
	return len(files)
}

func TestRulesHitTheCallsTheyName(t *testing.T) {
	be := newFaulty(t)
	mine := errors.New("mine")
	be.Inject(faulty.Rule{
		Ops: faulty.Save, Types: []backend.FileType{backend.PackFile},
		Skip: 2, Times: 4, Every: 2, Where: faulty.Before, Err: mine,
	})
	for i := 1; i <= 8; i++ {
		if err := save(be, backend.KeyFile, string(rune('a'+i))); err != nil {
			t.Errorf("save of another type: %v", err)
		}
		err := save(be, backend.PackFile, string(rune('a'+i)))
		if hit := i == 4 || i == 6; errors.Is(err, mine) != hit || (err == nil) == hit {
			t.Errorf("save %d: %v", i, err)
		}
	}
	if n := stored(t, be, backend.PackFile); n != 6 {
		t.Errorf("%d packs are stored, want 6", n)
	}
	if n := be.Count(faulty.Save); n != 16 {
		t.Errorf("counted %d saves, want 16", n)
	}
	if n := be.Struck(); n != 2 {
		t.Errorf("%d calls were struck, want 2", n)
	}
	if n := be.Count(faulty.Any &^ faulty.Save); n != 0 {
		t.Errorf("counted %d other calls", n)
	}
}

func TestBeforeDoesNothingAndAfterDoesIt(t *testing.T) {
	be := newFaulty(t)
	be.Inject(faulty.Rule{Ops: faulty.Save, Times: 1, Where: faulty.Before})
	be.Inject(faulty.Rule{Ops: faulty.Save, Skip: 1, Times: 1, Where: faulty.After})
	for i, want := range []int{0, 1} {
		if err := save(be, backend.PackFile, "x"); !errors.Is(err, faulty.ErrInjected) {
			t.Errorf("save %d: %v", i, err)
		}
		if n := stored(t, be, backend.PackFile); n != want {
			t.Errorf("after save %d there are %d files, want %d", i, n, want)
		}
	}
	if err := save(be, backend.PackFile, "x"); err != nil {
		t.Errorf("save without a fault: %v", err)
	}
}

func TestTruncateBreaksOffTheReader(t *testing.T) {
	be := newFaulty(t)
	data := bytes.Repeat([]byte("abc"), 1000)
	h := backendtest.HandleOf(backend.PackFile, data)
	if err := be.Save(ctx, h, data); err != nil {
		t.Fatal(err)
	}
	be.Inject(faulty.Rule{Ops: faulty.Load, Where: faulty.Truncate, Keep: 1234})
	err := be.Load(ctx, h, 0, 0, func(r io.Reader) error {
		got, err := io.ReadAll(r)
		if !bytes.Equal(got, data[:1234]) {
			t.Errorf("read %d bytes, want the first 1234", len(got))
		}
		return err
	})
	if !errors.Is(err, faulty.ErrInjected) {
		t.Errorf("load: %v", err)
	}
}

func TestKilledStoreFailsEverythingUntilItIsHealed(t *testing.T) {
	be := newFaulty(t)
	gone := errors.New("gone")
	be.Kill(gone)
	_, serr := be.Stat(ctx, backend.Handle{Type: backend.ConfigFile})
	_, lerr := backendtest.List(ctx, be, backend.KeyFile)
	for _, err := range []error{save(be, backend.PackFile, "x"), serr, lerr, be.Create(ctx)} {
		if !errors.Is(err, gone) {
			t.Errorf("got %v", err)
		}
	}
	be.Heal()
	if err := save(be, backend.PackFile, "x"); err != nil {
		t.Errorf("save after healing: %v", err)
	}
}

func TestSpaceRunsOut(t *testing.T) {
	be := newFaulty(t)
	be.SetSpace(10)
	if err := save(be, backend.PackFile, "1234567"); err != nil {
		t.Errorf("first save: %v", err)
	}
	err := save(be, backend.PackFile, "89ab")
	if !errors.Is(err, syscall.ENOSPC) || !errors.Is(err, backend.ErrPermanent) {
		t.Errorf("save into a full store: %v", err)
	}
	if err := save(be, backend.PackFile, "89a"); err != nil {
		t.Errorf("save that fits: %v", err)
	}
	if n := stored(t, be, backend.PackFile); n != 2 {
		t.Errorf("%d files are stored, want 2", n)
	}
}

func TestDelayEndsWithTheContext(t *testing.T) {
	be := newFaulty(t)
	be.Inject(faulty.Rule{Ops: faulty.Stat, Delay: time.Hour})
	cctx, cancel := context.WithCancel(ctx)
	done := make(chan error)
	go func() {
		_, err := be.Stat(cctx, backend.Handle{Type: backend.ConfigFile})
		done <- err
	}()
	for be.Count(faulty.Stat) == 0 {
		time.Sleep(time.Millisecond)
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

func TestABadPlaceIsInTheWayOfThoseWhoComeToItOnly(t *testing.T) {
	be := newFaulty(t)
	data := bytes.Repeat([]byte("abc"), 1000)
	h := backendtest.HandleOf(backend.PackFile, data)
	if err := be.Save(ctx, h, data); err != nil {
		t.Fatal(err)
	}
	bad := backend.Broken(syscall.EIO)
	be.Break(h, 1234, bad)
	for _, c := range []struct {
		length int
		offset int64
		want   error
	}{{0, 0, bad}, {1234, 0, nil}, {1235, 0, bad}, {1, 1234, bad}, {0, 1235, nil}} {
		if _, err := backendtest.Load(ctx, be, h, c.length, c.offset); !errors.Is(err, c.want) {
			t.Errorf("%d bytes from %d: %v", c.length, c.offset, err)
		}
	}
	be.Heal()
	if _, err := backendtest.Load(ctx, be, h, 0, 0); err != nil {
		t.Errorf("load after healing: %v", err)
	}
}

// A store that is not atomic leaves a part of a file under its name; saved again
// the file is whole.
func TestTruncateLeavesAPartOfWhatIsSaved(t *testing.T) {
	for keep, want := range map[int64]int64{0: 0, 1234: 1234, 1 << 20: 3000} {
		be := newFaulty(t)
		data := bytes.Repeat([]byte("abc"), 1000)
		h := backendtest.HandleOf(backend.PackFile, data)
		be.Inject(faulty.Rule{Ops: faulty.Save, Times: 1, Where: faulty.Truncate, Keep: keep})
		if err := be.Save(ctx, h, data); !errors.Is(err, faulty.ErrInjected) {
			t.Errorf("save: %v", err)
		}
		if fi, err := be.Stat(ctx, h); err != nil || fi.Size != want {
			t.Errorf("it left %d bytes, want %d: %v", fi.Size, want, err)
		}
		if err := be.Save(ctx, h, data); err != nil {
			t.Errorf("save again: %v", err)
		}
		if got, err := backendtest.Load(ctx, be, h, 0, 0); err != nil || !bytes.Equal(got, data) {
			t.Errorf("then it holds %d bytes: %v", len(got), err)
		}
	}
}

// The clock is the bubble's: it says how long all waited, and nobody does.
func TestRateIsHowFastBytesPass(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		be := newFaulty(t)
		data := bytes.Repeat([]byte("0123456789"), 10_000)
		h := backendtest.HandleOf(backend.PackFile, data)
		be.Inject(faulty.Rule{Ops: faulty.Save | faulty.Load, Rate: 1000})
		began := time.Now()
		if err := be.Save(ctx, h, data); err != nil {
			t.Error(err)
		}
		if d := time.Since(began); d != 100*time.Second {
			t.Errorf("saving 100,000 bytes at 1,000 a second took %v", d)
		}
		began = time.Now()
		if got, err := backendtest.Load(ctx, be, h, 0, 0); err != nil || !bytes.Equal(got, data) {
			t.Errorf("loaded %d bytes: %v", len(got), err)
		}
		if d := time.Since(began); d != 100*time.Second {
			t.Errorf("loading 100,000 bytes at 1,000 a second took %v", d)
		}
		short, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		if _, err := backendtest.Load(short, be, h, 0, 0); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a slow load outlives its context: %v", err)
		}
	})
}
