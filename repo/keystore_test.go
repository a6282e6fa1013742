// SPDX-License-Identifier: BSD-2-Clause

package repo

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// memoryKeys is a KeyStore; broken makes all of it fail.
type memoryKeys struct {
	keys   map[string][]byte
	broken error
}

func (m *memoryKeys) Get(name string) ([]byte, error) { return m.keys[name], m.broken }

func (m *memoryKeys) Put(name string, key []byte) error {
	if m.broken == nil {
		m.keys[name] = key
	}
	return m.broken
}

func (m *memoryKeys) Drop(name string) error { delete(m.keys, name); return m.broken }

// openKept opens with the password and says whether that was asked for.
func openKept(t *testing.T, dir, password string, o Options) (asked bool, err error) {
	t.Helper()
	r, err := OpenWith(t.Context(), openLocal(t, dir), func(context.Context) (string, error) {
		asked = true
		return password, nil
	}, o)
	if err == nil {
		defer r.Close()
		if err := r.LoadIndex(t.Context()); err != nil {
			t.Error(err)
		}
	}
	return asked, err
}

func TestAKeptKeyOpensWithoutThePassword(t *testing.T) {
	_, dir := newRepo(t, Options{})
	m := &memoryKeys{keys: map[string][]byte{}}
	o := Options{Keys: m}
	if _, err := openKept(t, dir, "wrong", o); !errors.Is(err, ErrWrongPassword) || len(m.keys) != 0 {
		t.Errorf("a wrong password: %v, kept %d", err, len(m.keys))
	}
	for i, want := range []bool{true, false, false} {
		if asked, err := openKept(t, dir, testPassword, o); err != nil || asked != want {
			t.Errorf("open %d: asked %v, %v", i, asked, err)
		}
	}
	// Without it, nothing is kept and nothing is used.
	if asked, err := openKept(t, dir, testPassword, Options{}); err != nil || !asked {
		t.Errorf("asked %v, %v", asked, err)
	}
}

// A password that was taken away opens nothing, kept or not.
func TestAKeptKeyEndsWithItsKeyFile(t *testing.T) {
	_, dir := newRepo(t, Options{})
	o := Options{Keys: &memoryKeys{keys: map[string][]byte{}}}
	if _, err := openKept(t, dir, testPassword, o); err != nil {
		t.Fatal(err)
	}
	pw := filepath.Join(t.TempDir(), "pw")
	if err := os.WriteFile(pw, []byte("second"), 0o600); err != nil {
		t.Fatal(err)
	}
	stockRestics(t)[1].run(t, dir, "key", "passwd", "--new-password-file", pw)
	if asked, err := openKept(t, dir, testPassword, o); !errors.Is(err, ErrWrongPassword) || !asked {
		t.Errorf("asked %v, %v", asked, err)
	}
	if asked, err := openKept(t, dir, "second", o); err != nil || !asked {
		t.Errorf("asked %v, %v", asked, err)
	}
}

func TestABadKeptKeyIsDroppedAndABrokenStoreIsDoneWithout(t *testing.T) {
	_, dir := newRepo(t, Options{})
	m := &memoryKeys{keys: map[string][]byte{}}
	if _, err := openKept(t, dir, testPassword, Options{Keys: m}); err != nil {
		t.Fatal(err)
	}
	var name string
	var good []byte
	for name, good = range m.keys {
	}
	for what, bad := range map[string][]byte{"no JSON": []byte("x"), "another key": bytes.Replace(good, []byte(`"k":"`), []byte(`"k":"AAAA`), 1)[:len(good)], "empty": {}} {
		m.keys[name] = bad
		if asked, err := openKept(t, dir, testPassword, Options{Keys: m}); err != nil || !asked {
			t.Errorf("%s: asked %v, %v", what, asked, err)
		}
		if !bytes.Equal(m.keys[name], good) {
			t.Errorf("%s: %q stays", what, m.keys[name])
		}
	}
	m.broken = errors.New("no keyring here")
	var log strings.Builder
	if asked, err := openKept(t, dir, testPassword, Options{Keys: m, Logger: slog.New(slog.NewTextHandler(&log, nil))}); err != nil || !asked {
		t.Errorf("asked %v, %v", asked, err)
	}
	if !strings.Contains(log.String(), "no keyring here") {
		t.Errorf("nothing is said: %q", log.String())
	}
}
