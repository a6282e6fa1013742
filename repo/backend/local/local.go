// SPDX-License-Identifier: BSD-2-Clause

// Package local stores a repository in a directory, laid out as restic does.
//
// It promises that a file appears under its name as a whole and on stable
// storage, or not at all: data is written to a file <name>-tmp-<random> beside
// it, synced, renamed, and the folder is synced. A kill leaves at most such a
// temporary file, which neither this package nor restic takes for a file of
// the repository; an error leaves nothing.
//
// The directory is held open, and everything is done relative to it: a disk
// that is unmounted while in use is never mistaken for an empty repository,
// and nothing is written below its mount point. It knows nothing of what the
// files hold.
package local

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path"
	"path/filepath"
	"sync"

	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/repo/backend/layout"
	"golang.org/x/sys/unix"
)

// DefaultConnections is the number of calls in flight that a disk is given
// work with: each Save waits for two syncs.
const DefaultConnections = 4

// aheadBytes is what the kernel reads ahead of its own.
const aheadBytes = 128 << 10

// Options of a local store; the zero value is usable.
type Options struct {
	Connections int // 0: DefaultConnections
}

// Backend is a store in a directory.
type Backend struct {
	path        string // absolute
	connections int

	mu   sync.Mutex
	root *dir // nil while there is no such directory
}

var _ backend.Backend = (*Backend)(nil)

// Open returns the store in the directory at path. The directory need not be
// there: Create makes it, and until then other calls fail with
// backend.ErrNoStore.
func Open(path string, o Options) (*Backend, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return nil, fmt.Errorf("open directory %s: %w", path, err)
	}
	if o.Connections <= 0 {
		o.Connections = DefaultConnections
	}
	b := &Backend{path: abs, connections: o.Connections}
	if _, err := b.open(); err != nil && !errors.Is(err, unix.ENOENT) {
		return nil, fmt.Errorf("open directory %s: %w", abs, explain(err))
	}
	return b, nil
}

// open returns the directory, or ENOENT.
func (b *Backend) open() (*dir, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.root == nil {
		d, err := openRoot(b.path)
		if err != nil {
			return nil, err
		}
		b.root = d
	}
	return b.root, nil
}

// Location is the directory's absolute path.
func (b *Backend) Location() string { return b.path }

// Connections is as set in Options.
func (b *Backend) Connections() int { return b.connections }

// Close lets go of the directory. No other call may be running.
func (b *Backend) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	d := b.root
	b.root = nil
	if d == nil {
		return nil
	}
	return d.close()
}

// Create makes the directory and its folders, and syncs them.
func (b *Backend) Create(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := b.create(); err != nil {
		return fmt.Errorf("create repository folders in %s: %w", b.path, explain(err))
	}
	return nil
}

func (b *Backend) create() error {
	if err := mkdirAll(b.path); err != nil {
		return err
	}
	d, err := b.open()
	if err != nil {
		return err
	}
	for _, name := range layout.Dirs() {
		if err := d.mkdir(name); err != nil {
			return err
		}
	}
	return errors.Join(d.sync("data"), d.sync("."))
}

// do runs op on the handle's path and says in its error what was tried.
func (b *Backend) do(ctx context.Context, verb string, h backend.Handle, op func(d *dir, path string) error) error {
	if err := h.Validate(); err != nil {
		return err
	}
	err := ctx.Err()
	if err == nil {
		var d *dir
		if d, err = b.open(); err == nil {
			err = op(d, layout.Path(h))
		}
		if errors.Is(err, unix.ENOENT) && !isCallers(err) {
			err = b.missing(d, h.Type)
		}
	}
	if err != nil {
		return fmt.Errorf("%s %v in %s: %w", verb, h, b.path, explain(err))
	}
	return nil
}

// missing tells a file that is not there from a directory that is gone.
func (b *Backend) missing(d *dir, t backend.FileType) error {
	if d == nil || d.gone() {
		return backend.NoStore(t, "the directory does not exist")
	}
	return backend.ErrNotExist
}

// Save writes, syncs and renames; see the package comment.
func (b *Backend) Save(ctx context.Context, h backend.Handle, data []byte) error {
	return b.do(ctx, "save", h, func(d *dir, path string) error {
		return save(ctx, d, h.Type, path, data)
	})
}

