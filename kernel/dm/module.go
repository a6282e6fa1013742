// SPDX-License-Identifier: BSD-2-Clause

package dm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel/devmapper"
)

const (
	targetType = "dsync"
	procRoot   = "/proc/dsync"

	// abiMajor is the major version of the module's messages and files that
	// this package speaks.
	abiMajor = 1
)

// Errors on which callers decide. Test with errors.Is.
var (
	// ErrNoModule says that the kernel has no device-mapper, or that the
	// module is neither loaded nor to be loaded.
	ErrNoModule = errors.New("the kernel module dm-dsync is not there")
	// ErrVersion says that the module which is loaded speaks another version.
	ErrVersion = errors.New("the kernel module dm-dsync has the wrong version")
	// ErrInUse says that a device cannot be claimed, or not be given back.
	ErrInUse = errors.New("in use")
)

// Supported says why this tracker cannot be used here, or nil. It has the
// kernel load the module (as modprobe does) if that is not loaded.
func Supported() error {
	if _, _, _, err := devmapper.Version(); err != nil {
		return fmt.Errorf("%w: %w", ErrNoModule, err)
	}
	v, err := devmapper.TargetVersion(targetType)
	if errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("%w: build and install it with `make install-dkms`, or load it with modprobe", ErrNoModule)
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrNoModule, err)
	}
	if v[0] != abiMajor {
		return wrongVersion(fmt.Sprintf("%d.%d.%d", v[0], v[1], v[2]))
	}
	return loadedVersion()
}

// loadedVersion looks at the version of the module's files: ErrNoModule if
// the module is not loaded.
func loadedVersion() error {
	b, err := os.ReadFile(filepath.Join(procRoot, "version"))
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%w: it is not loaded", ErrNoModule)
	}
	if err != nil {
		return fmt.Errorf("read the module's version: %w", err)
	}
	version := strings.TrimSpace(string(b))
	major, _, _ := strings.Cut(version, ".")
	if n, err := strconv.Atoi(major); err != nil || n != abiMajor {
		return wrongVersion(version)
	}
	return nil
}

func wrongVersion(v string) error {
	return fmt.Errorf("%w: it is %s, and this program speaks %d.x: install the module and the program of one release, and load it anew (modprobe -r dm-dsync && modprobe dm-dsync)", ErrVersion, v, abiMajor)
}

// lockFile serialises what begins histories, over all processes.
const lockFile = "/run/dsync-backup/dm.lock"

// lockAll waits for the lock until ctx is done. It ends with the process that
// holds it.
func lockAll(ctx context.Context) (unlock func(), err error) {
	if err := os.MkdirAll(filepath.Dir(lockFile), 0o700); err != nil {
		return nil, fmt.Errorf("lock the dm trackers: %w", err)
	}
	f, err := os.OpenFile(lockFile, os.O_CREATE|os.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock the dm trackers: %w", err)
	}
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { _ = f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return nil, errors.Join(fmt.Errorf("lock the dm trackers: %w", err), f.Close())
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(fmt.Errorf("lock the dm trackers: another process holds %s: %w", lockFile, ctx.Err()), f.Close())
		case <-time.After(20 * time.Millisecond):
		}
	}
}
