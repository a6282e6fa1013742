// SPDX-License-Identifier: BSD-2-Clause

package moduletest

import (
	"errors"
	"fmt"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/kernel/devmapper"
	"github.com/dsync-backup/dsync-backup/kernel/devmapper/dmtest"
)

const mib = 1 << 20

func devno(t testing.TB, path string) string {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
}

func TestTheTableRecreatesTheTarget(t *testing.T) {
	need(t)
	loop := dmtest.Loop(t, 4*mib, dmtest.LoopOptions{})
	dmtest.Map(t, "table", line(loop, 16, 2*mib/sector))
	d := device{t, "table"}
	got, err := devmapper.Table(d.name, devmapper.Query{})
	want := line(devno(t, loop), 16, 2*mib/sector)
	if err != nil || len(got) != 1 || got[0] != want {
		t.Fatalf("table %v, %v; want %v", got, err, want)
	}
	uuid := d.status()["uuid"]
	d.put(1)
	// The offset is applied: the device beneath has the block 2 blocks further on.
	f := d.open(os.O_RDWR | unix.O_DIRECT)
	b := aligned(block)
	copy(b, "here")
	if _, err := f.WriteAt(b, 7*block); err != nil {
		t.Fatal(err)
	}
	beneath, err := os.OpenFile(loop, os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer beneath.Close()
	if _, err := beneath.ReadAt(b, 9*block); err != nil || string(b[:4]) != "here" {
		t.Errorf("the device beneath has %q: %v", b[:4], err)
	}
	d.reload(got...)
	d.want("uuid "+uuid, "state valid", "below "+devno(t, loop)+" 16", "live 1", "epoch 1")
	same(t, "after a reload", d.turn(), blocksOf(512, 1, 7))
	st, err := devmapper.Status(d.name, devmapper.Query{})
	if w := uuid + " 2 - 0 512 valid"; err != nil || st[0].Params != w {
		t.Errorf("status %q, want %q: %v", st[0].Params, w, err)
	}
}

func TestAHistoryIsNeverGuessed(t *testing.T) {
	need(t)
	loop := dmtest.Loop(t, 4*mib, dmtest.LoopOptions{})
	seen := map[string]bool{}
	for range 5 {
		t.Run("", func(t *testing.T) {
			d := newDevice(t, "again", loop, 4*mib/sector)
			uuid := d.status()["uuid"]
			if seen[uuid] || len(uuid) != 32 {
				t.Errorf("uuid %q", uuid)
			}
			seen[uuid] = true
			d.want("epoch 1", "dirty 0", "pending -")
			// Through another table and back: another history.
			d.reload(devmapper.Target{Length: 4 * mib / sector, Type: "linear", Params: loop + " 0"})
			if _, err := os.Stat(d.file("status")); !os.IsNotExist(err) {
				t.Errorf("status without a target: %v", err)
			}
			d.reload(line(loop, 0, 4*mib/sector))
			if u := d.status()["uuid"]; seen[u] {
				t.Errorf("the history came back: %s", u)
			}
		})
	}
}

// A table without dsync is live for a moment, while the history is kept by a second
// table of dsync that was loaded meanwhile: writes may have passed untracked.
func TestATableOutForAMomentInvalidates(t *testing.T) {
	need(t)
	const sectors = 4 * mib / sector
	loop := dmtest.Loop(t, 4*mib, dmtest.LoopOptions{})
	slow := dmtest.Map(t, "slow", devmapper.Target{Length: sectors, Type: "delay", Params: loop + " 0 0 " + loop + " 0 3000"})
	d := newDevice(t, "moment", slow, sectors)
	uuid := d.status()["uuid"]
	f := d.open(os.O_RDWR | unix.O_DIRECT)
	ended, resumed := make(chan error, 1), make(chan error, 1)
	go func() { _, err := f.WriteAt(aligned(block), 5*block); ended <- err }()
	for d.number("dirty") == 0 {
		unix.Nanosleep(&unix.Timespec{Nsec: 1e6}, nil)
	}
	d.load(devmapper.Target{Length: sectors, Type: "linear", Params: slow + " 0"})
	go func() { resumed <- devmapper.Resume(t.Context(), d.name, devmapper.ResumeOptions{}) }()
	// The resume takes the linear table and waits for the write.
	for {
		if info, err := devmapper.Stat(d.name); err != nil {
			t.Fatal(err)
		} else if !info.Inactive {
			break
		}
	}
	d.load(line(slow, 0, sectors))
	if len(ended) > 0 {
		t.Fatal("the write ended before the second table was loaded: a longer delay is needed")
	}
	if err := errors.Join(<-ended, <-resumed); err != nil {
		t.Fatal(err)
	}
	d.want("uuid "+uuid, "live 0", "state invalid a table without dsync was in use")
	wantErrno(t, "clear", os.WriteFile(d.file("blocks"), []byte("clear"), 0), unix.EBUSY)
	wantErrno(t, "restart of the table that is not live", d.message("restart"), unix.EINVAL)
	d.resume()
	d.want("uuid "+uuid, "live 1", "state invalid a table without dsync was in use")
	d.tell("restart")
	d.want("live 1", "state valid", "epoch 1")
}

func TestAReplacedDeviceInvalidatesUnlessAnnounced(t *testing.T) {
	need(t)
	const sectors = 4 * mib / sector
	a, b := dmtest.Loop(t, 8*mib, dmtest.LoopOptions{}), dmtest.Loop(t, 8*mib, dmtest.LoopOptions{})
	cases := []struct {
		name, rebase string
		to           devmapper.Target
		valid        bool
	}{
		{"same", "", line(a, 0, sectors), true},
		{"other device", "", line(b, 0, sectors), false},
		{"other offset", "", line(a, 8, sectors), false},
		{"announced device", devno(t, b) + " 0", line(b, 0, sectors), true},
		{"announced offset", devno(t, a) + " 8", line(a, 8, sectors), true},
		{"another than announced", devno(t, b) + " 0", line(b, 8, sectors), false},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			d := newDevice(t, "replaced", a, sectors)
			d.put(5)
			if c.rebase != "" {
				d.tell("rebase %s", c.rebase)
			}
			d.reload(c.to)
			if c.valid {
				d.want("state valid")
			} else {
				d.want("state invalid the device beneath was replaced")
			}
			same(t, "after", d.turn(), blocksOf(sectors/8, 5))
		})
	}
	t.Run("once", func(t *testing.T) {
		d := newDevice(t, "replaced", a, sectors)
		d.tell("rebase %s 0", devno(t, b))
		d.suspend(devmapper.SuspendOptions{})
		d.resume() // the same instance: the announcement stays
		d.reload(line(a, 0, sectors))
		d.want("state valid")
		d.reload(line(b, 0, sectors))
		d.want("state invalid the device beneath was replaced")
	})
}

