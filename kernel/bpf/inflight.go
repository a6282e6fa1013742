// SPDX-License-Identifier: BSD-2-Clause

package bpf

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel"
)

// syncCaches writes out the dirty pages of the device's own page cache, and of
// those that a partition and its disk have beside it. Under a frozen file
// system there are none, so that it does not wait for the thaw. It flushes no
// drive's cache, as fsync would: a read of the device sees what is in that, and
// a flush waits behind whatever the driver is stuck on.
func syncCaches(t target) error {
	for i, node := range t.nodes() {
		f, err := os.Open(node)
		if i > 0 && (errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENXIO)) {
			continue // no node, so nobody writes by it
		}
		if err != nil {
			return fmt.Errorf("sync page cache of %s: %w", node, err)
		}
		const flags = unix.SYNC_FILE_RANGE_WAIT_BEFORE | unix.SYNC_FILE_RANGE_WRITE | unix.SYNC_FILE_RANGE_WAIT_AFTER
		err = unix.SyncFileRange(int(f.Fd()), 0, 0, flags)
		if err := errors.Join(err, f.Close()); err != nil {
			return fmt.Errorf("sync page cache of %s: %w", node, err)
		}
	}
	return nil
}

// carryOver marks in a new epoch's bitmap what is in flight at its beginning:
// such a write was marked when it was issued, in the epoch that has ended, and
// may change the device at any time until it completes.
func (t *Tracker) carryOver(bits *ebpf.Map) error {
	marks := kernel.NewBitmap(t.target.blocks())
	// Reading in batches walks the table bucket by bucket under each bucket's
	// lock, so that an entry which stays in it is never passed over.
	var (
		cursor ebpf.MapBatchCursor
		keys   = make([]uint64, t.inflightMap().MaxEntries())
		spans  = make([]objectSpan, len(keys))
	)
	for {
		n, err := t.inflightMap().BatchLookup(&cursor, keys, spans, nil)
		if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("read the writes in flight: %w", err)
		}
		for _, span := range spans[:n] {
			if span.Done == 0 {
				t.markSpan(marks, span)
			}
		}
		if err != nil {
			return mark(bits, marks)
		}
	}
}

func (t *Tracker) markSpan(b *kernel.Bitmap, span objectSpan) {
	start := max(span.Start, t.target.start)
	end := min(span.End, t.target.start+t.target.sectors)
	if start < end {
		const perBlock = kernel.BlockSize / sectorSize
		b.SetRange(int64((start-t.target.start)/perBlock), int64((end-1-t.target.start)/perBlock))
	}
}

// settled reports whether no write that was issued before the start is in
// flight any more, and looks again if that is not known yet.
func (t *Tracker) settled() (bool, error) {
	var known uint64
	if err := t.settledMap().Lookup(uint32(0), &known); err != nil {
		return false, fmt.Errorf("read whether tracking has settled: %w", err)
	}
	if known == 1 || t.writesInFlight() != 0 {
		return known == 1, nil
	}
	// A request counts as in flight a moment after its tracepoint. One that
	// slips through between two looks is a stranger to the programs when it
	// completes, which makes the tracker unreliable.
	time.Sleep(settleGap)
	if t.writesInFlight() != 0 {
		return false, nil
	}
	if err := t.settledMap().Put(uint32(0), uint64(1)); err != nil {
		return false, fmt.Errorf("note that tracking has settled: %w", err)
	}
	return true, nil
}

const settleGap = 20 * time.Millisecond

// waitSettled waits until tracking has settled or the time is up, which is no
// error: see [Options].
func (t *Tracker) waitSettled(ctx context.Context) error {
	for {
		ok, err := t.settled()
		if ok || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(time.Millisecond):
		}
	}
}

// writesInFlight counts the writes that the whole disk's driver holds, or is
// negative if that is not known.
func (t *Tracker) writesInFlight() int64 {
	switch {
	case t.target.mapped:
		if readText(t.target.sysfs("dm/suspended")) != "0" {
			return -1 // what waits for the resume is not counted
		}
	case readText(t.target.sysfs("queue/iostats")) != "1":
		return -1 // it does not count
	}
	var reads, writes int64
	if n, _ := fmt.Fscan(strings.NewReader(readText(t.target.sysfs("inflight"))), &reads, &writes); n != 2 {
		return -1
	}
	return writes
}
