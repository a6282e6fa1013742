// SPDX-License-Identifier: BSD-2-Clause

package vm

import (
	"bufio"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"sort"

	"golang.org/x/sys/unix"
)

// tree is the root file system of a guest: paths without a leading slash, each with
// what lies there. Folders above a path come by themselves.
type tree map[string]node

// node is one file: a folder, a symbolic link, a file of the host, or contents.
type node struct {
	mode fs.FileMode // type and permissions
	from string      // a file of the host, for a regular file
	data []byte      // contents of a regular file without from, or a link's target
}

func (t tree) dir(name string) {
	for ; name != "." && name != "/" && name != ""; name = path.Dir(name) {
		if n, ok := t[name]; ok && n.mode.IsDir() {
			return
		}
		t[name] = node{mode: fs.ModeDir | 0o755}
	}
}

func (t tree) put(name string, n node) {
	t.dir(path.Dir(name))
	t[name] = n
}

func (t tree) link(name, target string) {
	t.put(name, node{mode: fs.ModeSymlink | 0o777, data: []byte(target)})
}

func (t tree) write(name, text string) {
	t.put(name, node{mode: 0o644, data: []byte(text)})
}

// copyFile takes a file of the host, as it is when the archive is written.
func (t tree) copyFile(name, from string) {
	t.put(name, node{mode: 0o755, from: from})
}

// archive writes t as the kernel wants its initramfs: cpio, "newc".
func (t tree) archive(w io.Writer) error {
	names := make([]string, 0, len(t))
	for name := range t {
		names = append(names, name)
	}
	sort.Strings(names) // folders come before what is in them
	c := &cpio{w: bufio.NewWriterSize(w, 1<<20)}
	c.header("dev/console", 0o600|unix.S_IFCHR, 0, 5, 1) // before anything is mounted
	for _, name := range names {
		n := t[name]
		perm := uint32(n.mode.Perm())
		switch {
		case n.mode.IsDir():
			c.header(name, perm|unix.S_IFDIR, 0, 0, 0)
		case n.mode&fs.ModeSymlink != 0:
			c.header(name, perm|unix.S_IFLNK, int64(len(n.data)), 0, 0)
			c.bytes(n.data)
		case n.from == "":
			c.header(name, perm|unix.S_IFREG, int64(len(n.data)), 0, 0)
			c.bytes(n.data)
		default:
			c.file(name, perm|unix.S_IFREG, n.from)
		}
	}
	c.header("TRAILER!!!", 0, 0, 0, 0)
	if c.err != nil {
		return c.err
	}
	return c.w.Flush()
}

// cpio writes members and keeps the first error.
type cpio struct {
	w     *bufio.Writer
	inode int
	at    int64
	err   error
}

func (c *cpio) header(name string, mode uint32, size int64, major, minor uint32) {
	if c.err == nil && size >= 1<<32 {
		c.err = fmt.Errorf("%s is too large for an initramfs", name)
	}
	c.inode++
	c.bytes(fmt.Appendf(nil, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%s\x00",
		c.inode, mode, 0, 0, 1, 0, size, 0, 0, major, minor, len(name)+1, 0, name))
}

// bytes writes b, and zeros up to the next multiple of four.
func (c *cpio) bytes(b []byte) {
	if c.err == nil {
		_, c.err = c.w.Write(b)
	}
	c.pad(int64(len(b)))
}

func (c *cpio) pad(n int64) {
	c.at += n
	for ; c.err == nil && c.at%4 != 0; c.at++ {
		c.err = c.w.WriteByte(0)
	}
}

func (c *cpio) file(name string, mode uint32, from string) {
	f, err := os.Open(from)
	if err != nil {
		c.err = err
		return
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		c.err = err
		return
	}
	c.header(name, mode, info.Size(), 0, 0)
	if c.err == nil {
		_, c.err = io.CopyN(c.w, f, info.Size())
	}
	c.pad(info.Size())
}
