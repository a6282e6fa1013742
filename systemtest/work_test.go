// SPDX-License-Identifier: BSD-2-Clause

package systemtest

import (
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// work changes a file system as people and programs do.
type work struct {
	dir   string
	r     *rand.Rand
	db    *sql.DB
	files []string // that may be changed
	from  []string // that may be copied in
	named int
}

// run makes n changes, says so on stdout, and goes on slowly until stop.
func (w *work) run(n int, stop <-chan struct{}) error {
	if err := w.look(); err != nil {
		return err
	}
	for i := 0; ; i++ {
		if i == n {
			fmt.Println("settled")
		}
		if i >= n {
			select {
			case <-stop:
				return nil
			case <-time.After(50 * time.Millisecond):
			}
		}
		if err := w.change(i); err != nil {
			return fmt.Errorf("change %d: %w", i, err)
		}
	}
}

// look lists what there is.
func (w *work) look() error {
	list := func(root string) (files []string, err error) {
		err = filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
			if err == nil && e.Type().IsRegular() {
				files = append(files, path)
			}
			return err
		})
		return files, err
	}
	var err error
	if w.from, err = list(filepath.Join(goRoot(), "src", "net")); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(w.dir, "work"), 0o755); err != nil {
		return err
	}
	w.named = int(w.r.Uint32()) // so that names do not meet those of an older run
	w.files, err = list(filepath.Join(w.dir, "work"))
	tree, err2 := list(filepath.Join(w.dir, "src"))
	if errors.Is(err2, fs.ErrNotExist) {
		err2 = nil
	}
	w.files = append(w.files, tree...)
	return errors.Join(err, err2)
}

func goRoot() string {
	if out, err := exec.Command("go", "env", "GOROOT").Output(); err == nil {
		return string(out[:len(out)-1])
	}
	return runtime.GOROOT() //nolint:staticcheck // the program was built here
}

func (w *work) change(i int) error {
	var st unix.Statfs_t
	if err := unix.Statfs(w.dir, &st); err != nil {
		return err
	}
	if st.Bavail < st.Blocks/4 {
		return w.remove(len(w.files) / 4)
	}
	switch k := w.r.IntN(20); {
	case i == 0 || k < 5:
		last, err := commitEntries(w.db, w.r)
		if err == nil {
			fmt.Println(last)
		}
		return err
	case k < 10 || len(w.files) < 20:
		return w.copyIn()
	case k < 12:
		return w.remove(1 + w.r.IntN(5))
	case k < 14:
		return w.rename()
	case k < 16:
		return w.allocate()
	case k < 17:
		return w.truncate()
	}
	return w.mapped()
}

func (w *work) newName() string {
	w.named++
	return filepath.Join(w.dir, "work", fmt.Sprintf("f%08x", uint32(w.named)))
}

func (w *work) pick() string { return w.files[w.r.IntN(len(w.files))] }

// copyIn copies a file, sometimes many times over into a large one.
func (w *work) copyIn() error {
	b, err := os.ReadFile(w.from[w.r.IntN(len(w.from))])
	if err != nil {
		return err
	}
	f, err := os.Create(w.newName())
	if err != nil {
		return err
	}
	defer f.Close()
	for range 1 + w.r.IntN(8)*w.r.IntN(8) {
		if _, err := f.Write(b); err != nil {
			return err
		}
	}
	w.files = append(w.files, f.Name())
	if w.r.IntN(4) == 0 {
		return f.Sync()
	}
	return nil
}

func (w *work) remove(n int) error {
	for range n {
		i := w.r.IntN(len(w.files))
		if err := os.Remove(w.files[i]); err != nil {
			return err
		}
		w.files[i] = w.files[len(w.files)-1]
		w.files = w.files[:len(w.files)-1]
	}
	return nil
}

func (w *work) rename() error {
	i := w.r.IntN(len(w.files))
	name := w.newName()
	if err := os.Rename(w.files[i], name); err != nil {
		return err
	}
	w.files[i] = name
	return nil
}

// allocate punches, zeroes, cuts out, inserts or reserves blocks.
func (w *work) allocate() error {
	const block = 4096
	f, err := os.OpenFile(w.newName(), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	w.files = append(w.files, f.Name())
	blocks := 16 + w.r.Int64N(256)
	b := make([]byte, blocks*block)
	for i := range b {
		b[i] = byte(w.r.Uint32N(32))
	}
	if _, err := f.Write(b); err != nil {
		return err
	}
	if w.r.IntN(2) == 0 {
		if err := f.Sync(); err != nil {
			return err
		}
	}
	from := w.r.Int64N(blocks - 8)
	length := 1 + w.r.Int64N(blocks-from-4)
	modes := []uint32{
		unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE, unix.FALLOC_FL_COLLAPSE_RANGE,
		unix.FALLOC_FL_ZERO_RANGE, unix.FALLOC_FL_INSERT_RANGE, unix.FALLOC_FL_KEEP_SIZE,
	}
	mode := modes[w.r.IntN(len(modes))]
	if mode == unix.FALLOC_FL_KEEP_SIZE {
		from += blocks
	}
	if err := unix.Fallocate(int(f.Fd()), mode, from*block, length*block); err != nil {
		return fmt.Errorf("fallocate mode %#x of %s: %w", mode, f.Name(), err)
	}
	return nil
}

func (w *work) truncate() error {
	name := w.pick()
	st, err := os.Stat(name)
	if err != nil {
		return err
	}
	return os.Truncate(name, w.r.Int64N(2*st.Size()+2))
}

// mapped writes through a shared mapping, and leaves it to the kernel when
// that reaches the disk, unless it says msync.
func (w *work) mapped() error {
	f, err := os.OpenFile(w.pick(), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil || st.Size() == 0 {
		return err
	}
	m, err := unix.Mmap(int(f.Fd()), 0, int(st.Size()), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	for range 1 + w.r.IntN(50) {
		m[w.r.IntN(len(m))] = byte(w.r.Uint32())
	}
	if w.r.IntN(2) == 0 {
		err = unix.Msync(m, unix.MS_SYNC)
	}
	return errors.Join(err, unix.Munmap(m))
}
