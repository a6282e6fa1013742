// SPDX-License-Identifier: BSD-2-Clause

package snapshot

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"iter"
	"time"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/repo/backend"
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
	Invalidate(ctx context.Context, reason string) error
	// Reverted wraps [epochlog.ErrReverted] if pos is of this history's UUID and
	// cannot be a position of it.
	Reverted(ctx context.Context, pos kernel.Position) error
	// Restart ends the history, which the reason says cannot be trusted, and
	// begins another.
	Restart(ctx context.Context, reason string) error
	// Size is that of the device which is tracked, in bytes.
	Size() int64
	Unlock() error
	Relock(ctx context.Context) error
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
	// Parent is the ID of the snapshot to go on from, or the beginning of it; only for
	// ChangesRanges and ChangesCompare. Empty: the newest of the device on the host.
	Parent  string
	History History // nil if nothing tracks the device
	// Broken says why History starts afresh although there was a tracker.
	Broken string

	Instant Instant
	// Precopy asks for copies of the device while it is in use, so that it
	// stands still for the last of them only. It needs a reliable History.
	Precopy *Precopy
	// SpotCheck is how many blocks, at least, are read to see whether what the
	// tracker says was not written is as it was; 0 means none.
	SpotCheck int
	SpotSeed  uint64 // picks them; 0: at random

	// Settled returns when the repository may be written to, as [repo.Lock.Settled]
	// does. nil: it may.
	Settled func(context.Context) error

	Parallel int // reads in flight; 0: device.DefaultParallel
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
	stage   *stage
	cands   []candidate
	unread  error // one of the snapshots that cannot be read: it may be of the device
	parent  *candidate
	dirty   *kernel.Bitmap
	key     SumKey
	sum     Summary
	started time.Time

	generations *Generations // of the chain

	changed   int64 // bytes that the backup's own layer describes
	forwarded int64 // bytes of new blobs that hold what was copied forward

	epoch       *kernel.Epoch // what the snapshot is complete up to, if that is known
	doubt       string        // why it is not, where there is a tracker
	rotated     uint64        // the newest epoch that this backup has ended
	uncommitted bool          // an epoch that was ended is not known to be logged

	done   int64
	total  int64
	frozen time.Duration
}

// Backup makes a snapshot of a device. The caller holds a lock on the
// repository, or one that Options.Settled makes certain, and has loaded its index since. Whatever fails,
// no snapshot is left behind (but if the lock was gone when it was saved), and no block is
// forgotten: the epochs stay in the log until a later backup has covered them.
func Backup(ctx context.Context, r *repo.Repository, o Options) (*Summary, error) {
	b := &backup{Options: o, r: r, store: Store{r}, started: time.Now()}
	if b.Warn == nil {
		b.Warn = func(error) {}
	}
	if b.Progress == nil {
		b.Progress = func(Progress) {}
	}
	if b.Parallel <= 0 {
		b.Parallel = device.DefaultParallel
	}
	if err := r.RequireWritable(); err != nil {
		return nil, err
	}
	if _, ok := o.Instant.(Snapshotter); ok && o.Precopy != nil {
		return nil, errors.New("a device of which a snapshot is made is not copied before")
	}
	var err error
	passed := func(err error) {
		b.unread = err
		b.Warn(err)
	}
	if b.cands, err = candidates(ctx, b.store, o.Name, passed); err != nil {
		return nil, err
	}
	if err := b.leaveReverted(ctx); err != nil {
		return nil, err
	}
	b.w = r.NewWriter(ctx, repo.WriterOptions{Ready: o.Settled})
	if o.Changes == ChangesFull || latest(b.cands, o.Host) == nil {
		// A new chain is to stand by itself, whatever was lost of the others. The packs
		// are listed while the device does not stand still yet.
		packs, err := r.ListFiles(ctx, backend.PackFile)
		if err != nil {
			return nil, err
		}
		b.w.BelieveOnly(packs)
	}
	b.stage = newStage(b.w, b.store)
	res, err := b.copy(ctx)
	if err == nil {
		var s *Summary
		if s, err = b.save(ctx, res); err == nil {
			return s, nil
		}
	}
	// No upload, and no index of one, may outlive the caller's lock.
	b.w.Abort()
	if b.parent != nil && layer.IsDamage(err) {
		err = fmt.Errorf("%w (snapshot %s, from which this backup goes on, is damaged: run `check`; `backup --changes full` begins a new chain)", err, b.parent.Snapshot.Str())
	}
	return nil, err
}

// plan is what the chosen source of changes asks to read, and what is left out of it.
// The device that is read may be a snapshot of the one that is backed up.
func (b *backup) plan(ctx context.Context, from *device.Device) (iter.Seq[layer.Range], layer.Expected, error) {
	size := b.Device.Size()
	whole := func(yield func(kernel.Extent) bool) {
		if size > 0 {
			yield(kernel.Extent{Length: size})
		}
	}
	if err := b.sumKey(); err != nil {
		return nil, nil, err
	}
	switch b.sum.Changes {
	case ChangesTracker:
		b.total = min(b.dirty.Count()*kernel.BlockSize, size)
		return toRead(bitmapRanges(b.dirty, size)), nil, nil
	case ChangesRanges:
		ranges := kernel.Align(append(b.Ranges, tail(b.parent.Manifest.Size, size)...), size)
		b.total = kernel.TotalLength(ranges)
		data, err := from.DataExtents(ctx)
		return withHoles(seq(ranges), data), nil, err
	}
	b.total = size
	data, err := from.DataExtents(ctx)
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

// choose decides where the changes come from, and from which snapshot to go on.
func (b *backup) choose(ctx context.Context) error {
	b.sum.Changes, b.sum.FallbackReason = b.Changes, cmp.Or(b.doubt, b.Broken)
	switch b.Changes {
	case ChangesFull:
	case ChangesRanges:
		var err error
		if b.parent, err = b.rangesParent(); err != nil {
			return err
		}
		// That the list is complete is the user's word, not the tracker's.
		b.epoch = nil
	case ChangesCompare:
		b.compare()
		if b.Parent != "" {
			var err error
			if b.parent, err = named(b.cands, b.Parent); err != nil {
				return err
			}
			b.sum.Changes = ChangesCompare
		}
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
		b.sum.FallbackReason = fmt.Sprintf("snapshot %s was made with a tracker, but nothing tracks %s now (a reboot ends tracking that was not saved): run `dsync-backup track start %s`",
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

// sumKey takes the chain's key, or draws that of a new chain.
func (b *backup) sumKey() error {
	if b.parent != nil {
		b.key = b.parent.Manifest.SumKey
		return nil
	}
	_, err := rand.Read(b.key[:])
	return err
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