func save(ctx context.Context, d *dir, t backend.FileType, name string, data []byte) error {
	tmp := fmt.Sprintf("%s-tmp-%016x", name, rand.Uint64())
	f, err := createIn(d, tmp)
	if err != nil {
		return err
	}
	err = fill(ctx, f, d.fileMode(), data)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = ctx.Err()
	}
	if err == nil && t == backend.ConfigFile {
		if err = d.renameNew(tmp, name); errors.Is(err, unix.EEXIST) {
			err = backend.ErrExist
		}
	} else if err == nil {
		err = d.rename(tmp, name)
	}
	if err != nil {
		_ = d.remove(tmp) // the first error is the one to report
		return err
	}
	return d.sync(path.Dir(name))
}

// createIn makes a new file, and the folders above it within the repository if
// they are missing (a copy made by hand may lack empty ones).
func createIn(d *dir, name string) (*os.File, error) {
	f, err := d.create(name)
	if !errors.Is(err, unix.ENOENT) || d.gone() {
		return f, err
	}
	parent := path.Dir(name)
	for _, p := range []string{path.Dir(parent), parent} {
		if err := errors.Join(d.mkdir(p), d.sync(path.Dir(p))); err != nil {
			return nil, err
		}
	}
	return d.create(name)
}

// writeStep is the longest single write, so that a done context is noticed.
const writeStep = 4 << 20

// fill writes data, makes the file read-only and syncs both.
func fill(ctx context.Context, f *os.File, mode os.FileMode, data []byte) error {
	if len(data) > 0 {
		// Finds a full disk before anything is written, and keeps the file in
		// one piece. Not every file system is able to.
		err := unix.Fallocate(int(f.Fd()), 0, 0, int64(len(data)))
		if err != nil && isFull(err) {
			return err
		}
	}
	for len(data) > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := f.Write(data[:min(len(data), writeStep)])
		if err != nil {
			return err
		}
		data = data[n:]
	}
	// Some file systems (exFAT, network shares) do not take modes.
	if err := f.Chmod(mode &^ 0o222); err != nil && !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.ENOTSUP) {
		return err
	}
	return f.Sync()
}

// Load reads from the open file, so that a Remove meanwhile does no harm.
func (b *Backend) Load(ctx context.Context, h backend.Handle, length int, offset int64, fn func(io.Reader) error) error {
	return b.do(ctx, "load", h, func(d *dir, path string) error {
		f, err := d.openFile(path)
		if err != nil {
			return unreadable(err, d.fsType())
		}
		defer f.Close()
		fi, err := f.Stat()
		if err != nil {
			return unreadable(err, d.fsType())
		}
		n := int64(length)
		if length == 0 {
			n = fi.Size() - offset
		}
		if length < 0 || offset < 0 || n < 0 || offset > fi.Size()-n {
			return backend.OutOfRange(length, offset, fi.Size())
		}
		if n > aheadBytes {
			// All of it is wanted: the disk need not wait until it is asked for.
			_ = unix.Fadvise(int(f.Fd()), offset, n, unix.FADV_WILLNEED)
		}
		r := &backend.WatchedReader{R: backend.ExactReader(io.NewSectionReader(f, offset, n), n)}
		err = fn(r)
		if err != nil && r.Err != nil {
			return unreadable(r.Err, d.fsType())
		}
		return consumed(err)
	})
}

// Stat reports the file's size.
func (b *Backend) Stat(ctx context.Context, h backend.Handle) (backend.FileInfo, error) {
	fi := backend.FileInfo{Name: h.Name}
	err := b.do(ctx, "stat", h, func(d *dir, path string) (err error) {
		fi.Size, _, err = d.stat(path)
		return err
	})
	if err != nil {
		return backend.FileInfo{}, err
	}
	return fi, nil
}

// Remove unlinks the file and syncs its folder: what is removed later never
// reaches the disk before it.
func (b *Backend) Remove(ctx context.Context, h backend.Handle) error {
	return b.do(ctx, "remove", h, func(d *dir, name string) error {
		if err := d.remove(name); err != nil {
			return err
		}
		return d.sync(path.Dir(name))
	})
}
