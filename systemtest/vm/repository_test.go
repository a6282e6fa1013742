// SPDX-License-Identifier: BSD-2-Clause

package vm

import (
	"bytes"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/repo/backend/location"
	"github.com/dsync-backup/dsync-backup/repo/crypto"
)

// putRepository puts a new repository with the password "secret" into the guest, and
// the password into /root/password. Its key is cheap to open: the usual one costs an
// emulated processor several seconds with each command.
func putRepository(t testing.TB, m *Machine, to string) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "repo")
	be, err := location.Open(t.Context(), dir, location.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer be.Close()
	r, err := repo.Init(t.Context(), be, "secret", repo.Options{KDF: crypto.Params{N: 1024, R: 8, P: 1}})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	tar, err := exec.Command("tar", "-C", dir, "-c", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	m.Run("mkdir", "-p", to)
	if r := m.Start(Command{Args: []string{"tar", "-x"}, Dir: to, Stdin: bytes.NewReader(tar)}).Wait(); r.Err != nil {
		t.Fatalf("unpack %s in the guest: %v: %s", to, r.Err, r.Stderr)
	}
	m.Write("/root/password", "secret\n")
}
