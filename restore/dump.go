// SPDX-License-Identifier: BSD-2-Clause

package restore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/snapshot"
)

// DumpOptions say what to dump. Device must be set.
type DumpOptions struct {
	Device   snapshot.Device
	Progress func(Progress)
	// Salvage writes zeros where the repository cannot give the bytes, and
	// goes on. The error at the end names these ranges.
	Salvage bool

	limits limits // zero: dumpLimits
}

// staged is a window with its data, in device order.
type staged struct {
	*window
	data []byte
}

// dump is one run.
type dump struct {
	DumpOptions
	chain *chain
	fetch *fetcher
	free  chan []byte
	ready chan staged

	mu   sync.Mutex
	lost rangeSet
	why  error // of the first of them
}

// lose notes ranges that cannot be given; unless they may be left out, that is
// the error.
func (d *dump) lose(cause error, extents ...kernel.Extent) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.why == nil {
		d.why = cause
	}
	for _, e := range extents {
		d.lost.add(e)
	}
	if d.Salvage {
		return nil
	}
	return &DamageError{d.lost.list(), d.why}
}

// Dump writes the bytes of a snapshot's device to a stream, in order, and
// fetches ahead. Nothing is written before the snapshot's metadata has been
// checked; of data, nothing that was not checked. Unless it salvages, it ends at
// the first error,
// after which the stream holds the beginning of the device: the number of
// bytes that were written is returned. Damage is a [DamageError].
func Dump(ctx context.Context, store snapshot.Store, out io.Writer, o DumpOptions) (n int64, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("dump snapshot %s: %w", o.Device.Snapshot.Str(), err)
		}
	}()
	d := &dump{DumpOptions: o, free: make(chan []byte, 2), ready: make(chan staged)}
	if d.limits == (limits{}) {
		d.limits = dumpLimits()
	}
	if d.chain, err = openChain(ctx, store, o.Device); err != nil {
		return 0, err
	}
	size := d.chain.size()
	d.lost.size = size
	if err := d.chain.check(ctx); err != nil {
		lost := (*DamageError)(nil)
		if !o.Salvage || !errors.As(err, &lost) {
			return 0, err
		}
		d.why = lost.Cause
	}
	d.fetch = newFetcher(d.chain)
	d.fetch.kept = newBlobCache()
	d.fetch.bad = func(segs []segment, err error) error {
		extents := make([]kernel.Extent, len(segs))
		for i, s := range segs {
			extents[i] = s.extent()
		}
		return d.lose(err, extents...)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel(nil)
	wg.Go(func() {
		defer close(d.ready)
		if err := d.read(ctx); err != nil {
			cancel(err)
		}
	})
	to := &dumper{out: out, progress: newProgress(PhaseRestoring, size, o.Progress)}
	d.free <- nil
	d.free <- nil
	for s := range d.ready {
		if err := to.window(ctx, s); err != nil {
			return to.n, err
		}
		d.free <- s.data
	}
	if err := context.Cause(ctx); err != nil {
		return to.n, fmt.Errorf("after %d of %d bytes: %w", to.n, size, err)
	}
	if to.n != size {
		return to.n, fmt.Errorf("%d bytes came out, the device has %d", to.n, size)
	}
	if lost := d.lost.list(); len(lost) > 0 {
		return to.n, &DamageError{lost, d.why}
	}
	return to.n, nil
}

// read fetches window after window into memory.
func (d *dump) read(ctx context.Context) error {
	m := d.chain.merger()
	b := &builder{lim: d.limits, size: d.chain.size(), emit: func(w *window) error { return d.stage(ctx, w) }}
	if d.Salvage {
		b.gaps = true
		b.missing = func(e kernel.Extent, why error) { _ = d.lose(why, e) } // it may be left out
	}
	for {
		p, err := m.Next(ctx)
		if errors.Is(err, io.EOF) {
			return b.flush()
		}
		if err != nil {
			return err
		}
		if err := b.add(p); err != nil {
			return err
		}
	}
}

func (d *dump) stage(ctx context.Context, w *window) error {
	s := staged{window: w}
	select {
	case s.data = <-d.free:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if int64(cap(s.data)) < w.bytes {
		s.data = make([]byte, max(w.bytes, d.limits.bytes))
	}
	s.data = s.data[:w.bytes]
	if d.Salvage {
		clear(s.data) // what cannot be fetched is zeros
	}
	if err := d.fetch.fetch(ctx, w, w.needs, d.notKept(s.data), func() sink { return stager(s.data) }); err != nil {
		return err
	}
	select {
	case d.ready <- s:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// notKept picks the blobs that are not kept from a window before; the others
// it stages.
func (d *dump) notKept(data []byte) func(*need) bool {
	return func(n *need) bool {
		plain, ok := d.fetch.kept.get(n.id)
		if last := n.segs[len(n.segs)-1]; !ok || last.in+last.length > int64(len(plain)) {
			return true
		}
		_ = stager(data).blob(n.segs, plain) // it never fails
		return false
	}
}

// stager is a sink that puts the data of a window in order. Segments do not
// overlap, so that many goroutines may share its memory.
type stager []byte

func (s stager) blob(segs []segment, plain []byte) error {
	for _, g := range segs {
		copy(s[g.at:g.at+g.length], plain[g.in:])
	}
	return nil
}

func (s stager) close() error { return nil }

// zeroBytes is how many zeros are written at a time.
const zeroBytes = 1 << 20

// dumper writes windows one after the other.
type dumper struct {
	out   io.Writer
	n     int64
	zeros []byte
	*progress
}

func (s *dumper) window(ctx context.Context, w staged) error {
	at := int64(0)
	for _, r := range w.runs {
		for left := r.Length; left > 0; {
			n := min(left, zeroBytes)
			p := s.zeros
			if r.zero {
				if p == nil {
					s.zeros = make([]byte, zeroBytes)
					p = s.zeros
				}
				p = p[:n]
			} else {
				p = w.data[at : at+n]
				at += n
			}
			if err := s.write(ctx, p); err != nil {
				return err
			}
			left -= n
		}
	}
	return nil
}

func (s *dumper) write(ctx context.Context, p []byte) error {
	if ctx.Err() != nil {
		return fmt.Errorf("after %d bytes: %w", s.n, context.Cause(ctx))
	}
	n, err := s.out.Write(p)
	s.n += int64(n)
	s.add(int64(n))
	if err == nil && n < len(p) {
		err = io.ErrShortWrite
	}
	if err != nil {
		return fmt.Errorf("write output after %d bytes: %w", s.n, err)
	}
	return nil
}
