// SPDX-License-Identifier: BSD-2-Clause

package snapshot

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/dsync-backup/dsync-backup/kernel"
)

// claims is a History that saw nothing and is sure of it, of a device of any
// size: what a device that changes its size at the wrong moment looks like.
type claims struct {
	size  int64
	epoch uint64
	uuid  kernel.UUID
}

func (c *claims) Status(context.Context) (kernel.Status, error) {
	return kernel.Status{UUID: c.uuid, Epoch: c.epoch + 1, Reliable: true}, nil
}

func (c *claims) Rotate(context.Context) (kernel.Epoch, error) {
	c.epoch++
	return kernel.Epoch{
		Position: kernel.Position{Tracker: c.uuid, Epoch: c.epoch, Nonce: kernel.NewNonce()},
		Bitmap:   kernel.NewBitmap(kernel.BlocksOf(c.size)),
	}, nil
}

func (c *claims) Since(context.Context, kernel.Position) (*kernel.Bitmap, error) {
	return kernel.NewBitmap(kernel.BlocksOf(c.size)), nil
}

func (c *claims) Peek(context.Context) (*kernel.Bitmap, error) {
	return kernel.NewBitmap(kernel.BlocksOf(c.size)), nil
}
func (c *claims) Invalidate(context.Context, string) error        { return nil }
func (c *claims) Reverted(context.Context, kernel.Position) error { return nil }
func (c *claims) Restart(context.Context, string) error           { c.uuid = kernel.NewUUID(); return nil }

func (c *claims) Size() int64                  { return c.size }
func (c *claims) Commit(context.Context) error { return nil }
func (c *claims) Unlock() error                { return nil }
func (c *claims) Relock(context.Context) error { return nil }

func TestTrackerOfAnotherSizeGivesNoPosition(t *testing.T) {
	f := newImage(t, 4<<20)
	f.write(0, noise(rand.New(rand.NewPCG(7, 1)), 4<<20))
	h := &claims{size: 5 << 20, uuid: kernel.NewUUID()}
	with := func(o *Options) { o.History = h }
	s := f.backup(with)
	if s.Changes != ChangesFull || !strings.Contains(s.FallbackReason, "5242880 bytes") {
		t.Errorf("%+v", s)
	}
	f.resize(5 << 20)
	f.write(5<<20-100, []byte("grown"))
	s = f.backup(with)
	if s.Changes != ChangesCompare || s.FallbackReason == "" || !bytes.Equal(f.restored(s.SnapshotID), f.content()) {
		t.Errorf("%+v", s)
	}
	// From here on tracker, device and snapshot agree.
	if s = f.backup(with); s.Changes != ChangesTracker || s.DirtyBytes != 0 {
		t.Errorf("%+v", s)
	}
}

// TestADeviceThatGrewIsFollowed: only a tracker that keeps its history over a
// change of size gives a bitmap of the new one.
func TestADeviceThatGrewIsFollowed(t *testing.T) {
	for _, size := range []int64{4 << 20, 4<<20 + 512} {
		f := newImage(t, int(size))
		f.write(0, noise(rand.New(rand.NewPCG(8, 1)), int(size)))
		h := &claims{size: size, uuid: kernel.NewUUID()}
		with := func(o *Options) { o.History = h }
		f.backup(with)
		h.size = 4<<20 + 1<<19
		f.resize(h.size)
		f.write(4<<20, []byte("grown"))
		f.write(size, []byte("and here"))
		s := f.backup(with)
		if s.Changes != ChangesTracker || s.FallbackReason != "" || s.DirtyBytes != 1<<19 || !bytes.Equal(f.restored(s.SnapshotID), f.content()) {
			t.Errorf("grown from %d: %+v", size, s)
		}
	}
}

func TestADeviceThatShrankIsCompared(t *testing.T) {
	f := newImage(t, 5<<20)
	h := &claims{size: 5 << 20, uuid: kernel.NewUUID()}
	with := func(o *Options) { o.History = h }
	f.backup(with)
	h.size = 4 << 20
	f.resize(h.size)
	s := f.backup(with)
	if s.Changes != ChangesCompare || !strings.Contains(s.FallbackReason, "only 4194304 now") || !bytes.Equal(f.restored(s.SnapshotID), f.content()) {
		t.Errorf("%+v", s)
	}
}

// thawed is an Instant whose end fails, after which its context is over, too.
type thawed struct {
	cause  error
	cancel context.CancelFunc
}

func (*thawed) Kind() PointInTime { return PointInTimeFreeze }

func (i *thawed) Begin(ctx context.Context) (context.Context, error) {
	ctx, i.cancel = context.WithCancel(ctx)
	return ctx, nil
}

func (i *thawed) End() (time.Duration, error) {
	i.cancel()
	return time.Second, i.cause
}

func TestWhyTheEndFailedIsSaid(t *testing.T) {
	f := newImage(t, 1<<20)
	thaw := errors.New("thawed by somebody else")
	if _, err := f.try(func(o *Options) { o.Instant = &thawed{cause: thaw} }); !errors.Is(err, thaw) {
		t.Error(err)
	}
	if _, err := f.try(func(o *Options) { o.Instant = &thawed{} }); err != nil {
		t.Errorf("after a clean end: %v", err)
	}
}
