// SPDX-License-Identifier: BSD-2-Clause

package local_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/repo/backend/backendtest"
	"github.com/dsync-backup/dsync-backup/repo/backend/local"
)

// store is a repository that is not there yet, in a directory that is not
// there yet.
func store(t testing.TB) backendtest.Store {
	dir := filepath.Join(t.TempDir(), "a", "b", "repo")
	return backendtest.Store{
		Open: func(t testing.TB) backend.Backend { return open(t, dir) },
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

func open(t testing.TB, dir string) *local.Backend {
	t.Helper()
	be, err := local.Open(dir, local.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return be
}

func TestLocal(t *testing.T) { backendtest.Run(t, store) }