func TestGrowAndShrink(t *testing.T) {
	need(t)
	loop := dmtest.Loop(t, 600*mib, dmtest.LoopOptions{})
	const small = 1*mib/sector + 3 // ends inside a block
	d := newDevice(t, "resized", loop, small)
	grown := func(sectors uint64, first int64, more ...int64) *kernel.Bitmap {
		b := blocksOf(int64(sectors+7)/8, more...)
		b.SetRange(first, b.Blocks()-1)
		return b
	}
	d.put(1, 2)
	d.rotate()
	d.put(3)

	const large = 300 * mib / sector // larger bitmaps
	d.reload(line(loop, 0, large))
	d.want("state valid", "blocks 76800", "pending_blocks 257", "epoch 2")
	same(t, "pending over growth", d.bitmap("frozen"), blocksOf(257, 1, 2))
	same(t, "grown", d.bitmap("active"), grown(large, 256, 3))
	d.put(70000)
	d.ack()
	same(t, "grown", d.turn(), grown(large, 256, 3))
	d.put(70000, 4)
	same(t, "the new part is tracked", d.turn(), blocksOf(large/8, 4, 70000))

	// Smaller, in the middle of a block, a word and a page of the bitmap.
	d.put(0, 40000, 40001, 65535, 65536, 76799)
	d.rotate()
	d.put(7, 40000, 40001, 65535, 65536, 76799)
	const less = 40001*8 - 3
	d.reload(line(loop, 0, less))
	d.want("state valid", "blocks 40001", "pending_blocks 76800", "dirty 2")
	same(t, "pending over shrinking", d.bitmap("frozen"), blocksOf(76800, 0, 40000, 40001, 65535, 65536, 76799))
	same(t, "shrunk", d.bitmap("active"), blocksOf(40001, 7, 40000))
	same(t, "listed", d.listed(), blocksOf(40001, 0, 7, 40000))
	wantErrno(t, "mark behind the end", d.message("mark %d 1", less), unix.ERANGE)
	d.ack()
	d.reload(line(loop, 0, large)) // room is left of the first time
	d.want("state valid", "blocks 76800", "pending_blocks 0")
	same(t, "grown again", d.turn(), grown(large, 40000, 7))

	// To where a page of the bitmap ends, and a word.
	for _, end := range []int64{2 * 32768, 32768, 64 * 9} {
		d.put(end-1, end, end+5)
		d.reload(line(loop, 0, uint64(end*8)))
		d.want("dirty 1")
		same(t, "shrunk to whole pages", d.turn(), blocksOf(end, end-1))
	}
	d.reload(line(loop, 0, large))
	d.turn()

	// By sectors of the last block only.
	d.reload(line(loop, 0, less))
	d.turn()
	d.reload(line(loop, 0, less+1))
	same(t, "one sector more", d.turn(), blocksOf(40001, 40000))

	// Of two tables that are loaded one after the other the last one counts.
	d.load(line(loop, 0, 600*mib/sector))
	d.load(line(loop, 0, large))
	d.resume()
	same(t, "grown by the second table", d.turn(), grown(large, 40000))
	d.load(line(loop, 0, 600*mib/sector))
	if err := devmapper.Clear(d.name); err != nil {
		t.Fatal(err)
	}
	d.put(9)
	same(t, "a table that was thrown away", d.turn(), blocksOf(large/8, 9))
	d.want("state valid")
}

