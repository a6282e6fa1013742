// SPDX-License-Identifier: BSD-2-Clause

package vm

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"
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

// A boot in which QEMU itself crashes, or whose kernel stands still before it runs a program, is
// tried again, and fails nothing.
func TestBootOfABrokenEmulator(t *testing.T) {
	k, err := Get(table[0])
	if err != nil {
		t.Fatal(err)
	}
	qemu, err := lookTool("qemu-system-x86_64")
	if err != nil {
		t.Fatal(err)
	}
	path, usual := os.Getenv("PATH"), bootTime
	t.Cleanup(func() { bootTime = usual })
	for name, fault := range map[string]string{
		"crash": `kill -SEGV $$`,
		"hang":  `( sleep 0.5; kill -STOP $$ ) &`,
	} {
		t.Run(name, func(t *testing.T) {
			bootTime = usual
			if name == "hang" {
				bootTime = 45 * time.Second
			}
			dir := t.TempDir()
			script := fmt.Sprintf("#!/bin/sh\nif mkdir %s/broke 2>/dev/null; then %s\nfi\nexec %s \"$@\"\n", dir, fault, qemu)
			if err := os.WriteFile(filepath.Join(dir, "qemu-system-x86_64"), []byte(script), 0o700); err != nil {
				t.Fatal(err)
			}
			t.Setenv("PATH", dir+":"+path)
			m := Start(t, k, Config{})
			if got := m.Run("uname", "-r"); got != k.Release {
				t.Errorf("the guest runs %s, not %s", got, k.Release)
			}
			if _, err := os.Stat(filepath.Join(dir, "broke")); err != nil {
				t.Errorf("nothing broke: %v", err)
			}
		})
	}
}
