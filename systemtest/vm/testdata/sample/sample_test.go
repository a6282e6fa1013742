// SPDX-License-Identifier: BSD-2-Clause

// Package sample has tests that end in every way a test can.
package sample

import (
	"os"
	"strings"
	"testing"
)

func TestPasses(t *testing.T) {
	if b, err := os.ReadFile("testdata/greeting"); err != nil || string(b) != "hello\n" {
		t.Fatal(string(b), err)
	}
	t.Run("Within", func(*testing.T) {})
}

func TestSkips(t *testing.T) {
	t.Run("Within", func(t *testing.T) { t.Skip("not today") })
}

func TestFails(t *testing.T) {
	t.Run("Within", func(t *testing.T) { t.Error("as it should") })
}

func TestPanics(*testing.T) { panic("as it should") }

// TestDiesOnce ends the kernel with what it is to log, unless the disk says that it did before.
func TestDiesOnce(t *testing.T) {
	disk, err := os.OpenFile(os.Getenv("SAMPLE_DISK"), os.O_RDWR|os.O_SYNC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer disk.Close()
	var sector [512]byte
	if _, err := disk.ReadAt(sector[:], 0); err != nil || sector[0] == 1 {
		t.Log("died before: ", sector[0] == 1, err)
		return
	}
	sector[0] = 1
	if _, err := disk.WriteAt(sector[:], 0); err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.Split(os.Getenv("SAMPLE_LOG"), "\n") {
		if err := os.WriteFile("/dev/kmsg", []byte(line), 0); err != nil {
			t.Fatal(err)
		}
	}
	t.Fatal(os.WriteFile("/proc/sysrq-trigger", []byte("c"), 0))
}

func TestExits(*testing.T) { os.Exit(0) }
