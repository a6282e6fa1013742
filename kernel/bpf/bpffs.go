// SPDX-License-Identifier: BSD-2-Clause

package bpf

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

const (
	bpffs   = "/sys/fs/bpf"
	pinRoot = bpffs + "/dsync"
)

// pinDir is the folder of one tracker. bpffs allows no dots or colons.
func pinDir(d devno) string {
	return filepath.Join(pinRoot, fmt.Sprintf("%d-%d", d.major, d.minor))
}

// mountBPFFS mounts bpffs where it is expected unless it is there already, and
// makes our folder in it.
func mountBPFFS() error {
	var st unix.Statfs_t
	if err := unix.Statfs(bpffs, &st); err != nil {
		return fmt.Errorf("look for bpffs at %s: %w", bpffs, err)
	}
	if st.Type != unix.BPF_FS_MAGIC {
		if err := unix.Mount("bpf", bpffs, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=700"); err != nil {
			return fmt.Errorf("mount bpffs at %s: %w", bpffs, err)
		}
	}
	if err := os.Mkdir(pinRoot, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return fmt.Errorf("make %s: %w", pinRoot, err)
	}
	return nil
}

// lockPins serialises what makes and removes pinned objects, over all
// processes. The lock ends with the process that holds it.
func lockPins(ctx context.Context) (unlock func(), err error) {
	for {
		unlock, err = tryLockPins()
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return unlock, err
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("lock %s: %w", pinRoot, ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func tryLockPins() (unlock func(), err error) {
	f, err := os.Open(pinRoot)
	if err != nil {
		return nil, fmt.Errorf("lock %s: %w", pinRoot, err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("lock %s: %w", pinRoot, err)
	}
	return func() { _ = f.Close() }, nil
}

// removePins unpins everything in a tracker's folder, which detaches its
// programs and frees its maps once no process holds them. The state goes last,
// so that what a crash leaves behind is still known for what it is. The caller
// holds the lock.
func removePins(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read pinned tracker %s: %w", dir, err)
	}
	for _, e := range entries {
		if e.Name() == pinState {
			continue
		}
		if err := os.Remove(filepath.Join(dir, e.Name())); err != nil {
			return fmt.Errorf("remove pinned object: %w", err)
		}
	}
	if err := os.Remove(filepath.Join(dir, pinState)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove pinned object: %w", err)
	}
	if err := os.Remove(dir); err != nil {
		return fmt.Errorf("remove pinned tracker: %w", err)
	}
	return nil
}
