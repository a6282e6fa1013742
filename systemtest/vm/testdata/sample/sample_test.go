// SPDX-License-Identifier: BSD-2-Clause

// Package sample has tests that end in every way a test can.
package sample

import (
	"os"
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

func TestExits(*testing.T) { os.Exit(0) }
