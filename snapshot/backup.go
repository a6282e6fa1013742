// SPDX-License-Identifier: BSD-2-Clause

package snapshot

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"iter"
	"time"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/snapshot/blocksum"
	"github.com/dsync-backup/dsync-backup/snapshot/device"
	"github.com/dsync-backup/dsync-backup/snapshot/layer"
)

// History is a tracker together with its epoch log, as package epochlog makes
// one. It comes unlocked.
type History interface {
	Status(ctx context.Context) (kernel.Status, error)
	Rotate(ctx context.Context) (kernel.Epoch, error)
	Commit(ctx context.Context) error
	Since(ctx context.Context, pos kernel.Position) (*kernel.Bitmap, error)
	Peek(ctx context.Context) (*kernel.Bitmap, error)
	// Size is that of the device which is tracked, in bytes.
	Size() int64
	Unlock() error
	Relock(ctx context.Context) error
}

// Instant makes the device stand still while it is read.
type Instant interface {
	// Kind is how.
	Kind() PointInTime
	// Begin makes it stand still. The context that it returns ends, with the
	// cause, when the device no longer does. From Begin to End nothing may be
	// written to a file system but through the repository's backend.
	Begin(ctx context.Context) (context.Context, error)
	// End lets it go and says for how long it stood still. It may be called
	// again, and then does nothing.
	End() (time.Duration, error)
}

// Options say what to back up and how. Device, Name and Instant must be set.
type Options struct {
	Device *device.Device
	Name   string // absolute; the device's path in the snapshot
	Host   string
	Tags   []string // beside Tag
	Time   time.Time
	User   User

	// Changes asks for a source: ChangesTracker needs History, ChangesRanges
	// needs Ranges. Empty takes the tracker if there is History, else a
	// compare scan if there is something to compare with, else everything.
	Changes Changes
	Ranges  []kernel.Extent // aligned by kernel.Align
	History History         // nil if nothing tracks the device
	// Broken says why History starts afresh although there was a tracker.
	Broken string

	Instant  Instant
	Parallel int
	Progress func(Progress)
	Warn     func(error)
}

// User is whom a snapshot names as its maker.
type User struct {
	Name     string
	UID, GID uint32
}

// Progress tells how far a backup is.
type Progress struct {
	Phase string // "reading", "storing"
	Done  int64  // bytes of the ranges that the backup deals with
	Total int64
}

// backup is one run.
type backup struct {
	Options
	r       *repo.Repository
	store   Store
	w       *repo.Writer
	cands   []candidate
	parent  *candidate
	dirty   *kernel.Bitmap
	epoch   *kernel.Epoch
	sum     Summary
	started time.Time

	committed bool // the ended epoch is in the log
	done      int64
	total     int64
	frozen    time.Duration
}

// Backup makes a snapshot of a device. The caller holds a lock on the
// repository and has loaded its index since. Whatever fails, no snapshot is
// left behind, and no block is forgotten: the epochs stay in the log until a
// later backup has covered them.
func Backup(ctx context.Context, r *repo.Repository, o Options) (*Summary, error) {
	b := &backup{Options: o, r: r, store: Store{r}, started: time.Now()}
	if b.Warn == nil {
		b.Warn = func(error) {}
	}
	if b.Progress == nil {
		b.Progress = func(Progress) {}
	}
	if err := r.RequireWritable(); err != nil {
		return nil, err
	}
	var err error
	if b.cands, err = candidates(ctx, b.store, o.Name, b.Warn); err != nil {
		return nil, err
	}
	b.w = r.NewWriter(ctx, repo.WriterOptions{})
	res, key, err := b.copy(ctx)
	if err == nil {
		var s *Summary
		if s, err = b.save(ctx, res, key); err == nil {
			return s, nil
		}
	}
	// No upload, and no index of one, may outlive the caller's lock.
	b.w.Abort()
	return nil, err
}

