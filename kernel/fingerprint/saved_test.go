// SPDX-License-Identifier: BSD-2-Clause

package fingerprint

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/kernel/epochlog"
)

// memory is a small device, in memory: it is hashed whole.
type memory struct{ b []byte }

func newMemory(seed byte) *memory {
	m := &memory{make([]byte, 1<<20)}
	r := rand.NewChaCha8([32]byte{seed})
	r.Read(m.b)
	return m
}

func (m *memory) source() Source { return ReaderAt(bytes.NewReader(m.b)) }
func (m *memory) size() int64    { return int64(len(m.b)) }

func (m *memory) take(t *testing.T) Fingerprint {
	t.Helper()
	f, err := Take(context.Background(), m.source(), m.size(), NewKey())
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// logEpoch adds an entry to a tracker's log, as the epoch log would.
func logEpoch(t *testing.T, stateDir string, u kernel.UUID, n uint64) kernel.Position {
	t.Helper()
	p := kernel.Position{Tracker: u, Epoch: n, Nonce: kernel.NewNonce()}
	dir := folder(stateDir, u)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	e := epochlog.Encode(kernel.Epoch{Position: p, Bitmap: kernel.NewBitmap(256)})
	if err := os.WriteFile(filepath.Join(dir, itoa16(n)), e, 0o600); err != nil {
		t.Fatal(err)
	}
	return p
}

func itoa16(n uint64) string {
	const digits = "0123456789abcdef"
	b := make([]byte, 16)
	for i := range b {
		b[15-i] = digits[n>>(4*i)&15]
	}
	return string(b)
}

func save(t *testing.T, stateDir string, m *memory, id Identity) Saved {
	t.Helper()
	p := logEpoch(t, stateDir, kernel.NewUUID(), 5)
	s := Saved{Tracker: "bpf", Last: p, Fingerprint: m.take(t), Identity: id, Device: "/dev/sdx", BootID: "b", Time: time.Unix(1e9, 0).UTC()}
	if err := Save(stateDir, s); err != nil {
		t.Fatal(err)
	}
	return s
}

func withdraw(t *testing.T, stateDir string, m *memory, id Identity) *Withdrawn {
	t.Helper()
	w, err := Withdraw(context.Background(), stateDir, m.source(), m.size(), id)
	if err != nil {
		t.Fatal(err)
	}
	return w
}

// find withdraws and matches, and puts back what fits, so that it can be found again.
func find(t *testing.T, stateDir string, m *memory, id Identity) (Saved, error) {
	t.Helper()
	w := withdraw(t, stateDir, m, id)
	s, err := w.Match(context.Background(), m.source(), m.size())
	if err != nil && !errors.Is(err, ErrNotSaved) {
		t.Fatal(err)
	}
	if err == nil {
		return s, w.PutBack()
	}
	if e := w.Drop(); e != nil {
		t.Fatal(e)
	}
	return s, err
}

func TestSavedStateIsFoundAndUsedOnce(t *testing.T) {
	dir, a, b := t.TempDir(), newMemory(1), newMemory(2)
	sa, sb := save(t, dir, a, Identity{"serial": "A"}), save(t, dir, b, Identity{})
	got, err := find(t, dir, b, Identity{"serial": "B"})
	if err != nil || got.Last != sb.Last {
		t.Fatalf("%v: %v", got.Last, err)
	}
	// The look for b has left a's state alone, since its serial number differs.
	got, err = find(t, dir, a, Identity{"serial": "A"})
	if err != nil || got.Last != sa.Last || got.Device != "/dev/sdx" {
		t.Fatalf("%v: %v", got, err)
	}
	var used atomic.Int64
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			w, err := Withdraw(context.Background(), dir, a.source(), a.size(), Identity{"serial": "A"})
			if err != nil {
				t.Error(err)
				return
			}
			if _, err := w.Match(context.Background(), a.source(), a.size()); err == nil {
				used.Add(1)
			}
			if err := w.Use(); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if n := used.Load(); n != 1 {
		t.Errorf("used %d times", n)
	}
	if _, err := find(t, dir, a, nil); err == nil || !strings.Contains(err.Error(), "no state of this device") {
		t.Errorf("used twice: %v", err)
	}
	left, _ := filepath.Glob(filepath.Join(folder(dir, sa.Last.Tracker), tempPrefix+"*"))
	if len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// TestWhatWasWithdrawnIsGoneForWhoeverComesNext: whoever dies between Withdraw and
// Use leaves nothing to be found.
func TestWhatWasWithdrawnIsGoneForWhoeverComesNext(t *testing.T) {
	dir, m := t.TempDir(), newMemory(7)
	s := save(t, dir, m, nil)
	w := withdraw(t, dir, m, nil)
	if w.None() {
		t.Fatal("nothing was withdrawn")
	}
	if again := withdraw(t, dir, m, nil); !again.None() {
		t.Error("it is found after it was withdrawn")
	}
	if err := w.PutBack(); err != nil {
		t.Fatal(err)
	}
	if got, err := find(t, dir, m, nil); err != nil || got.Last != s.Last {
		t.Errorf("after it was put back: %v", err)
	}
	// A state that was saved meanwhile is not overwritten.
	w = withdraw(t, dir, m, nil)
	if err := Save(dir, s); err != nil {
		t.Fatal(err)
	}
	if err := w.PutBack(); err == nil {
		t.Error("put back in the place of another")
	}
}

// TestAnotherDevicesStateComesBack: one with the same parts and another identity is
// somebody else's if the device has its own, and gone if it has none.
func TestAnotherDevicesStateComesBack(t *testing.T) {
	dir, m := t.TempDir(), newMemory(8)
	save(t, dir, m, Identity{"serial": "A"})
	sb := save(t, dir, m, Identity{"serial": "B"})
	w := withdraw(t, dir, m, Identity{"serial": "A"})
	if _, err := w.Match(context.Background(), m.source(), m.size()); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(w.Use(), w.PutBack()); err != nil {
		t.Fatal(err)
	}
	if got, err := find(t, dir, m, Identity{"serial": "B"}); err != nil || got.Last != sb.Last {
		t.Errorf("the other's: %v", err)
	}
	if err := withdraw(t, dir, m, Identity{"serial": "C"}).Drop(); err != nil {
		t.Fatal(err)
	}
	if _, err := find(t, dir, m, Identity{"serial": "B"}); err == nil {
		t.Error("an older state was left")
	}
}

func TestSavedStateIsRefused(t *testing.T) {
	for name, c := range map[string]struct {
		do   func(t *testing.T, dir, file string, m *memory, s Saved)
		id   Identity
		want string
	}{
		"written to":            {do: func(_ *testing.T, _, _ string, m *memory, _ Saved) { m.b[777]++ }, want: "was used or changed"},
		"another serial number": {id: Identity{"serial": "other"}, want: "another serial"},
		"damaged": {do: func(t *testing.T, _, file string, _ *memory, _ Saved) {
			b, _ := os.ReadFile(file)
			b[len(b)/2] ^= 1
			os.WriteFile(file, b, 0o600)
		}, want: "damaged"},
		"restored from a copy": {do: func(t *testing.T, _, file string, _ *memory, _ Saved) {
			run(t, "cp", "-a", file, file+".yesterday")
			os.Remove(file)
			os.Rename(file+".yesterday", file)
		}, want: "is a copy"},
		"another tracker's folder": {do: func(t *testing.T, dir, file string, _ *memory, s Saved) {
			p := logEpoch(t, dir, kernel.NewUUID(), 5)
			os.Rename(file, filepath.Join(folder(dir, p.Tracker), fileName))
		}, want: "belongs to"},
		"the log went on": {do: func(t *testing.T, dir, _ string, _ *memory, s Saved) {
			logEpoch(t, dir, s.Last.Tracker, 6)
		}, want: "goes on after"},
		"the log is of another future": {do: func(t *testing.T, dir, _ string, _ *memory, s Saved) {
			logEpoch(t, dir, s.Last.Tracker, 5)
		}, want: "instead of"},
		"the log is lost": {do: func(t *testing.T, dir, file string, _ *memory, s Saved) {
			os.Remove(filepath.Join(filepath.Dir(file), itoa16(5)))
		}, want: "not in the log"},
		"two fit": {do: func(t *testing.T, dir, _ string, m *memory, _ Saved) { save(t, dir, m, nil) }, want: "both"},
		"discarded": {do: func(t *testing.T, dir, _ string, m *memory, _ Saved) {
			if err := Discard(context.Background(), dir, m.source(), m.size(), Identity{"serial": "other"}); err != nil {
				t.Fatal(err)
			}
		}, want: "no state of this device"},
	} {
		t.Run(name, func(t *testing.T) {
			dir, m := t.TempDir(), newMemory(3)
			s := save(t, dir, m, Identity{"serial": "S", "wwid": ""})
			file := filepath.Join(folder(dir, s.Last.Tracker), fileName)
			if _, err := find(t, dir, m, Identity{"wwid": "W"}); err != nil {
				t.Fatal(err)
			}
			if c.do != nil {
				c.do(t, dir, file, m, s)
			}
			if _, err := find(t, dir, m, c.id); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("found: %v, want %q", err, c.want)
			}
			if _, err := find(t, dir, m, c.id); err == nil {
				t.Error("found later")
			}
		})
	}
}

func TestMismatchRemovesTheState(t *testing.T) {
	dir, m := t.TempDir(), newMemory(4)
	save(t, dir, m, nil)
	m.b[9]++
	if _, err := find(t, dir, m, nil); err == nil {
		t.Fatal("found")
	}
	m.b[9]--
	if _, err := find(t, dir, m, nil); err == nil {
		t.Error("a state that once did not fit was used")
	}
}

// TestAnIdentityIsEnoughToRemoveAState: a device that was known by its serial number
// and has other parts now has no older state left when a new history began.
func TestAnIdentityIsEnoughToRemoveAState(t *testing.T) {
	dir, m := t.TempDir(), newMemory(9)
	s := save(t, dir, m, Identity{"serial": "S", "wwid": "W"})
	s.Fingerprint.Parts[0].Kind = "ext4"
	if err := Save(dir, s); err != nil {
		t.Fatal(err)
	}
	if w := withdraw(t, dir, m, Identity{"wwid": "V", "serial": "S"}); !w.None() && len(w.saved) > 0 {
		t.Error("one with another WWID was taken for it")
	}
	w := withdraw(t, dir, m, Identity{"serial": "S"})
	if len(w.saved) != 1 {
		t.Fatal("it was not taken for what it is")
	}
	if _, err := w.Match(context.Background(), m.source(), m.size()); !errors.Is(err, ErrNotSaved) {
		t.Error(err)
	}
}

func TestSaveRefusesADoubt(t *testing.T) {
	dir, m := t.TempDir(), newMemory(5)
	p := logEpoch(t, dir, kernel.NewUUID(), 1)
	f := m.take(t)
	f.Doubt = "it is mounted"
	if err := Save(dir, Saved{Last: p, Fingerprint: f}); !errors.Is(err, ErrNoProof) {
		t.Error(err)
	}
	f.Doubt = ""
	p.Nonce = kernel.NewNonce()
	if err := Save(dir, Saved{Last: p, Fingerprint: f}); err == nil {
		t.Error("saved beyond the log")
	}
	if entries, _ := os.ReadDir(folder(dir, p.Tracker)); len(entries) != 1 {
		t.Errorf("left: %v", entries)
	}
}

func FuzzSaved(f *testing.F) {
	s := Saved{Tracker: "bpf", Last: kernel.Position{Tracker: kernel.NewUUID(), Epoch: 3}, Time: time.Unix(1, 0).UTC(), Identity: Identity{"a": "b"}}
	f.Add(s.Encode())
	_, body, _ := bytes.Cut(s.Encode(), []byte("\n"))
	f.Add(body)
	f.Fuzz(func(t *testing.T, data []byte) {
		if s, err := Decode(data); err == nil {
			again, err := Decode(s.Encode())
			if err != nil || !reflect.DeepEqual(s, again) {
				t.Errorf("%+v\n%+v: %v", s, again, err)
			}
		}
	})
}
