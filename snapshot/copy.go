// SPDX-License-Identifier: BSD-2-Clause

package snapshot

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"

	"github.com/dsync-backup/dsync-backup/snapshot/blocksum"
	"github.com/dsync-backup/dsync-backup/snapshot/device"
	"github.com/dsync-backup/dsync-backup/snapshot/layer"
)

// copy makes the instant, ends the epoch, and stores what changed.
func (b *backup) copy(ctx context.Context) (layer.Result, error) {
	if b.Precopy != nil {
		return b.precopy(ctx)
	}
	b.sum.Rounds = 1
	if s, ok := b.Instant.(Snapshotter); ok {
		return b.copySnapshot(ctx, s)
	}
	var res layer.Result
	err := b.still(ctx, func(ctx, standing context.Context, release func() error) error {
		var err error
		res, err = b.copyFrom(ctx, device.Standing{Device: b.Device, Until: standing}, release)
		return err
	})
	return res, err
}

// copyFrom stores what changed, and calls release when all has been read. What the tracker
// says is checked beside it.
func (b *backup) copyFrom(ctx context.Context, from device.Standing, release func() error) (layer.Result, error) {
	if err := b.choose(ctx); err != nil {
		return layer.Result{}, err
	}
	if b.toBeChecked() && b.Parallel > 1 {
		res, lie, err := b.copyChecked(ctx, from, release)
		if lie == nil {
			return res, err
		}
		if err != nil {
			b.Warn(lie)
			return res, err
		}
		if err := b.distrust(lie); err != nil {
			return res, err
		}
	} else if err := b.trust(ctx, from.Device); err != nil {
		return layer.Result{}, err
	}
	ranges, expected, err := b.plan(ctx, from.Device)
	if err != nil {
		return layer.Result{}, err
	}
	o := b.layerOptions(from, ranges)
	o.Expected, o.AfterRead = expected, release
	return b.write(ctx, b.saver(), o)
}

// copyChecked copies what the tracker says is dirty, and makes a spot check meanwhile: alone
// that would only wait for the device. If the tracker lied, the layer is worth nothing, and
// release was not called.
func (b *backup) copyChecked(ctx context.Context, from device.Standing, release func() error) (res layer.Result, lie, err error) {
	ranges, _, err := b.plan(ctx, from.Device)
	if err != nil {
		return res, nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var failed error
	done, useless := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		if lie, failed = b.check(ctx, from.Device, b.besides()); lie != nil || failed != nil {
			close(useless)
		}
	}()
	o := b.layerOptions(from, func(yield func(layer.Range) bool) {
		for r := range ranges {
			select {
			case <-useless:
				return
			default:
			}
			if !yield(r) {
				return
			}
		}
	})
	o.Parallel -= b.besides()
	o.AfterRead = func() error {
		if <-done; failed != nil {
			return failed
		}
		if lie != nil {
			return nil //nolint:nilerr // an error would end the writer, which the next copy needs
		}
		return release()
	}
	res, err = b.write(ctx, b.saver(), o)
	cancel()
	<-done
	return res, lie, err
}

// still makes the device stand still, ends the tracker's epoch, and calls fn.
// fn calls release when it does not need the device any more, and returns its
// error. Its ctx also ends when the device no longer stands still, until then.
func (b *backup) still(ctx context.Context, fn func(ctx, standing context.Context, release func() error) error) (err error) {
	if b.History != nil {
		// Before the device stands still, since this may write to the log.
		if err := b.History.Relock(ctx); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, b.History.Unlock()) }()
	}
	frozen := b.Instant.Kind().freezes()
	b.r.DeferCache(frozen)
	defer b.r.DeferCache(false)
	// Direct reads see what the page cache of this very device holds, but not
	// what those of its partitions or of its disk do. What is written from now
	// on, Rotate syncs once more.
	if err := b.Device.Sync(ctx); err != nil {
		return err
	}
	standing, err := b.Instant.Begin(ctx)
	if err != nil {
		return err
	}
	// After End, so that the log may lie on the file system that was frozen.
	defer func() {
		if e := b.commit(ctx); err == nil {
			err = e
		}
	}()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stop := context.AfterFunc(standing, func() { cancel(context.Cause(standing)) })
	released := false
	release := func() error {
		stop()
		released = true
		t, err := b.Instant.End()
		b.frozen = max(b.frozen, t)
		return err
	}
	defer func() {
		// Whatever fails once the device no longer stands still, fails
		// because of that.
		if cause := context.Cause(standing); err != nil && cause != nil && !released {
			err = cause
		}
		if e := release(); err == nil {
			err = e
		}
	}()

	if err := b.rotate(ctx); err != nil {
		return err
	}
	// The tracker's lock is not held while the repository is waited for.
	// Under a freeze the log must wait, and the kernel keeps the epoch.
	if frozen {
		err = b.unlock()
	} else {
		err = b.commit(ctx)
	}
	if err != nil {
		return err
	}
	return fn(ctx, standing, release)
}

