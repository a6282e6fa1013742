// SPDX-License-Identifier: BSD-2-Clause

package devmapper_test

import (
	"errors"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel/devmapper"
)

// sleep is long enough for a write that nothing holds.
func sleep() <-chan time.Time { return time.After(200 * time.Millisecond) }

func waitGone(t *testing.T, name string) {
	t.Helper()
	for range 1000 {
		if _, err := devmapper.Stat(name); errors.Is(err, unix.ENXIO) {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Errorf("%s is still there", name)
}
