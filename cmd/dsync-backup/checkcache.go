// SPDX-License-Identifier: BSD-2-Clause

package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// checkCaches begins the names of the folders; a repository's own is its ID.
const checkCaches = "check-"

// checkCache makes a cache below base for one check, and returns what removes it. It is
// locked for as long as the process lives; those that no living process has locked are
// removed, since a process that is killed cannot do that.
func checkCache(base string) (dir string, remove func() error, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("make a cache for the check: %w (or use --no-cache)", err)
		}
	}()
	if err := os.MkdirAll(base, 0o700); err != nil {
		return "", nil, err
	}
	removeDeadCaches(base)
	for {
		if dir, err = os.MkdirTemp(base, checkCaches+"*"); err != nil {
			return "", nil, err
		}
		lock, err := os.Open(dir)
		if errors.Is(err, os.ErrNotExist) {
			continue // another check took it for a dead one's
		}
		if err != nil {
			return "", nil, err
		}
		// Whoever has it now is about to remove it. Where folders cannot be locked nobody
		// removes any.
		for unix.Flock(int(lock.Fd()), unix.LOCK_EX) == unix.EINTR {
		}
		if _, err := os.Stat(dir); err == nil {
			return dir, func() error { return errors.Join(os.RemoveAll(dir), lock.Close()) }, nil
		}
		_ = lock.Close()
	}
}

// removeDeadCaches removes what checks that were killed have left. What it cannot
// remove, the next one tries.
func removeDeadCaches(base string) {
	entries, _ := os.ReadDir(base)
	for _, e := range entries {
		dir := filepath.Join(base, e.Name())
		if !strings.HasPrefix(e.Name(), checkCaches) {
			continue
		}
		lock, err := os.OpenFile(dir, unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
		if err != nil {
			continue
		}
		if unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			_ = os.RemoveAll(dir)
		}
		_ = lock.Close()
	}
}
