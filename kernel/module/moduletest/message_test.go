// SPDX-License-Identifier: BSD-2-Clause

package moduletest

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel/devmapper"
)

func ptr(b *[256]byte) unsafe.Pointer { return unsafe.Pointer(b) }

const uuid1 = "0123456789abcdef0123456789abcdef"

func TestEveryMessageRefusesWhatIsWrong(t *testing.T) {
	d := onLoop(t, "messages", 4*mib)
	cases := []struct {
		text string
		want error
	}{
		{"rotate", unix.EINVAL},
		{"rotate 123", unix.EINVAL},
		{"rotate " + nonce[1:], unix.EINVAL},
		{"rotate " + nonce + "0", unix.EINVAL},
		{"rotate " + nonce[1:] + "g", unix.EINVAL},
		{"rotate " + nonce + " x", unix.EINVAL},
		{"ack", unix.EINVAL},
		{"ack x", unix.EINVAL},
		{"ack -1", unix.EINVAL},
		{"ack 1", unix.ENODATA},
		{"ack 1 2", unix.EINVAL},
		{"mark", unix.EINVAL},
		{"mark 0", unix.EINVAL},
		{"mark 0 x", unix.EINVAL},
		{"mark x 1", unix.EINVAL},
		{"mark 0 0", unix.EINVAL},
		{"mark -1 1", unix.EINVAL},
		{"mark 0 8193", unix.ERANGE},
		{"mark 8192 1", unix.ERANGE},
		{"mark 8191 2", unix.ERANGE},
		{"mark 1 18446744073709551615", unix.ERANGE},
		{"mark 18446744073709551615 1", unix.ERANGE},
		{"mark 18446744073709551616 1", unix.EINVAL},
		{"invalidate", unix.EINVAL},
		{"rebase", unix.EINVAL},
		{"rebase 7:0", unix.EINVAL},
		{"rebase 7 0", unix.EINVAL},
		{"rebase 7:x 0", unix.EINVAL},
		{"rebase 7:0x 0", unix.EINVAL},
		{"rebase 7:0 x", unix.EINVAL},
		{"rebase 99999:0 0", unix.EINVAL},
		{"rebase 7:0 0 0", unix.EINVAL},
		{"continue", unix.EINVAL},
		{"continue " + uuid1, unix.EINVAL},
		{"continue " + uuid1 + " 1", unix.EINVAL},
		{"continue " + uuid1 + " 0", unix.EINVAL},
		{"continue " + uuid1 + " x", unix.EINVAL},
		{"continue " + uuid1[1:] + " 7", unix.EINVAL},
		{"restart now", unix.EINVAL},
		{"unknown", unix.EINVAL},
		{"rotat " + nonce, unix.EINVAL},
	}
	before := fmt.Sprint(d.status())
	for _, c := range cases {
		wantErrno(t, c.text, d.message("%s", c.text), c.want)
	}
	if after := fmt.Sprint(d.status()); after != before {
		t.Errorf("refused messages changed the status:\n%s\n%s", before, after)
	}
}

func TestRotateAndAckGoInTurns(t *testing.T) {
	d := onLoop(t, "turns", 4*mib)
	d.put(1)
	d.want("epoch 1", "pending -", "pending_blocks 0", "dirty 1", "block_size 4096", "version 1.0.0", "name turns")
	d.tell("rotate %s", nonce)
	d.want("epoch 2", "pending 1 "+nonce, "pending_blocks 1024", "dirty 0", "pending_dirty 1")
	wantErrno(t, "second rotate", d.message("rotate %s", uuid1), unix.EBUSY)
	for _, e := range []string{"0", "2", "11"} {
		wantErrno(t, "ack "+e, d.message("ack %s", e), unix.ENODATA)
	}
	d.want("epoch 2", "pending 1 "+nonce)
	d.put(2)
	same(t, "frozen", d.bitmap("frozen"), blocksOf(1024, 1))
	d.tell("ack 1")
	d.want("epoch 2", "pending -", "pending_blocks 0", "pending_dirty 0", "dirty 1")
	if b, err := os.ReadFile(d.file("frozen")); err != nil || len(b) != 0 {
		t.Errorf("frozen after ack: %d bytes, %v", len(b), err)
	}
	wantErrno(t, "second ack", d.message("ack 1"), unix.ENODATA)
	same(t, "the next epoch", d.turn(), blocksOf(1024, 2))
}

