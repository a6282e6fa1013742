// SPDX-License-Identifier: BSD-2-Clause

package restore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/snapshot/device"
)

// Errors on which callers decide. Test with errors.Is. A target in use is
// [device.ErrInUse].
var (
	// ErrTooSmall says that a block device is smaller than the snapshot's.
	ErrTooSmall = errors.New("target is too small")
	// ErrHasData says that a target holds something and force was not asked
	// for.
	ErrHasData = errors.New("target holds data")
	// ErrIncomplete says that a restore failed after it had begun to write:
	// the target holds neither what it did nor the snapshot.
	ErrIncomplete = errors.New("the target is incomplete")
)

// target is where a device is restored to.
type target struct {
	path  string // absolute
	kind  device.Kind
	size  int64  // as found; 0 if it does not exist
	holds string // what it holds, "" if nothing

	created bool // the file did not exist
	sparse  bool // what is not written reads as zeros

	blocks  *os.File // for whole blocks: O_DIRECT on a device
	soft    *os.File // through the page cache, for the rest; of a file it is the same
	pace    *pace    // of a file
	zeroing atomic.Int32
	touched atomic.Bool
}

// inspect looks at a target and refuses one that must not be overwritten. It
// opens nothing for writing.
func inspect(ctx context.Context, path string, size int64, repository string, force bool) (*target, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	t := &target{path: abs, kind: device.File}
	if err := apart(abs, repository); err != nil {
		return nil, err
	}
	d, err := device.Open(abs, device.Options{})
	if errors.Is(err, fs.ErrNotExist) {
		return t, t.mayCreate()
	}
	if err != nil {
		return nil, err
	}
	t.kind, t.size = d.Kind(), d.Size()
	if err := d.Close(); err != nil {
		return nil, err
	}
	if err := device.CheckTarget(abs); err != nil {
		return nil, err
	}
	if t.kind == device.Block && t.size < size {
		return nil, fmt.Errorf("%w: %s has %d bytes, the snapshot's device has %d", ErrTooSmall, abs, t.size, size)
	}
	if t.holds, err = device.HasData(ctx, abs); err != nil {
		return nil, err
	}
	if t.holds != "" && !force {
		return nil, fmt.Errorf("%w: %s has %s, and is overwritten only with --force", ErrHasData, abs, t.holds)
	}
	return t, nil
}

// apart refuses a target inside of the repository's own directory.
func apart(path, repository string) error {
	if !filepath.IsAbs(repository) {
		return nil
	}
	dir, err := filepath.EvalSymlinks(repository)
	if err != nil {
		return nil //nolint:nilerr // no local directory
	}
	resolved, err := filepath.EvalSymlinks(path)
	if errors.Is(err, fs.ErrNotExist) {
		resolved, err = filepath.EvalSymlinks(filepath.Dir(path))
	}
	if err != nil {
		return fmt.Errorf("look at target: %w", err)
	}
	if resolved == dir || strings.HasPrefix(resolved, dir+"/") {
		return fmt.Errorf("%w: %s lies inside of the repository that it would be restored from", device.ErrInUse, path)
	}
	return nil
}

// mayCreate refuses to make a file where a device was meant.
func (t *target) mayCreate() error {
	if strings.HasPrefix(t.path, "/dev/") && !strings.HasPrefix(t.path, "/dev/shm/") {
		return fmt.Errorf("open target: there is no device %s", t.path)
	}
	if fi, err := os.Lstat(t.path); err == nil && fi.Mode()&fs.ModeSymlink != 0 {
		return fmt.Errorf("open target: %s is a link to nothing", t.path)
	}
	fi, err := os.Stat(filepath.Dir(t.path))
	if err == nil && !fi.IsDir() {
		err = fmt.Errorf("%s is no directory", filepath.Dir(t.path))
	}
	if err != nil {
		return fmt.Errorf("create target: %w", err)
	}
	return nil
}

// claim opens a block device so that nobody else can claim or mount it. It
// changes nothing.
func (t *target) claim() error {
	if t.kind == device.File {
		return nil
	}
	return t.open()
}

