// SPDX-License-Identifier: BSD-2-Clause

package systemtest

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// With --keyring the second command needs no password, and neither a wrong one
// is noticed; without it, nothing of that is so.
func TestKeyringOpensWithoutThePassword(t *testing.T) {
	e := localEnv(t)
	names, err := filepath.Glob(filepath.Join(e.repo, "keys", "*"))
	if err != nil || len(names) != 1 {
		t.Fatalf("%v, %v", names, err)
	}
	key := "dsync-backup:" + filepath.Base(names[0])
	t.Cleanup(func() { _ = exec.Command("keyctl", "purge", "user", key).Run() }) // else it expires
	img := image(t, newContent(random(t), true), 1<<20)
	e.fails(1, "--keyring", "snapshots", "--keyring", "soon")
	e.must("backup", img, "--keyring", "5m")
	var without []string
	for _, v := range e.vars {
		if !strings.HasPrefix(v, "RESTIC_PASSWORD=") {
			without = append(without, v)
		}
	}
	e.vars = without
	e.must("backup", img, "--keyring", "5m")
	e.must("check", "--keyring", "5m")
	e.fails(12, "password", "snapshots")
	all, err := os.ReadFile("/proc/keys")
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(string(all), key); n != 1 {
		t.Errorf("%d keys in the kernel", n)
	}
}
