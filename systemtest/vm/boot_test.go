// SPDX-License-Identifier: BSD-2-Clause

package vm

import (
	"fmt"
	"os"
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