// copySnapshot reads a snapshot of the device while the device goes on.
func (b *backup) copySnapshot(ctx context.Context, s Snapshotter) (res layer.Result, err error) {
	defer func() {
		if e := s.Drop(); err == nil {
			err = e
		}
	}()
	var from *device.Device
	take := func(ctx context.Context) (err error) {
		if from, err = s.Take(ctx); err == nil && from.Size() != b.Device.Size() {
			err = fmt.Errorf("the snapshot of %s has %d bytes, not %d: the device changed its size", b.Device.Path(), from.Size(), b.Device.Size())
		}
		return err
	}
	if s.Atomic() {
		err = b.still(ctx, func(ctx, _ context.Context, release func() error) error {
			if err := take(ctx); err != nil {
				return err
			}
			return release()
		})
	} else {
		err = b.between(ctx, take)
	}
	if err != nil {
		return res, err
	}
	ctx, cancel := context.WithCancelCause(s.Watch(ctx))
	defer cancel(nil)
	res, err = b.copyFrom(ctx, device.Standing{Device: from, Until: ctx}, func() error { return s.Check(ctx) })
	if cause := context.Cause(ctx); err != nil && cause != nil {
		err = cause
	} else if err != nil {
		// A read may fail before Watch has looked why.
		if e := s.Check(ctx); e != nil {
			err = e
		}
	}
	return res, err
}

// between ends an epoch before and another one after take, and records the
// first as what the snapshot is complete up to.
func (b *backup) between(ctx context.Context, take func(context.Context) error) error {
	if err := b.Device.Sync(ctx); err != nil {
		return err
	}
	if err := b.endEpoch(ctx); err != nil {
		return err
	}
	first, doubt := b.epoch, b.doubt
	if err := take(ctx); err != nil {
		return err
	}
	if err := b.endEpoch(ctx); err != nil {
		return err
	}
	if first == nil {
		b.doubt = doubt
	}
	if b.epoch != nil {
		b.epoch = first
	}
	return nil
}

// endEpoch ends the tracker's epoch and logs it, while nothing is frozen.
func (b *backup) endEpoch(ctx context.Context) error {
	if b.History == nil {
		return nil
	}
	if err := b.History.Relock(ctx); err != nil {
		return err
	}
	err := b.rotate(ctx)
	return errors.Join(err, b.commit(ctx), b.History.Unlock())
}

// rotate ends the tracker's epoch. If the tracker cannot be trusted, there is
// no epoch, and the reason is in doubt.
func (b *backup) rotate(ctx context.Context) error {
	b.epoch, b.doubt = nil, ""
	if b.History == nil {
		return nil
	}
	e, err := b.History.Rotate(ctx)
	if err != nil {
		return fmt.Errorf("end the tracker's epoch: %w", err)
	}
	b.uncommitted, b.rotated = true, e.Position.Epoch
	// Only now is what the tracker says of itself about the whole epoch.
	st, err := b.History.Status(ctx)
	if err != nil {
		return fmt.Errorf("ask the tracker for its status: %w", err)
	}
	if !st.Reliable {
		b.doubt = cmp.Or(st.Reason, "the tracker is not reliable")
		return nil
	}
	if size := b.History.Size(); size != b.Device.Size() {
		b.doubt = fmt.Sprintf("the tracker watches a device of %d bytes, but %d were there when %s was opened", size, b.Device.Size(), b.Device.Path())
		return nil
	}
	b.epoch = &e
	return nil
}

func (b *backup) unlock() error {
	if b.History == nil {
		return nil
	}
	return b.History.Unlock()
}

// commit makes the ended epoch durable and lets the next backup of the device
// have the tracker. It is done even when the backup failed or was interrupted.
func (b *backup) commit(ctx context.Context) error {
	h := b.History
	if h == nil || !b.uncommitted {
		return nil
	}
	ctx = context.WithoutCancel(ctx)
	if err := h.Relock(ctx); err != nil {
		return err
	}
	err := h.Commit(ctx)
	b.uncommitted = err != nil
	return errors.Join(err, h.Unlock())
}

// layerOptions are those that every copy of a backup has in common.
func (b *backup) layerOptions(from device.Source, ranges iter.Seq[layer.Range]) layer.Options {
	return layer.Options{
		Source: from, Size: b.Device.Size(), Ranges: ranges, Key: (*blocksum.Key)(&b.key),
		Polynomial: b.r.ChunkerPolynomial(), Parallel: b.Parallel, Time: b.Time,
		Progress: func(n int64) {
			b.done += n
			b.Progress(Progress{"reading", b.done, b.total})
		},
	}
}

// saver takes the layer of a backup that makes one copy. A layer that follows
// others may be merged with them before it is stored.
func (b *backup) saver() layer.Saver {
	if b.parent == nil {
		return b.w
	}
	return b.stage
}
