// SPDX-License-Identifier: BSD-2-Clause

package repo

import (
	"bytes"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// harmKey changes a byte of the only key file, in the value of a field.
func harmKey(t *testing.T, dir, field string) (file string) {
	t.Helper()
	file = onlyFile(t, filepath.Join(dir, "keys", "*"))
	damage(t, file, func(b []byte) []byte {
		at := bytes.Index(b, []byte(`"`+field+`":"`)) + len(field) + 4
		// Both are good in a date and in base64.
		if b[at] == '3' {
			b[at] = '4'
		} else {
			b[at] = '3'
		}
		return b
	})
	return file
}

// TestAHarmedKeyOpensWithAWarning: its name is no part of what is sealed, and the data are
// needed. restic refuses it, until the file has the name that its bytes ask for.
func TestAHarmedKeyOpensWithAWarning(t *testing.T) {
	_, dir := newRepo(t, Options{})
	file := harmKey(t, dir, "created")
	for _, keys := range []KeyStore{nil, &memoryKeys{keys: map[string][]byte{}}} {
		for range 2 { // with keys: by the password, then by the kept key
			var log strings.Builder
			_, err := openKept(t, dir, testPassword, Options{Keys: keys, Logger: slog.New(slog.NewTextHandler(&log, nil))})
			if err != nil || strings.Count(log.String(), "\n") != 1 || !strings.Contains(log.String(), "do not match its name") {
				t.Errorf("%v, and it says %q", err, log.String())
			}
		}
	}
	s := stockRestics(t)[1]
	if _, err := s.try(t, dir, "snapshots"); err == nil {
		t.Error("restic takes it")
	}
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(file, filepath.Join(filepath.Dir(file), Hash(data).String())); err != nil {
		t.Fatal(err)
	}
	s.run(t, dir, "snapshots")
	var log strings.Builder
	if _, err := openKept(t, dir, testPassword, Options{Logger: slog.New(slog.NewTextHandler(&log, nil))}); err != nil || log.Len() > 0 {
		t.Errorf("%v, and it says %q", err, log.String())
	}
}

// TestAHarmedKeyIsNotAWrongPasswordOnly: where what is sealed is harmed nothing opens.
func TestAHarmedKeyIsNotAWrongPasswordOnly(t *testing.T) {
	for _, field := range []string{"salt", "data"} {
		_, dir := newRepo(t, Options{})
		harmKey(t, dir, field)
		_, err := Open(t.Context(), openLocal(t, dir), testPassword, Options{})
		if !errors.Is(err, ErrWrongPassword) || !errors.Is(err, ErrDamaged) {
			t.Errorf("%s: %v", field, err)
		}
		mustBeOneLine(t, err, "do not match its name")
	}
}
