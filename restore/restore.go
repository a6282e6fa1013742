// SPDX-License-Identifier: BSD-2-Clause

package restore

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/snapshot"
	"github.com/dsync-backup/dsync-backup/snapshot/blocksum"
	"github.com/dsync-backup/dsync-backup/snapshot/device"
	"github.com/dsync-backup/dsync-backup/snapshot/layer"
)

// Changes says what of a device is written.
type Changes string

// The ways. The zero value is ChangesAuto.
const (
	// ChangesAuto compares if the target holds data already.
	ChangesAuto Changes = "auto"
	// ChangesAll writes everything, without reading the target.
	ChangesAll Changes = "all"
	// ChangesCompare reads the target first and writes what differs.
	ChangesCompare Changes = "compare"
)

// ParseChanges reads the name of a way.
func ParseChanges(s string) (Changes, error) {
	switch c := Changes(s); c {
	case ChangesAuto, ChangesAll, ChangesCompare:
		return c, nil
	case "":
		return ChangesAuto, nil
	}
	return "", fmt.Errorf("changes %q is not one of auto, all, compare", s)
}

// Options say what to restore and where. Device and Target must be set.
type Options struct {
	Device snapshot.Device
	// Target is a block device, at least as large as the snapshot's, or a
	// file, which gets exactly its size and is made if it does not exist. It
	// must not be in use.
	Target  string
	Changes Changes
	Verify  bool // read it back and compare
	Force   bool // overwrite a target that holds data
	// Salvage writes what there is of a snapshot whose packs are damaged or
	// missing, instead of refusing it. The error names what there is not.
	Salvage  bool
	Parallel int // writes, and reads to compare, in flight; 0 means 8
	Progress func(Progress)

	limits limits // zero: restoreLimits
}

// Result is what `restore --json` says at the end. Sizes are in bytes; the
// first three add up to the size of the snapshot's device.
type Result struct {
	MessageType     string  `json:"message_type"` // "summary"
	SnapshotID      repo.ID `json:"snapshot_id"`
	Target          string  `json:"target"`
	BytesWritten    int64   `json:"bytes_written"` // data
	BytesSkipped    int64   `json:"bytes_skipped"` // were there already
	BytesZeroed     int64   `json:"bytes_zeroed"`  // by holes where that is possible
	BytesFetched    int64   `json:"bytes_fetched"` // data blobs as stored
	DurationSeconds float64 `json:"duration_seconds"`
}

// restore is one run.
type restore struct {
	Options
	chain  *chain
	target *target
	fetch  *fetcher
	w      *writer
	told   *progress
	result Result

	mu    sync.Mutex
	bad   rangeSet
	cause error // of the first of them
}

// Restore writes a snapshot's device to a target. Bytes of a larger target
// behind the snapshot's end are left alone. Errors on which callers decide:
// [device.ErrInUse], [ErrTooSmall], [ErrHasData], [layer.ErrDamaged] (a
// [DamageError] names the ranges), a [DifferError]. Only one that is
// [ErrIncomplete] comes after the target was touched, or a DifferError. Damage
// that only reading shows does not end the restore: the rest is written, and
// the damaged ranges keep what the target held (in an emptied file: zeros); with
// Salvage so does damage that shows before.
func Restore(ctx context.Context, store snapshot.Store, o Options) (_ *Result, err error) {
	started := time.Now()
	r := &restore{Options: o}
	defer func() {
		if err != nil {
			err = fmt.Errorf("restore to %s: %w", o.Target, err)
		}
	}()
	if r.Changes, err = ParseChanges(string(o.Changes)); err != nil {
		return nil, err
	}
	if r.limits == (limits{}) {
		r.limits = restoreLimits()
	}
	if err := r.open(ctx, store); err != nil {
		if r.target != nil {
			_ = r.target.close() // nothing was written
		}
		return nil, err
	}
	if err = r.write(ctx); err != nil && r.target.touched.Load() {
		err = fmt.Errorf("%w: %w", err, ErrIncomplete)
	}
	if err == nil && o.Verify {
		err = r.verify(ctx) // while nobody else can claim it
	}
	if closeErr := r.target.close(); err == nil {
		err = closeErr
	}
	if err != nil {
		return nil, err
	}
	r.result.MessageType, r.result.SnapshotID, r.result.Target = "summary", o.Device.Snapshot, r.target.path
	r.result.DurationSeconds = time.Since(started).Seconds()
	return &r.result, nil
}