func TestTheFirstResumeDecidesTheSize(t *testing.T) {
	need(t)
	loop := dmtest.Loop(t, 400*mib, dmtest.LoopOptions{})
	if _, err := devmapper.Create("first", ""); err != nil {
		t.Fatal(err)
	}
	dmtest.RemoveAtEnd(t, "first")
	d := device{t, "first"}
	d.load(line(loop, 0, 1*mib/sector))
	d.want("live 0", "blocks 256", "state valid", "below "+devno(t, loop)+" 0")
	d.load(line(loop, 8, 300*mib/sector))
	d.resume()
	d.want("live 1", "blocks 76800", "state valid", "dirty 0", "epoch 1", "below "+devno(t, loop)+" 8")
	d.put(76799)
	same(t, "the end", d.turn(), blocksOf(76800, 76799))
}

func TestWhatTheConstructorRefuses(t *testing.T) {
	need(t)
	loop := dmtest.Loop(t, 4*mib, dmtest.LoopOptions{})
	if _, err := devmapper.Create("refused", ""); err != nil {
		t.Fatal(err)
	}
	dmtest.RemoveAtEnd(t, "refused")
	one := devmapper.Target{Length: 8, Type: "linear", Params: loop + " 0"}
	long := func(params string, sectors uint64) []devmapper.Target {
		return []devmapper.Target{{Length: sectors, Type: "dsync", Params: params}}
	}
	behind := line(loop, 8, 8)
	behind.Start = 8
	after := one
	after.Start = 8
	for name, table := range map[string][]devmapper.Target{
		"no arguments":      long("", 8),
		"one argument":      long(loop, 8),
		"three arguments":   long(loop+" 0 0", 8),
		"offset, a word":    long(loop+" x", 8),
		"offset, trailing":  long(loop+" 0x", 8),
		"offset, too large": long(loop+" 18446744073709551615", 8),
		"no such device":    long("/dev/nothing 0", 8),
		"too long":          long(loop+" 0", 1<<60),
		"not first":         {one, behind},
		"not alone":         {line(loop, 0, 8), after},
	} {
		if err := devmapper.Load("refused", devmapper.LoadOptions{}, table...); err == nil {
			t.Errorf("%s: taken", name)
		}
		if _, err := os.Stat(proc + "/refused"); !os.IsNotExist(err) {
			t.Errorf("%s: left a directory: %v", name, err)
		}
	}
	// Past the end of the device beneath: dm says so, at resume.
	d := device{t, "refused"}
	if devmapper.Load(d.name, devmapper.LoadOptions{}, line(loop, 0, 5*mib/sector)) == nil &&
		devmapper.Resume(t.Context(), d.name, devmapper.ResumeOptions{}) == nil {
		t.Error("a target that is longer than its device was taken")
	}
}

// Commands for a driver would write behind the bitmap's back.
func TestPassthroughCommandsAreRefused(t *testing.T) {
	d := onLoop(t, "ioctl", 4*mib)
	f := d.open(os.O_RDWR)
	for name, request := range map[string]uintptr{"SG_IO": 0x2285, "NVME_IOCTL_IO_CMD": 0xc0484e43, "CDROMEJECT": 0x5309, "LOOP_GET_STATUS64": 0x4c05} {
		var arg [256]byte
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, uintptr(ptr(&arg)))
		if errno == 0 {
			t.Errorf("%s went through", name)
		}
	}
	d.want("state valid")
}
