// SPDX-License-Identifier: BSD-2-Clause

package restore

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/snapshot/device"
)

// zeroSlice is how much is zeroed at a time, so that progress is seen and an
// interruption is heard.
const zeroSlice = 64 << 20

// The ways to zero a range, each tried when the one before it is not possible
// on the target. All of them leave a range that reads as zeros: a block
// device's PUNCH_HOLE is the kernel's "write zeroes, and unmap if that keeps
// them zeros", not a discard (block/fops.c, blkdev_fallocate).
const (
	zeroPunch int32 = iota // free the space
	zeroRange              // keep it
	zeroWrite              // write zeros
)

// zero makes whole blocks read as zeros. It may be called from many
// goroutines.
func (t *target) zero(ctx context.Context, e kernel.Extent) error {
	if t.sparse {
		return nil
	}
	t.touched.Store(true)
	for {
		way := t.zeroing.Load()
		var err error
		switch way {
		case zeroPunch:
			err = t.fallocate(unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, e)
		case zeroRange:
			err = t.fallocate(unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, e)
		default:
			return t.writeZeros(ctx, e)
		}
		switch {
		case err == nil:
			return nil
		case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENODEV):
			t.zeroing.CompareAndSwap(way, way+1)
		default:
			return fmt.Errorf("zero bytes %d to %d: %w", e.Offset, e.End()-1, err)
		}
	}
}

func (t *target) fallocate(mode uint32, e kernel.Extent) error {
	rc, err := t.blocks.SyscallConn()
	if err != nil {
		return err
	}
	ctlErr := rc.Control(func(fd uintptr) {
		for {
			if err = unix.Fallocate(int(fd), mode, e.Offset, e.Length); !errors.Is(err, unix.EINTR) {
				return
			}
		}
	})
	return errors.Join(ctlErr, err)
}

func (t *target) writeZeros(ctx context.Context, e kernel.Extent) error {
	buf := device.AlignedBuffer(int(min(e.Length, batchBytes)))
	for e.Length > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		n := min(e.Length, int64(len(buf)))
		if err := t.write(buf[:n], e.Offset); err != nil {
			return err
		}
		e.Offset, e.Length = e.Offset+n, e.Length-n
	}
	return nil
}