func TestMessagesWorkWhileSuspended(t *testing.T) {
	d := onLoop(t, "asleep", 4*mib)
	d.put(1)
	d.suspend(devmapper.SuspendOptions{})
	same(t, "rotated while suspended", d.rotate(), blocksOf(1024, 1))
	d.tell("mark 16 1")
	d.ack()
	d.tell("rotate %s", nonce)
	same(t, "marked while suspended", d.bitmap("frozen"), blocksOf(1024, 2))
	d.tell("restart")
	d.want("epoch 1", "state valid", "dirty 0", "pending -")
	d.tell("continue %s 9", uuid1)
	d.resume()
	d.want("epoch 9", "uuid "+uuid1)
}

func TestInvalidateKeepsItsFirstReason(t *testing.T) {
	d := onLoop(t, "invalid", 4*mib)
	d.tell("invalidate   two   words\\\n%s", strings.Repeat("x", 200))
	want := "invalid " + ("two words?" + strings.Repeat("x", 200))[:127]
	d.want("state " + want)
	d.tell("invalidate another")
	d.want("state " + want)
	d.put(3)
	d.turn() // goes on
	st, err := devmapper.Status(d.name, devmapper.Query{})
	if err != nil || !strings.HasSuffix(st[0].Params, " 2 - 0 1024 "+want) {
		t.Errorf("status %q: %v", st[0].Params, err)
	}
	wantErrno(t, "continue", d.message("continue %s 7", uuid1), unix.EBUSY)
	if err := os.WriteFile(d.file("blocks"), []byte("clear\n"), 0); err != nil {
		t.Fatal(err)
	}
	d.want("state " + want)
	d.tell("restart")
	d.want("state valid", "epoch 1")
	d.tell("invalidate another")
	d.want("state invalid another")
}

func TestContinueOnlyAtTheBeginning(t *testing.T) {
	d := onLoop(t, "continued", 4*mib)
	d.tell("continue %s 18446744073709551615", uuid1)
	d.want("uuid "+uuid1, "epoch 18446744073709551615")
	wantErrno(t, "twice", d.message("continue %s 7", uuid1), unix.EBUSY)
	d.tell("restart")
	uuid := d.status()["uuid"]
	if uuid == uuid1 {
		t.Error("restart kept the uuid")
	}
	d.put(1)
	wantErrno(t, "marked", d.message("continue %s 7", uuid1), unix.EBUSY)
	d.rotate()
	wantErrno(t, "pending", d.message("continue %s 7", uuid1), unix.EBUSY)
	d.ack()
	wantErrno(t, "epoch 2", d.message("continue %s 7", uuid1), unix.EBUSY)
	d.want("uuid "+uuid, "epoch 2")
	d.tell("rotate %s", nonce)
	d.put(3)
	d.tell("restart")
	d.want("pending -", "epoch 1", "dirty 0", "pending_dirty 0", "pending_blocks 0")
	d.tell("continue %s 7", uuid1)
	d.put(2)
	d.tell("rotate %s", nonce)
	d.want("pending 7 "+nonce, "epoch 8")
	same(t, "continued", d.bitmap("frozen"), blocksOf(1024, 2))
}

func TestClearResets(t *testing.T) {
	d := onLoop(t, "cleared", 4*mib)
	d.put(1)
	d.rotate()
	d.put(2)
	same(t, "listed", d.listed(), blocksOf(1024, 1, 2))
	uuid := d.status()["uuid"]
	for _, text := range []string{"", "clea", "clear ", "clear\n\n", "clear\x00", "CLEAR", strings.Repeat("clear", 1000)} {
		f, err := os.OpenFile(d.file("blocks"), os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := unix.Write(int(f.Fd()), []byte(text)); err == nil {
			t.Errorf("%q was taken", text)
		}
		_ = f.Close()
	}
	d.want("epoch 2", "dirty 1")
	for _, text := range []string{"clear", "clear\n"} {
		epoch := d.number("epoch")
		if err := os.WriteFile(d.file("blocks"), []byte(text), 0); err != nil {
			t.Fatal(err)
		}
		d.want(fmt.Sprintf("epoch %d", epoch+1), "uuid "+uuid, "dirty 0", "pending_dirty 0", "pending -", "state valid")
		same(t, "listed", d.listed(), blocksOf(1024))
		d.put(7)
	}
	same(t, "afterwards", d.turn(), blocksOf(1024, 7))
}

// Whoever opens this file begins a hibernation, as the kernel's own does, and
// whoever closes it gives it up.
func TestHibernationInvalidates(t *testing.T) {
	need(t)
	d := onLoop(t, "asleep", mib)
	d.put(1)
	d.want("state valid")
	f, err := os.Open("/dev/snapshot")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	const reason = "the machine was hibernated"
	d.want("state invalid "+reason, "dirty 1")
	// A history that began since is not in the clear either.
	late := onLoop(t, "late", mib)
	late.want("state valid")
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	late.want("state invalid " + reason)
	late.tell("restart")
	late.want("state valid")
}