// open opens the descriptors. A device with sectors larger than our blocks is written
// through the cache.
func (t *target) open() error {
	if t.kind == device.File {
		f, err := os.OpenFile(t.path, os.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open target: %w", err)
		}
		t.blocks, t.soft, t.pace = f, f, &pace{file: f}
		return nil
	}
	const flags = os.O_RDWR | unix.O_CLOEXEC | unix.O_EXCL
	f, err := os.OpenFile(t.path, flags|unix.O_DIRECT, 0)
	if err == nil && !directBlocks(f) {
		err = errors.Join(f.Close(), unix.EINVAL)
	}
	if errors.Is(err, unix.EINVAL) {
		f, err = os.OpenFile(t.path, flags, 0)
	}
	if errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("open target %s: %w: somebody claimed it just now", t.path, device.ErrInUse)
	}
	if err != nil {
		return fmt.Errorf("open target: %w", err)
	}
	t.blocks = f
	if t.soft, err = os.OpenFile(t.path, os.O_RDWR|unix.O_CLOEXEC, 0); err != nil {
		return fmt.Errorf("open target: %w", err)
	}
	if err := sameInode(t.blocks, t.soft); err != nil {
		return fmt.Errorf("open target %s: %w", t.path, err)
	}
	now, err := t.blocks.Seek(0, io.SeekEnd)
	if err != nil {
		return fmt.Errorf("measure target: %w", err)
	}
	if now != t.size {
		return fmt.Errorf("open target %s: it had %d bytes and has %d", t.path, t.size, now)
	}
	return nil
}

// directBlocks reports whether direct writes to a device may be as small as our blocks.
func directBlocks(f *os.File) bool {
	sector, err := unix.IoctlGetUint32(int(f.Fd()), unix.BLKSSZGET)
	return err == nil && sector <= kernel.BlockSize
}

func sameInode(a, b *os.File) error {
	x, err := a.Stat()
	if err != nil {
		return err
	}
	y, err := b.Stat()
	if err != nil {
		return err
	}
	if !os.SameFile(x, y) {
		return errors.New("it was replaced while it was opened")
	}
	return nil
}

// prepare makes a file of exactly size bytes: a new one, or one without its
// old content unless that is compared. From here on the target is changed.
func (t *target) prepare(size int64, keep bool) error {
	if t.kind == device.Block {
		return nil
	}
	// Only its owner may read what was only root's to read.
	f, err := os.OpenFile(t.path, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_CLOEXEC, 0o600)
	if t.created = err == nil; t.created {
		err = f.Close()
	}
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("create target: %w", err)
	}
	if err := t.open(); err != nil {
		return err
	}
	t.touched.Store(true)
	if !keep {
		if err := t.soft.Truncate(0); err != nil {
			return fmt.Errorf("empty target: %w", err)
		}
		t.sparse = true
	}
	if err := t.soft.Truncate(size); err != nil {
		return fmt.Errorf("set size of target: %w", err)
	}
	return nil
}

// write writes whole blocks from aligned memory. It may be called from many
// goroutines.
func (t *target) write(p []byte, off int64) error {
	t.touched.Store(true)
	if t.pace != nil {
		return t.writeError(t.pace.write(p, off), off, int64(len(p)))
	}
	_, err := t.blocks.WriteAt(p, off)
	return t.writeError(err, off, int64(len(p)))
}

// writeTail writes the device's last, short block.
func (t *target) writeTail(p []byte, off int64) error {
	t.touched.Store(true)
	_, err := t.soft.WriteAt(p, off)
	return t.writeError(err, off, int64(len(p)))
}

func (t *target) writeError(err error, off, length int64) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("write bytes %d to %d: %w", off, off+length-1, pathless(err))
}

// pathless is an error without the path, which is said once.
func pathless(err error) error {
	if pathErr := (*fs.PathError)(nil); errors.As(err, &pathErr) {
		return pathErr.Err
	}
	return err
}

// sync makes everything durable, the name of a new file included.
func (t *target) sync() error {
	if err := t.blocks.Sync(); err != nil {
		return fmt.Errorf("sync target: %w", pathless(err))
	}
	if t.pace != nil {
		t.pace.drained()
	}
	if !t.created {
		return nil
	}
	dir, err := os.Open(filepath.Dir(t.path))
	if err != nil {
		return fmt.Errorf("sync folder of target: %w", err)
	}
	defer dir.Close()
	if err := dir.Sync(); err != nil {
		return fmt.Errorf("sync folder of target: %w", err)
	}
	return nil
}

func (t *target) close() error {
	var errs []error
	if t.blocks != nil {
		errs = append(errs, t.blocks.Close())
	}
	if t.soft != nil && t.soft != t.blocks {
		errs = append(errs, t.soft.Close())
	}
	return errors.Join(errs...)
}
