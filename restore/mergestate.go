// SPDX-License-Identifier: BSD-2-Clause

package restore

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/snapshot/device"
	"github.com/dsync-backup/dsync-backup/snapshot/stream"
)

// StateSuffix is what the name of an image file's state ends with.
const StateSuffix = ".dsync-state"

const stateVersion = 1

// mergeState is what is durably known of a target (docs/stream.md).
type mergeState struct {
	Version int    `json:"version"`
	Target  string `json:"target"` // for people
	// Identity is of the file, or of the device; see identify.
	Identity string `json:"identity"`
	// Written: a merge began to write to it.
	Written bool            `json:"written"`
	Source  string          `json:"source"`
	Size    int64           `json:"size"`
	Changed int64           `json:"changed"`  // a file's time of change, in ns, as the last merge left it
	At      kernel.Position `json:"position"` // complete up to; zero: unknown
	Stream  stream.ID       `json:"stream"`   // the last one that was applied, or is being
	// Incomplete: a merge began and did not end. At is then where it began,
	// zero if the stream was not one of changes since a position, and Partly
	// how far it may have come.
	Incomplete bool            `json:"incomplete"`
	Partly     kernel.Position `json:"partly"`
	Sums       stream.ID       `json:"sums"` // given out and not outdated by a merge
	Key        stream.ID       `json:"witness_key"`
	Witnesses  []witness       `json:"witnesses,omitempty"`
	Time       time.Time       `json:"time"`
}

// witness is a block that must be as the last merge left it.
type witness struct {
	Offset int64  `json:"offset"`
	Sum    uint64 `json:"sum"`
}

// statePath is where the state of a target lies: beside an image file, which it
// then goes with, or for a device in the state directory under the device's
// identity.
func statePath(path, stateDir string, kind device.Kind, identity string) string {
	if kind == device.File {
		return path + StateSuffix
	}
	sum := sha256.Sum256([]byte(identity))
	return filepath.Join(stateDir, "targets", hex.EncodeToString(sum[:16])+".json")
}

// readState reads a state; nil if there is none.
func readState(path string) (*mergeState, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the target's state: %w", err)
	}
	s := &mergeState{}
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err = dec.Decode(s); err == nil && s.Version != stateVersion {
		err = fmt.Errorf("it has version %d, and this program knows %d", s.Version, stateVersion)
	}
	if err != nil {
		return nil, fmt.Errorf("read the target's state %s: %w: remove it, and the target counts as not known", path, err)
	}
	return s, nil
}

// write makes the state durable.
func (s *mergeState) write(path string) error {
	s.Version, s.Time = stateVersion, time.Now()
	b, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return fmt.Errorf("write the target's state: %w", err)
	}
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("write the target's state: %w", err)
	}
	f, err := os.CreateTemp(dir, filepath.Base(path)+".new-")
	if err != nil {
		return fmt.Errorf("write the target's state: %w", err)
	}
	_, err = f.Write(append(b, '\n'))
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		_ = os.Remove(f.Name())
		return fmt.Errorf("write the target's state: %w", err)
	}
	for _, d := range []string{dir, filepath.Dir(dir)} {
		if err := syncFolder(d); err != nil {
			return fmt.Errorf("write the target's state: %w", err)
		}
	}
	return nil
}

func syncFolder(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// identify names what a path leads to: a file by its inode and its birth, which
// no copy has; a device by what is known of it but for what lies on it, which a
// merge changes.
func identify(ctx context.Context, path string, kind device.Kind) (string, error) {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, path, 0, unix.STATX_BASIC_STATS|unix.STATX_BTIME, &st); err != nil {
		return "", fmt.Errorf("look at %s: %w", path, err)
	}
	if kind == device.File {
		return fmt.Sprintf("file inode %d born %d.%09d", st.Ino, st.Btime.Sec, st.Btime.Nsec), nil
	}
	d, err := device.Open(path, device.Options{})
	if err != nil {
		return "", err
	}
	defer d.Close()
	id, err := d.Identity(ctx)
	if err != nil {
		return "", err
	}
	return deviceIdentity(id, d.RealPath()), nil
}

// deviceIdentity takes the first that there is of what stays with a device. One
// that has nothing is known until it is bound anew, or the machine is.
func deviceIdentity(id device.Identity, path string) string {
	switch {
	case id.DMUUID != "":
		return "dm " + id.DMUUID
	case id.LoopFile != "":
		var st unix.Stat_t
		if unix.Stat(id.LoopFile, &st) == nil {
			return fmt.Sprintf("loop %s inode %d start %d", id.LoopFile, st.Ino, id.PartitionStart)
		}
		return fmt.Sprintf("loop %s start %d seq %d", id.LoopFile, id.PartitionStart, id.DiskSeq)
	case id.PartitionStart > 0 && id.PartUUID != "":
		return fmt.Sprintf("partition %s at %d", id.PartUUID, id.PartitionStart)
	case id.WWID != "" || id.Serial != "":
		return fmt.Sprintf("disk %q %q %q at %d", id.WWID, id.Model, id.Serial, id.PartitionStart)
	}
	boot, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return fmt.Sprintf("device %s seq %d at %d boot %s", path, id.DiskSeq, id.PartitionStart, strings.TrimSpace(string(boot)))
}

// changeTime is when a file's content was changed last, in ns.
func changeTime(f *os.File) (int64, error) {
	var st unix.Stat_t
	rc, err := f.SyscallConn()
	if err != nil {
		return 0, err
	}
	ctlErr := rc.Control(func(fd uintptr) { err = unix.Fstat(int(fd), &st) })
	if err := errors.Join(ctlErr, err); err != nil {
		return 0, fmt.Errorf("look at target: %w", err)
	}
	return st.Mtim.Nano(), nil
}

// stampTime gives a file a time of change that no write can give it by chance:
// the kernel stamps writes by the tick, this is by the nanosecond.
func stampTime(f *os.File) error {
	tv := []unix.Timespec{{Nsec: unix.UTIME_OMIT}, unix.NsecToTimespec(time.Now().UnixNano())}
	rc, err := f.SyscallConn()
	if err != nil {
		return err
	}
	ctlErr := rc.Control(func(fd uintptr) {
		// An empty path stands for the descriptor itself.
		err = unix.UtimesNanoAt(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", fd), tv, 0)
	})
	if err := errors.Join(ctlErr, err); err != nil {
		return fmt.Errorf("stamp target: %w", err)
	}
	return f.Sync()
}
