// SPDX-License-Identifier: BSD-2-Clause

package vm

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

func TestMain(m *testing.M) {
	if err := Check(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// Each kernel of the table boots, and is the one that it should be.
func TestBoot(t *testing.T) {
	Each(t, func(t *testing.T, k Kernel) {
		m := Start(t, k, Config{})
		if got := m.Run("uname", "-r"); got != k.Release {
			t.Errorf("the guest runs %s, not %s", got, k.Release)
		}
	})
}

// A boot in which QEMU itself crashes is tried again, and fails nothing.
func TestBootOfACrashedEmulator(t *testing.T) {
	k, err := Get(table[0])
	if err != nil {
		t.Fatal(err)
	}
	qemu, err := lookTool("qemu-system-x86_64")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	script := fmt.Sprintf("#!/bin/sh\nif mkdir %s/crashed 2>/dev/null; then kill -SEGV $$; fi\nexec %s \"$@\"\n", dir, qemu)
	if err := os.WriteFile(filepath.Join(dir, "qemu-system-x86_64"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	m := Start(t, k, Config{})
	if got := m.Run("uname", "-r"); got != k.Release {
		t.Errorf("the guest runs %s, not %s", got, k.Release)
	}
	if _, err := os.Stat(filepath.Join(dir, "crashed")); err != nil {
		t.Errorf("nothing crashed: %v", err)
	}
}
