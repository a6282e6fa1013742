// SPDX-License-Identifier: BSD-2-Clause

package systemtest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/snapshot/device"
)

// content makes blocks. More than half of the bytes of compressible ones are
// words that come again and again, so that 1 MiB of them compresses about 2:1.
type content struct {
	r     *rand.Rand
	words []byte // nil: random bytes, which nothing compresses
}

const (
	unitSize = 64 // a word and random bytes
	wordSize = 36
)

func newContent(r *rand.Rand, compressible bool) *content {
	c := &content{r: r}
	if compressible {
		c.words = make([]byte, 512*wordSize)
		c.random(c.words)
	}
	return c
}

func (c *content) random(b []byte) {
	for len(b) >= 8 {
		binary.LittleEndian.PutUint64(b, c.r.Uint64())
		b = b[8:]
	}
	for i := range b {
		b[i] = byte(c.r.Uint32())
	}
}

// fill makes new content, whole units.
func (c *content) fill(b []byte) {
	c.random(b)
	if c.words == nil {
		return
	}
	for i := 0; i < len(b); i += unitSize {
		w := c.r.IntN(len(c.words)/wordSize) * wordSize
		copy(b[i:], c.words[w:w+wordSize])
	}
}

// someBlocks picks n different blocks of a device of size bytes, sorted.
func someBlocks(r *rand.Rand, size int64, n int) []int64 {
	picked := make(map[int64]bool, n)
	for len(picked) < n {
		picked[r.Int64N(size/kernel.BlockSize)] = true
	}
	out := make([]int64, 0, n)
	for b := range picked {
		out = append(out, b)
	}
	slices.Sort(out)
	return out
}

// direct opens a device or file for writes of whole blocks that are what the
// device sees, one by one.
func direct(t testing.TB, path string) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// writeBlocks writes new content to the blocks, and returns it in their order.
func writeBlocks(t testing.TB, f *os.File, c *content, blocks []int64) []byte {
	t.Helper()
	all, err := writeSome(f, c, blocks)
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func writeSome(f *os.File, c *content, blocks []int64) ([]byte, error) {
	all := make([]byte, len(blocks)*kernel.BlockSize)
	c.fill(all)
	var g errgroup.Group
	const writers = 8
	for w := range writers {
		g.Go(func() error {
			buf := device.AlignedBuffer(kernel.BlockSize)
			for i := w; i < len(blocks); i += writers {
				copy(buf, all[i*kernel.BlockSize:])
				if _, err := f.WriteAt(buf, blocks[i]*kernel.BlockSize); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return all, errors.Join(g.Wait(), f.Sync())
}

// fillRange writes new content to length bytes from offset on.
func fillRange(t testing.TB, f *os.File, c *content, offset, length int64) {
	t.Helper()
	buf := device.AlignedBuffer(1 << 20)
	for end := offset + length; offset < end; offset += int64(len(buf)) {
		buf = buf[:min(int64(len(buf)), end-offset)]
		c.fill(buf)
		if _, err := f.WriteAt(buf, offset); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
}

// fillFile writes a file of new content into a mounted file system.
func fillFile(t testing.TB, path string, c *content, size int) {
	t.Helper()
	b := make([]byte, size)
	c.fill(b)
	if err := os.WriteFile(path, b, 0o644); err != nil {
		t.Fatal(err)
	}
	run(t, "sync", "-f", path)
}

// sameSparse fails the test if two images differ, of which most is holes. It
// reads only what is data in one of them.
func sameSparse(t testing.TB, a, b string) {
	t.Helper()
	x, y := open(t, a), open(t, b)
	xi, err := x.Stat()
	if err != nil {
		t.Fatal(err)
	}
	yi, err := y.Stat()
	if err != nil {
		t.Fatal(err)
	}
	if xi.Size() != yi.Size() {
		t.Fatalf("%s has %d bytes, %s %d", a, xi.Size(), b, yi.Size())
	}
	p, q := make([]byte, 1<<20), make([]byte, 1<<20)
	for _, f := range []*os.File{x, y} {
		for pos := int64(0); ; {
			from, err := f.Seek(pos, unix.SEEK_DATA)
			if errors.Is(err, unix.ENXIO) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			if pos, err = f.Seek(from, unix.SEEK_HOLE); err != nil {
				t.Fatal(err)
			}
			for ; from < pos; from += int64(len(p)) {
				n := min(int64(len(p)), pos-from)
				if _, err := x.ReadAt(p[:n], from); err != nil {
					t.Fatal(err)
				}
				if _, err := y.ReadAt(q[:n], from); err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(p[:n], q[:n]) {
					t.Fatalf("%s and %s differ between bytes %d and %d", a, b, from, from+n)
				}
			}
		}
	}
}

func open(t testing.TB, path string) *os.File {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// stored is how many bytes the files below a folder have.
func stored(t testing.TB, dir string) (n int64) {
	t.Helper()
	err := filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		fi, err := d.Info()
		if err == nil {
			n += fi.Size()
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// files lists the files of a kind in a local repository: packs, "index",
// "snapshots" or "locks".
func (e *env) files(kind string) (out []string) {
	e.t.Helper()
	err := filepath.WalkDir(filepath.Join(e.repo, kind), func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // a program that is at work has just removed it
		}
		if err == nil && d.Type().IsRegular() {
			out = append(out, path)
		}
		return err
	})
	if err != nil {
		e.t.Fatal(err)
	}
	return out
}

// restored restores a snapshot to a new file and returns its name.
func (e *env) restored(id string) string {
	e.t.Helper()
	file := filepath.Join(e.t.TempDir(), "restored.img")
	e.must("-q", "restore", id, file)
	return file
}

// lightEnv makes a repository in a temporary folder, one that is cheap to open.
func lightEnv(t testing.TB) *env {
	e := newEnv(t, filepath.Join(t.TempDir(), "repo"))
	e.initLight()
	return e
}