// copy makes the instant, ends the epoch, and stores what changed.
func (b *backup) copy(ctx context.Context) (res layer.Result, key SumKey, err error) {
	still := b.Instant.Kind() == PointInTimeFreeze
	if b.History != nil {
		// Before the device stands still, since this may write to the log.
		if err := b.History.Relock(ctx); err != nil {
			return res, key, err
		}
		defer func() { err = errors.Join(err, b.History.Unlock()) }()
	}
	b.r.DeferCache(still)
	defer b.r.DeferCache(false)
	// Direct reads see what the page cache of this very device holds, but not
	// what those of its partitions or of its disk do. What is written from now
	// on, Rotate syncs once more.
	if err := b.Device.Sync(ctx); err != nil {
		return res, key, err
	}
	standing, err := b.Instant.Begin(ctx)
	if err != nil {
		return res, key, err
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
		return res, key, err
	}
	// The tracker's lock is not held while the repository is waited for.
	// Under a freeze the log must wait, and the kernel keeps the epoch.
	if still {
		err = b.unlock()
	} else {
		err = b.commit(ctx)
	}
	if err != nil {
		return res, key, err
	}
	ranges, expected, err := b.plan(standing)
	if err != nil {
		return res, key, err
	}
	if key, err = b.sumKey(); err != nil {
		return res, key, err
	}
	res, err = layer.Write(ctx, b.w, layer.Options{
		Source: source{b.Device, standing}, Size: b.Device.Size(), Ranges: ranges, Key: (*blocksum.Key)(&key),
		Polynomial: b.r.ChunkerPolynomial(), Parallel: b.Parallel, Time: b.Time, Expected: expected,
		Progress: func(n int64) {
			b.done += n
			b.Progress(Progress{"reading", b.done, b.total})
		},
		AfterRead: release,
	})
	return res, key, err
}

