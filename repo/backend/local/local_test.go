// SPDX-License-Identifier: BSD-2-Clause

package local_test

import (
	"testing"

	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/repo/backend/backendtest"
	"github.com/dsync-backup/dsync-backup/repo/backend/local"
)

func open(t testing.TB, dir string) *local.Backend {
	t.Helper()
	be, err := local.Open(dir, local.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return be
}

func TestLocal(t *testing.T) {
	backendtest.Run(t, backendtest.Decorated(func(be backend.Backend) backend.Backend { return be }))
}

func BenchmarkLocal(b *testing.B) {
	backendtest.Benchmark(b, backendtest.LocalStore(b.TempDir()))
}
