// SPDX-License-Identifier: BSD-2-Clause

package backendtest

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/repo/backend/local"
)

// LocalStore is the store in a directory, which need not be there yet: the
// plainest one to put a decorator on.
func LocalStore(dir string) Store {
	return Store{
		Open: func(t testing.TB) backend.Backend {
			t.Helper()
			be, err := local.Open(dir, local.Options{})
			if err != nil {
				t.Fatal(err)
			}
			return be
		},
		Put: func(t testing.TB, path string, data []byte) {
			t.Helper()
			file := filepath.Join(dir, path)
			if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(file, data, 0o600); err != nil {
				t.Fatal(err)
			}
		},
	}
}

// Decorated makes stores in directories, each opened through decorate.
func Decorated(decorate func(backend.Backend) backend.Backend) func(testing.TB) Store {
	return func(t testing.TB) Store {
		s := LocalStore(filepath.Join(t.TempDir(), "a", "b", "repo"))
		return Store{Put: s.Put, Open: func(t testing.TB) backend.Backend { return decorate(s.Open(t)) }}
	}
}
