// SPDX-License-Identifier: BSD-2-Clause

package fingerprint

import (
	"context"
	"errors"
	"os"
	"strings"
	"testing"
)

// logOf finds the superblock of an image, the start of its log and the head in
// blocks of 512 bytes.
func logOf(t *testing.T, i image) (sb xfsSuper, head int64) {
	t.Helper()
	f, err := os.Open(i.path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, headSize)
	if _, err := f.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	sb = parseXFS(span{0, i.size()}, b)
	w := &walker{ctx: context.Background(), src: ReaderAt(f), left: maxRead}
	if head, err = w.logHead(sb.log.off, sb.log.len/logBlock); err != nil || sb.ok != "" {
		t.Fatal(sb.ok, err)
	}
	return sb, head
}

// TestXFSBytesThatCount flips single bytes: in every allocation group's headers,
// before the head of the log, and behind it as far as a mount writes.
func TestXFSBytesThatCount(t *testing.T) {
	base := made(t, "mkfs.xfs", "-q")
	before := base.take(Key{})
	sb, head := logOf(t, base)
	var offs []int64
	for g := range sb.groups {
		for sector := range int64(4) {
			offs = append(offs, g*sb.group+sector*sb.sector+300)
		}
	}
	at := sb.log.off + head*logBlock
	offs = append(offs, at-1, at-600, at+20, at+logBlock+5, at+1<<20+7, at+logStale-1)
	for _, off := range offs {
		old := base.flip(off)
		if err := before.Compare(base.take(Key{})); err == nil {
			t.Errorf("byte %d was not seen", off)
		}
		base.write(old, off)
	}
	if err := before.Compare(base.take(Key{})); err != nil {
		t.Error(err)
	}
}

// TestXFSUnmountRecord needs every mark of the record: a log that ends in
// anything else must be replayed, which writes.
func TestXFSUnmountRecord(t *testing.T) {
	base := made(t, "mkfs.xfs", "-q")
	sb, head := logOf(t, base)
	at := sb.log.off + head*logBlock
	// The record is one block of header and one of body.
	for name, w := range map[string]struct {
		off  int64
		with string
	}{
		"flag":       {at - logBlock + opFlags, "\x00"},
		"operations": {at - 2*logBlock + 43, "\x02"},
		"length":     {at - 2*logBlock + 12, "\x00\x00\x04\x00"},
		"UUID":       {at - 2*logBlock + 304, "\xff\x00\xff"},
		"header":     {at - 2*logBlock, "\x00"},
	} {
		t.Run(name, func(t *testing.T) {
			c := base.copy()
			c.write([]byte(w.with), w.off)
			if err := c.take(Key{}).Proof(); !errors.Is(err, ErrNoProof) {
				t.Errorf("%v", err)
			}
		})
	}
	t.Run("log in use", func(t *testing.T) {
		left := cut("rw", func(t *testing.T, dir string) {
			remove1(t, dir)
			run(t, "sync", "-f", dir)
		})(t, base)
		if d := doubtOf(t, left); !strings.Contains(d, "was not unmounted cleanly") {
			t.Errorf("%q", d)
		}
	})
}