// open looks at target and snapshot and changes nothing.
func (r *restore) open(ctx context.Context, store snapshot.Store) error {
	size := r.Device.Manifest.Size
	t, err := inspect(ctx, r.Target, size, store.Location(), r.Force)
	if err != nil {
		return err
	}
	if r.Changes == ChangesAuto {
		r.Changes = ChangesAll
		if t.holds != "" {
			r.Changes = ChangesCompare
		}
	}
	r.target = t
	if err := t.claim(); err != nil {
		return err
	}
	if r.chain, err = openChain(ctx, store, r.Device); err == nil {
		err = r.chain.check(ctx)
	}
	if lost := (*DamageError)(nil); r.Salvage && errors.As(err, &lost) {
		r.cause, err = lost.Cause, nil
	}
	if err != nil {
		return fmt.Errorf("check snapshot %s: %w", r.Device.Snapshot.Str(), err)
	}
	return nil
}

// write brings the target to what the snapshot holds.
func (r *restore) write(ctx context.Context) error {
	size := r.chain.size()
	if err := r.target.prepare(size, r.Changes == ChangesCompare); err != nil {
		return err
	}
	r.told = newProgress(PhaseRestoring, size, r.Progress)
	r.bad.size = size
	r.fetch = newFetcher(r.chain)
	r.fetch.bad = r.lost
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	r.w = startWriter(ctx, cancel, r.target, size, r.Parallel, r.fetch.parallel, r.told.add)
	r.transfer(ctx, cancel)
	if err := r.w.finish(ctx); err != nil {
		return err
	}
	r.result.BytesWritten, r.result.BytesZeroed = r.w.written.Load(), r.w.zeroed.Load()
	r.result.BytesFetched = r.fetch.bytes.Load()
	if lost := r.bad.list(); len(lost) > 0 {
		return &DamageError{lost, r.cause}
	}
	if n := r.result.BytesWritten + r.result.BytesSkipped + r.result.BytesZeroed; n != size {
		return fmt.Errorf("%d bytes were dealt with, the device has %d: this is a fault of the program", n, size)
	}
	return nil
}

// transfer plans windows and executes them, the next one being planned
// meanwhile. The first error cancels.
func (r *restore) transfer(ctx context.Context, cancel context.CancelCauseFunc) {
	windows := make(chan *window)
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		defer close(windows)
		b := &builder{lim: r.limits, size: r.chain.size(), emit: func(w *window) error {
			select {
			case windows <- w:
				return nil
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}}
		if r.Salvage {
			b.missing = r.lose
		}
		if err := r.plan(ctx, b); err != nil {
			cancel(err)
		}
	})
	for w := range windows {
		if err := r.execute(ctx, w); err != nil {
			cancel(err)
			return
		}
	}
}

// plan gives the builder what is to be written: everything, or what a scan of
// the target finds to differ.
func (r *restore) plan(ctx context.Context, b *builder) error {
	m := r.chain.merger()
	s := &selector{next: func() (layer.Piece, error) { return m.Next(ctx) }}
	if r.Changes == ChangesAll {
		if err := s.each(kernel.Extent{Length: r.chain.size()}, b.add); err != nil {
			return err
		}
		return b.flush()
	}
	d, err := device.Open(r.target.path, device.Options{})
	if err != nil {
		return err
	}
	key := blocksum.Key(r.Device.Manifest.SumKey)
	expected := r.chain.sums(ctx)
	expected.Damaged = isDamage // what has no sums is written
	c := &scan{
		device: d, size: r.chain.size(), key: &key, expected: expected, parallel: r.Parallel,
		found: func(e kernel.Extent, same bool) error {
			if same {
				r.result.BytesSkipped += e.Length
				r.told.add(e.Length)
				return nil
			}
			return s.each(e, b.add)
		},
	}
	err = c.run(ctx)
	if closeErr := d.Close(); err == nil {
		err = closeErr
	}
	if err != nil {
		return err
	}
	return b.flush()
}

// execute fetches and writes a window.
func (r *restore) execute(ctx context.Context, w *window) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		for _, run := range w.runs {
			if run.zero {
				if err := r.w.zeros(ctx, run.Extent); err != nil {
					return err
				}
			}
		}
		return nil
	})
	g.Go(func() error { return r.writeBlobs(ctx, w) })
	if err := g.Wait(); err != nil {
		return err
	}
	// A window ends at a whole block, so that nothing else can complete these.
	for _, e := range r.w.abandon() {
		r.lose(e, fmt.Errorf("a part of it is missing: %w", layer.ErrDamaged))
	}
	return nil
}

// lost notes a blob that cannot be had. The rest goes on.
func (r *restore) lost(segs []segment, err error) error {
	for _, s := range segs {
		r.lose(s.extent(), err)
	}
	return nil
}

func (r *restore) lose(e kernel.Extent, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.cause == nil {
		r.cause = err
	}
	r.bad.add(e)
}

// verify reads the target back.
func (r *restore) verify(ctx context.Context) error {
	differ, err := r.chain.verify(ctx, r.target.path, r.Parallel, r.Progress)
	if err != nil {
		return fmt.Errorf("read it back (it was written): %w", err)
	}
	if len(differ) > 0 {
		return &DifferError{r.target.path, differ}
	}
	return nil
}
