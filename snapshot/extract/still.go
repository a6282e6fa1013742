// SPDX-License-Identifier: BSD-2-Clause

package extract

import (
	"cmp"
	"context"
	"errors"
	"fmt"

	"github.com/dsync-backup/dsync-backup/snapshot"
	"github.com/dsync-backup/dsync-backup/snapshot/device"
	"github.com/dsync-backup/dsync-backup/snapshot/stream"
)

// copy makes the instant, ends the epoch, and sends what changed.
func (s *send) copy(ctx context.Context) error {
	if s.Precopy != nil {
		return s.precopy(ctx)
	}
	if snap, ok := s.Instant.(snapshot.Snapshotter); ok {
		return s.copySnapshot(ctx, snap)
	}
	return s.still(ctx, func(ctx, standing context.Context, release func() error) error {
		spans, err := s.begin(ctx, s.Device)
		if err != nil {
			return err
		}
		return s.round(ctx, device.Standing{Device: s.Device, Until: standing}, spans, release)
	})
}

// round sends the records of one round.
func (s *send) round(ctx context.Context, from device.Source, spans plan, read func() error) error {
	p := &pipe{
		from: from, w: s.w, packer: stream.NewPacker(stream.Header{ID: s.res.Stream}, s.Encoder), parallel: s.Parallel,
		abort: s.Abort,
		progress: func(n int64) {
			s.done += n
			s.Progress(snapshot.Progress{Phase: "sending", Done: min(s.done, s.total), Total: s.total})
		},
	}
	c, err := p.run(ctx, spans, read)
	if err == nil {
		s.note(c)
	}
	return err
}

// still makes the device stand still, ends the tracker's epoch, and calls fn.
// fn calls release when it does not need the device any more, and returns its
// error. Its ctx also ends when the device no longer stands still, until then.
// Nothing is written to a file between Begin and End: the epoch is logged after
// it where the log might lie on what is frozen.
func (s *send) still(ctx context.Context, fn func(ctx, standing context.Context, release func() error) error) (err error) {
	if s.History != nil {
		if err := s.History.Relock(ctx); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, s.History.Unlock()) }()
	}
	if err := s.Device.Sync(ctx); err != nil {
		return err
	}
	standing, err := s.Instant.Begin(ctx)
	if err != nil {
		return err
	}
	defer func() {
		if e := s.commit(ctx); err == nil {
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
		t, err := s.Instant.End()
		s.frozen = max(s.frozen, t)
		return err
	}
	defer func() {
		// Whatever fails once the device no longer stands still, fails because
		// of that.
		if cause := context.Cause(standing); err != nil && cause != nil && !released {
			err = cause
		}
		if e := release(); err == nil {
			err = e
		}
	}()
	if err := s.rotate(ctx); err != nil {
		return err
	}
	// The tracker's lock is not held while the target is waited for.
	if freezes(s.Instant.Kind()) {
		err = s.unlock()
	} else {
		err = s.commit(ctx)
	}
	if err != nil {
		return err
	}
	return fn(ctx, standing, release)
}

// freezes reports whether writers wait from Begin to End.
func freezes(k snapshot.PointInTime) bool {
	switch k {
	case snapshot.PointInTimeNone, snapshot.PointInTimeUnmounted, snapshot.PointInTimeReadOnly, snapshot.PointInTimeFile, snapshot.PointInTimeLVM:
		return false
	}
	return true
}

// copySnapshot reads a snapshot of the device while the device goes on.
func (s *send) copySnapshot(ctx context.Context, snap snapshot.Snapshotter) (err error) {
	defer func() {
		if e := snap.Drop(); err == nil {
			err = e
		}
	}()
	var from *device.Device
	take := func(ctx context.Context) (err error) {
		if from, err = snap.Take(ctx); err == nil && from.Size() != s.Device.Size() {
			err = fmt.Errorf("the snapshot of %s has %d bytes, not %d: the device changed its size", s.Device.Path(), from.Size(), s.Device.Size())
		}
		return err
	}
	if snap.Atomic() {
		err = s.still(ctx, func(ctx, _ context.Context, release func() error) error {
			if err := take(ctx); err != nil {
				return err
			}
			return release()
		})
	} else {
		err = s.between(ctx, take)
	}
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(snap.Watch(ctx))
	defer cancel(nil)
	spans, err := s.begin(ctx, from)
	if err != nil {
		return err
	}
	err = s.round(ctx, device.Standing{Device: from, Until: ctx}, spans, func() error { return snap.Check(ctx) })
	if cause := context.Cause(ctx); err != nil && cause != nil {
		err = cause
	}
	return err
}

// between ends an epoch before and another one after take. The target is
// complete up to the first, and what was written up to the second is sent: the
// next stream sends what was written around take once more.
func (s *send) between(ctx context.Context, take func(context.Context) error) error {
	if err := s.Device.Sync(ctx); err != nil {
		return err
	}
	if err := s.endEpoch(ctx); err != nil {
		return err
	}
	first, doubt := s.epoch, s.doubt
	if err := take(ctx); err != nil {
		return err
	}
	if err := s.endEpoch(ctx); err != nil {
		return err
	}
	if first == nil {
		s.doubt = doubt
	}
	if s.epoch != nil {
		s.epoch = first
	}
	return nil
}

// endEpoch ends the tracker's epoch and logs it, while nothing is frozen.
func (s *send) endEpoch(ctx context.Context) error {
	if s.History == nil {
		return nil
	}
	if err := s.History.Relock(ctx); err != nil {
		return err
	}
	err := s.rotate(ctx)
	return errors.Join(err, s.commit(ctx), s.History.Unlock())
}

// rotate ends the tracker's epoch. If the tracker cannot be trusted, there is
// no epoch, and the reason is in doubt.
func (s *send) rotate(ctx context.Context) error {
	s.epoch, s.doubt = nil, ""
	if s.History == nil {
		return nil
	}
	e, err := s.History.Rotate(ctx)
	if err != nil {
		return fmt.Errorf("end the tracker's epoch: %w", err)
	}
	s.uncommitted = true
	st, err := s.History.Status(ctx)
	if err != nil {
		return fmt.Errorf("ask the tracker for its status: %w", err)
	}
	if !st.Reliable {
		s.doubt = cmp.Or(st.Reason, "the tracker is not reliable")
		return nil
	}
	if size := s.History.Size(); size != s.Device.Size() {
		s.doubt = fmt.Sprintf("the tracker watches a device of %d bytes, but %d were there when %s was opened", size, s.Device.Size(), s.Device.Path())
		return nil
	}
	s.epoch = &e
	return nil
}

func (s *send) unlock() error {
	if s.History == nil {
		return nil
	}
	return s.History.Unlock()
}

// commit makes the ended epoch durable, also when the rest failed or was
// interrupted.
func (s *send) commit(ctx context.Context) error {
	h := s.History
	if h == nil || !s.uncommitted {
		return nil
	}
	ctx = context.WithoutCancel(ctx)
	if err := h.Relock(ctx); err != nil {
		return err
	}
	err := h.Commit(ctx)
	s.uncommitted = err != nil
	return errors.Join(err, h.Unlock())
}
