// SPDX-License-Identifier: BSD-2-Clause

package moduletest

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/kernel/devmapper"
	"github.com/dsync-backup/dsync-backup/kernel/devmapper/dmtest"
)

const (
	sector = 512
	block  = kernel.BlockSize
	proc   = "/proc/dsync"
	nonce  = "00112233445566778899aabbccddeeff"
)

// need skips a test where the module is not there.
func need(t testing.TB) {
	t.Helper()
	dmtest.Need(t)
	if _, err := os.Stat(proc); err != nil {
		t.Skip("this test runs in a guest with the module dm-dsync: ", err)
	}
}

// device is a mapped device with a history.
type device struct {
	t    testing.TB
	name string
}

// line is the target's line in a table.
func line(below string, offset, sectors uint64) devmapper.Target {
	return devmapper.Target{Length: sectors, Type: "dsync", Params: fmt.Sprintf("%s %d", below, offset)}
}

// newDevice maps sectors sectors of below, under the test's own name.
func newDevice(t testing.TB, name, below string, sectors uint64) device {
	t.Helper()
	need(t)
	dmtest.Map(t, name, line(below, 0, sectors))
	return device{t, name}
}

// onLoop is a device of size bytes on a loop device.
func onLoop(t testing.TB, name string, size int64) device {
	t.Helper()
	need(t)
	return newDevice(t, name, dmtest.Loop(t, size, dmtest.LoopOptions{}), uint64(size/sector))
}

func (d device) path() string { return devmapper.Path(d.name) }

func (d device) file(name string) string { return filepath.Join(proc, d.name, name) }

func (d device) open(flags int) *os.File {
	d.t.Helper()
	f, err := os.OpenFile(d.path(), flags, 0)
	if err != nil {
		d.t.Fatal(err)
	}
	d.t.Cleanup(func() { _ = f.Close() })
	return f
}

func (d device) message(format string, args ...any) error {
	_, err := devmapper.Message(d.name, 0, fmt.Sprintf(format, args...))
	return err
}

// tell sends a message that must be taken.
func (d device) tell(format string, args ...any) {
	d.t.Helper()
	if err := d.message(format, args...); err != nil {
		d.t.Fatal(err)
	}
}

func (d device) load(targets ...devmapper.Target) {
	d.t.Helper()
	if err := devmapper.Load(d.name, devmapper.LoadOptions{}, targets...); err != nil {
		d.t.Fatal(err)
	}
}

func (d device) suspend(o devmapper.SuspendOptions) {
	d.t.Helper()
	if err := devmapper.Suspend(d.t.Context(), d.name, o); err != nil {
		d.t.Fatal(err)
	}
}

func (d device) resume() {
	d.t.Helper()
	if err := devmapper.Resume(d.t.Context(), d.name, devmapper.ResumeOptions{}); err != nil {
		d.t.Fatal(err)
	}
}

func (d device) reload(targets ...devmapper.Target) {
	d.t.Helper()
	d.load(targets...)
	d.resume()
}

// status is the status file, by key.
func (d device) status() map[string]string {
	d.t.Helper()
	b, err := os.ReadFile(d.file("status"))
	if err != nil {
		d.t.Fatal(err)
	}
	out := map[string]string{}
	for l := range strings.Lines(string(b)) {
		key, value, _ := strings.Cut(strings.TrimSuffix(l, "\n"), " ")
		out[key] = value
	}
	return out
}

// want compares lines of the status: "epoch 3".
func (d device) want(lines ...string) {
	d.t.Helper()
	st := d.status()
	for _, l := range lines {
		key, value, _ := strings.Cut(l, " ")
		if st[key] != value {
			d.t.Errorf("%s is %q, want %q", key, st[key], value)
		}
	}
}

func (d device) number(key string) int64 {
	d.t.Helper()
	n, err := strconv.ParseInt(d.status()[key], 10, 64)
	if err != nil {
		d.t.Fatal(err)
	}
	return n
}

// bitmap reads active or frozen, whole.
func (d device) bitmap(file string) *kernel.Bitmap {
	d.t.Helper()
	blocks := d.number(map[string]string{"active": "blocks", "frozen": "pending_blocks"}[file])
	raw, err := os.ReadFile(d.file(file))
	if err != nil {
		d.t.Fatal(err)
	}
	if int64(len(raw)) != (blocks+7)/8 {
		d.t.Fatalf("%s has %d bytes for %d blocks", file, len(raw), blocks)
	}
	b := kernel.NewBitmap(blocks)
	padded := append(raw, make([]byte, 8)...)
	set := 0
	for i := range b.Words() {
		w := binary.LittleEndian.Uint64(padded[8*i:])
		set += bits.OnesCount64(w)
		b.OrWord(i, w)
	}
	if b.Count() != int64(set) {
		d.t.Errorf("%s has bits behind its last block", file)
	}
	return b
}