// rotate ends the tracker's epoch. A tracker that cannot be trusted leaves the
// snapshot without a position, and the reason in the summary.
func (b *backup) rotate(ctx context.Context) error {
	b.sum.FallbackReason = b.Broken
	if b.History == nil {
		return nil
	}
	e, err := b.History.Rotate(ctx)
	if err != nil {
		return fmt.Errorf("end the tracker's epoch: %w", err)
	}
	// Only now is what the tracker says of itself about the whole epoch.
	st, err := b.History.Status(ctx)
	if err != nil {
		return fmt.Errorf("ask the tracker for its status: %w", err)
	}
	if !st.Reliable {
		b.sum.FallbackReason = st.Reason
		return nil
	}
	if size := b.History.Size(); size != b.Device.Size() {
		b.sum.FallbackReason = fmt.Sprintf("the tracker watches a device of %d bytes, but %d were there when %s was opened", size, b.Device.Size(), b.Device.Path())
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

// source reads the device only while it stands still.
type source struct {
	*device.Device
	standing context.Context //nolint:containedctx // as long as one Instant
}

// ReadExtent implements [layer.Source].
func (s source) ReadExtent(ctx context.Context, p []byte, off int64) error {
	if err := context.Cause(s.standing); err != nil {
		return err
	}
	return s.Device.ReadExtent(ctx, p, off)
}

// Buffer implements [layer.Source].
func (s source) Buffer(n int) []byte { return device.AlignedBuffer(n) }

// commit makes the ended epoch durable and lets the next backup of the device
// have the tracker. It is done even when the backup failed or was interrupted.
func (b *backup) commit(ctx context.Context) error {
	h := b.History
	if h == nil || b.committed {
		return nil
	}
	ctx = context.WithoutCancel(ctx)
	if err := h.Relock(ctx); err != nil {
		return err
	}
	err := h.Commit(ctx)
	b.committed = err == nil
	return errors.Join(err, h.Unlock())
}

// plan decides where the changes come from, and from which snapshot to go on.
func (b *backup) plan(ctx context.Context) (iter.Seq[layer.Range], layer.Expected, error) {
	size := b.Device.Size()
	whole := func(yield func(kernel.Extent) bool) {
		if size > 0 {
			yield(kernel.Extent{Length: size})
		}
	}
	if err := b.choose(ctx); err != nil {
		return nil, nil, err
	}
	switch b.sum.Changes {
	case ChangesTracker:
		b.total = min(b.dirty.Count()*kernel.BlockSize, size)
		return toRead(bitmapRanges(b.dirty, size)), nil, nil
	case ChangesRanges:
		ranges := kernel.Align(append(b.Ranges, tail(b.parent.Manifest.Size, size)...), size)
		b.total = kernel.TotalLength(ranges)
		data, err := b.Device.DataExtents(ctx)
		return withHoles(seq(ranges), data), nil, err
	}
	b.total = size
	data, err := b.Device.DataExtents(ctx)
	if err != nil {
		return nil, nil, err
	}
	if b.sum.Changes == ChangesFull {
		return withHoles(whole, data), nil, nil
	}
	layers, err := layer.Open(ctx, b.store, b.parent.Manifest.Layers)
	if err != nil {
		return nil, nil, fmt.Errorf("compare with snapshot %s: %w", b.parent.Snapshot.Str(), err)
	}
	return withHoles(whole, data), layer.NewSums(ctx, b.store, layers, b.parent.Manifest.Size, size), nil
}

// choose sets the source of changes and the parent.
func (b *backup) choose(ctx context.Context) error {
	b.sum.Changes = b.Changes
	switch b.Changes {
	case ChangesFull:
	case ChangesRanges:
		if b.parent = latest(b.cands, b.Host); b.parent == nil {
			return fmt.Errorf("no snapshot of %s on host %s to apply changed ranges to: make one with --changes full first", b.Name, b.Host)
		}
		// That the list is complete is the user's word, not the tracker's.
		b.epoch = nil
	case ChangesCompare:
		b.compare()
	default:
		b.follow(ctx)
		return nil
	}
	if b.sum.FallbackReason != "" {
		b.Warn(fmt.Errorf("tracking of %s started afresh: %s", b.Device.Path(), b.sum.FallbackReason))
		b.sum.FallbackReason = ""
	}
	return nil
}

// follow goes on from the tracker's position, if any snapshot has one that can
// be bridged, and falls back to a compare scan.
func (b *backup) follow(ctx context.Context) {
	if b.epoch != nil {
		var reason string
		b.parent, b.dirty, reason = bridge(ctx, b.cands, b.History, b.epoch.Position, b.Device.Size())
		if b.parent != nil {
			b.sum.Changes, b.sum.FallbackReason = ChangesTracker, ""
			return
		}
		if b.sum.FallbackReason == "" {
			b.sum.FallbackReason = reason
		}
	}
	b.compare()
	if b.History == nil && b.sum.FallbackReason == "" && b.parent != nil && b.parent.Manifest.Position != nil {
		b.sum.FallbackReason = fmt.Sprintf("snapshot %s was made with a tracker, but nothing tracks %s now (a reboot ends tracking): run `dsync-backup track start %s`",
			b.parent.Snapshot.Str(), b.Device.Path(), b.Device.Path())
	}
}

// compare goes on from the newest snapshot, or from nothing.
func (b *backup) compare() {
	b.sum.Changes = ChangesCompare
	if b.parent = latest(b.cands, b.Host); b.parent == nil {
		b.sum.Changes = ChangesFull
	}
}

func (b *backup) sumKey() (SumKey, error) {
	if b.parent != nil {
		return b.parent.Manifest.SumKey, nil
	}
	var key SumKey
	_, err := rand.Read(key[:])
	return key, err
}

// tail is what a device that changed its size has beyond what the older and
// the newer one have in common, its last short block included.
func tail(before, now int64) []kernel.Extent {
	if from := min(before, now) / kernel.BlockSize * kernel.BlockSize; before != now && from < now {
		return []kernel.Extent{{Offset: from, Length: now - from}}
	}
	return nil
}

func seq(extents []kernel.Extent) iter.Seq[kernel.Extent] {
	return func(yield func(kernel.Extent) bool) {
		for _, e := range extents {
			if !yield(e) {
				return
			}
		}
	}
}
