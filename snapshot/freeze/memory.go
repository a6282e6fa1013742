// SPDX-License-Identifier: BSD-2-Clause

package freeze

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// LockMemory keeps the process's memory from being paged out, because paging
// it in again may wait for what is frozen or suspended. Pages are locked as
// they are touched, so that what Go has only reserved costs nothing. It does
// not count: the first UnlockMemory ends it.
func LockMemory() error {
	if err := mayLock(); err != nil {
		return fmt.Errorf("lock memory: %w", err)
	}
	if err := unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE | unix.MCL_ONFAULT); err != nil {
		return fmt.Errorf("lock memory: %w", err)
	}
	return nil
}

// UnlockMemory ends LockMemory.
func UnlockMemory() error {
	if err := unix.Munlockall(); err != nil {
		return fmt.Errorf("unlock memory: %w", err)
	}
	return nil
}

// lockProgram is LockMemory for the watchdog, and reads in the parts of its
// program that are not in memory yet: what it has to do, it can do without its
// disk. Other memory that it comes to touch is filled with zeros, not read.
func lockProgram() error {
	if err := LockMemory(); err != nil {
		return err
	}
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		return fmt.Errorf("lock program: %w", err)
	}
	exe, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return fmt.Errorf("lock program: %w", err)
	}
	for line := range strings.Lines(string(maps)) {
		var start, end uintptr
		if !strings.Contains(line, exe) || strings.Contains(line, "---p") {
			continue
		}
		if _, err := fmt.Sscanf(line, "%x-%x", &start, &end); err != nil {
			return fmt.Errorf("lock program: parse %q: %w", line, err)
		}
		if _, _, errno := unix.Syscall(unix.SYS_MLOCK, start, end-start, 0); errno != 0 {
			return fmt.Errorf("lock program: %w", errno)
		}
	}
	return nil
}

// mayLock refuses a limit: with one, a lock that succeeds now makes a later
// allocation fail, which ends a Go program.
func mayLock() error {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var caps [2]unix.CapUserData
	if err := unix.Capget(&hdr, &caps[0]); err != nil {
		return fmt.Errorf("ask for capabilities: %w", err)
	}
	if caps[0].Effective&(1<<unix.CAP_IPC_LOCK) != 0 {
		return nil
	}
	var lim unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &lim); err != nil {
		return fmt.Errorf("ask for the limit: %w", err)
	}
	if lim.Cur != unix.RLIM_INFINITY {
		return errors.New("it is limited: CAP_IPC_LOCK or an unlimited RLIMIT_MEMLOCK is needed")
	}
	return nil
}