// rotate ends the epoch and returns what it held.
func (d device) rotate() *kernel.Bitmap {
	d.t.Helper()
	d.tell("rotate %s", nonce)
	b := d.bitmap("frozen")
	if got := d.number("pending_dirty"); got != b.Count() {
		d.t.Errorf("pending_dirty is %d, frozen has %d", got, b.Count())
	}
	return b
}

func (d device) ack() {
	d.t.Helper()
	epoch, _, _ := strings.Cut(d.status()["pending"], " ")
	d.tell("ack %s", epoch)
}

// turn is rotate and ack.
func (d device) turn() *kernel.Bitmap {
	d.t.Helper()
	b := d.rotate()
	d.ack()
	return b
}

// listed reads blocks.
func (d device) listed() *kernel.Bitmap {
	d.t.Helper()
	f, err := os.Open(d.file("blocks"))
	if err != nil {
		d.t.Fatal(err)
	}
	defer f.Close()
	b, last := kernel.NewBitmap(d.number("blocks")), int64(-1)
	s := bufio.NewScanner(f)
	for s.Scan() {
		n, err := strconv.ParseInt(s.Text(), 10, 64)
		if err != nil || n <= last || n >= b.Blocks() {
			d.t.Fatalf("line %q after %d: %v", s.Text(), last, err)
		}
		b.Set(n)
		last = n
	}
	if s.Err() != nil {
		d.t.Fatal(s.Err())
	}
	return b
}

// byHoles reads a bitmap through SEEK_DATA and SEEK_HOLE.
func (d device) byHoles(file string) *kernel.Bitmap {
	d.t.Helper()
	f, err := os.Open(d.file(file))
	if err != nil {
		d.t.Fatal(err)
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		d.t.Fatal(err)
	}
	b := kernel.NewBitmap(size * 8)
	for at := int64(0); ; {
		data, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return b
		}
		hole, err2 := unix.Seek(int(f.Fd()), data, unix.SEEK_HOLE)
		if err := errors.Join(err, err2); err != nil || data < at || hole <= data || hole > size {
			d.t.Fatalf("data at %d, hole at %d of %d: %v", data, hole, size, err)
		}
		raw := make([]byte, hole-data)
		if _, err := f.ReadAt(raw, data); err != nil {
			d.t.Fatal(err)
		}
		for i, v := range raw {
			for bit := range int64(8) {
				if v>>bit&1 == 1 {
					b.Set((data+int64(i))*8 + bit)
				}
			}
		}
		at = hole
	}
}

// same compares what is marked; the lengths may differ.
func same(t testing.TB, what string, got, want *kernel.Bitmap) {
	t.Helper()
	size := max(got.Blocks(), want.Blocks()) * block
	if g, w := fmt.Sprint(got.Extents(size)), fmt.Sprint(want.Extents(size)); g != w {
		t.Errorf("%s: marked %.2000s\nwant %.2000s", what, g, w)
	}
}

func blocksOf(blocks int64, marked ...int64) *kernel.Bitmap {
	b := kernel.NewBitmap(blocks)
	for _, i := range marked {
		b.Set(i)
	}
	return b
}

// aligned is memory for O_DIRECT.
func aligned(n int64) []byte {
	b := make([]byte, n+block)
	skip := block - int64(uintptr(unsafe.Pointer(&b[0]))%block)
	return b[skip : skip+n]
}

// put writes blocks, directly.
func (d device) put(blocks ...int64) {
	d.t.Helper()
	f := d.open(os.O_WRONLY | unix.O_DIRECT)
	defer f.Close()
	for _, i := range blocks {
		if _, err := f.WriteAt(aligned(block), i*block); err != nil {
			d.t.Fatal(err)
		}
	}
}

// rangeIoctl is BLKDISCARD, BLKZEROOUT, BLKSECDISCARD of a range in bytes.
func rangeIoctl(f *os.File, request uintptr, start, length int64) error {
	arg := [2]uint64{uint64(start), uint64(length)}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, uintptr(unsafe.Pointer(&arg))); errno != 0 {
		return errno
	}
	return nil
}

func wantErrno(t testing.TB, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: %v, want %v", what, err, want)
	}
}
