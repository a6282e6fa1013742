// SPDX-License-Identifier: BSD-2-Clause

package layer

import (
	"context"
	"fmt"
	"iter"
	"runtime"
	"sync"
	"time"

	"github.com/restic/chunker"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/snapshot/blocksum"
	"github.com/dsync-backup/dsync-backup/snapshot/device"
)

// Saver is what writing a layer asks of a repository: [repo.Writer] is one.
// Its methods may be called from many goroutines.
type Saver interface {
	SaveBlob(ctx context.Context, kind repo.Kind, data []byte) (repo.Saved, error)
	SaveTree(ctx context.Context, tree *repo.Tree) (repo.Saved, error)
}

// Options say what to write.
type Options struct {
	Source     device.Source
	Size       int64           // of the device, in bytes
	Ranges     iter.Seq[Range] // sorted, not overlapping
	Key        *blocksum.Key   // of the chain's sums
	Polynomial chunker.Pol     // the repository's
	Parallel   int             // reads in flight; 0 means [device.DefaultParallel]
	Time       time.Time       // of the files in the layer's tree
	Expected   Expected        // if set, blocks that are as expected are left out
	// Ages, if set, are those of what was there before. Scattered blocks go into blobs
	// with others of their age.
	Ages     *Ages
	Progress func(done int64) // called with bytes of ranges dealt with, from one goroutine
	// AfterRead is called once, when the last read has been done and before
	// its data has been stored: the device may be let go.
	AfterRead func() error

	// The limits of a part; 0 means maxPartBlobs and maxPartExtents.
	maxBlobs, maxExtents int
}

// Result says what was written.
type Result struct {
	Tree       *repo.ID // the layer; nil if there was nothing to describe
	DirtyBytes int64    // described by the layer
	BytesRead  int64    // of the source
}

// Write stores what lies in the ranges as a layer. Nothing refers to the
// layer on return: the caller flushes the saver and names the layer in a
// snapshot.
func Write(ctx context.Context, to Saver, o Options) (Result, error) {
	if o.Parallel <= 0 {
		o.Parallel = device.DefaultParallel
	}
	if o.Progress == nil {
		o.Progress = func(int64) {}
	}
	if o.maxBlobs == 0 {
		o.maxBlobs, o.maxExtents = maxPartBlobs, maxPartExtents
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	w := &writer{to: to, o: o, part: &part{}}
	w.start(ctx, cancel)
	err := w.run(ctx)
	if err != nil {
		cancel(err)
	}
	close(w.jobs)
	w.wg.Wait()
	if err != nil {
		return Result{}, err
	}
	return w.result, nil
}

type job struct {
	kind repo.Kind
	blob *blob
	data []byte
}

type writer struct {
	to     Saver
	o      Options
	part   *part
	split  *splitter
	parts  []*repo.Node
	jobs   chan job
	open   sync.WaitGroup // jobs of the part that are not done
	wg     sync.WaitGroup
	spare  spares
	result Result
}

// start starts the workers. The first one that fails cancels everything.
func (w *writer) start(ctx context.Context, cancel context.CancelCauseFunc) {
	workers := runtime.GOMAXPROCS(0)
	w.jobs = make(chan job, 1)
	for range workers {
		w.wg.Go(func() {
			for j := range w.jobs {
				if ctx.Err() == nil {
					saved, err := w.to.SaveBlob(ctx, j.kind, j.data)
					if err != nil {
						cancel(err)
					}
					j.blob.id = saved.ID
				}
				w.spare.put(j.data)
				w.open.Done()
			}
		})
	}
	w.split = &splitter{
		part: w.part, pol: w.o.Polynomial,
		room: w.spare.get,
		age: func(off, n int64) (int64, Age, error) {
			if w.o.Ages == nil {
				return n, Settled, nil
			}
			return w.o.Ages.Stretch(ctx, off, n)
		},
		emit: func(b *blob, data []byte) error { return w.save(ctx, repo.KindData, b, data) },
		roll: func(end int64) error { return w.closePart(ctx, end) },
	}
}

func (w *writer) save(ctx context.Context, kind repo.Kind, b *blob, data []byte) error {
	w.open.Add(1)
	select {
	case w.jobs <- job{kind, b, data}:
		return nil
	case <-ctx.Done():
		w.open.Done()
		return context.Cause(ctx)
	}
}

func (w *writer) run(ctx context.Context) error {
	readCtx, stop := context.WithCancel(ctx)
	r := startReader(readCtx, w.o.Source, w.o.Key, w.o.Ranges, w.o.Parallel)
	defer r.wg.Wait()
	defer stop()
	if err := r.each(ctx, func(p *piece) error { return w.piece(ctx, p) }); err != nil {
		return err
	}
	w.result.BytesRead = r.bytes.Load()
	if w.o.AfterRead != nil {
		if err := w.o.AfterRead(); err != nil {
			return err
		}
	}
	if err := w.split.finish(); err != nil {
		return err
	}
	if err := w.closePart(ctx, w.o.Size); err != nil {
		return err
	}
	if len(w.parts) == 0 {
		return nil
	}
	saved, err := w.to.SaveTree(ctx, &repo.Tree{Nodes: w.parts})
	if err != nil {
		return fmt.Errorf("save layer: %w", err)
	}
	w.result.Tree = &saved.ID
	return nil
}

// piece passes the blocks that count to the splitter, in stretches of zeros
// and of data.
func (w *writer) piece(ctx context.Context, p *piece) error {
	block := 0
	for _, rg := range p.ranges {
		n := int(kernel.BlocksOf(rg.Length))
		var err error
		if rg.Hole {
			err = w.hole(rg.Extent)
		} else {
			err = w.blocks(rg.Extent, p.buf[block*kernel.BlockSize:], p.sums[block:block+n], p.zero[block:block+n])
			block += n
		}
		if err != nil {
			return err
		}
		w.o.Progress(rg.Length)
	}
	if err := w.saveSums(ctx, metaBlob); err != nil {
		return err
	}
	if len(w.part.blobs) < w.o.maxBlobs && len(w.part.extents) < w.o.maxExtents {
		return nil
	}
	return w.split.settle()
}

func (w *writer) blocks(e kernel.Extent, buf []byte, sums []uint64, zero []bool) error {
	// What a block is to us: to be left out, zeros, or data.
	kind := func(i int) (int, error) {
		if w.o.Expected != nil {
			same, err := w.o.Expected.Same(e.Offset+int64(i)*kernel.BlockSize, zero[i], sums[i])
			if same || err != nil {
				return 0, err
			}
		}
		if zero[i] {
			return 1, nil
		}
		return 2, nil
	}
	for i := 0; i < len(sums); {
		k, err := kind(i)
		if err != nil {
			return err
		}
		j := i + 1
		for j < len(sums) {
			next, err := kind(j)
			if err != nil {
				return err
			}
			if next != k {
				break
			}
			j++
		}
		from, to := int64(i)*kernel.BlockSize, min(int64(j)*kernel.BlockSize, e.Length)
		switch k {
		case 1:
			err = w.split.zero(e.Offset+from, to-from)
		case 2:
			err = w.split.data(e.Offset+from, buf[from:to], sums[i:j])
		}
		if err != nil {
			return err
		}
		if k != 0 {
			w.result.DirtyBytes += to - from
		}
		i = j
	}
	return nil
}

// hole deals with a range that is known to hold zeros.
func (w *writer) hole(e kernel.Extent) error {
	for e.Length > 0 {
		n, same := e.Length, false
		if w.o.Expected != nil {
			var err error
			if n, same, err = w.o.Expected.Zeros(e); err != nil {
				return err
			}
		}
		if !same {
			if err := w.split.zero(e.Offset, n); err != nil {
				return err
			}
			w.result.DirtyBytes += n
		}
		e.Offset, e.Length = e.Offset+n, e.Length-n
	}
	return nil
}

// saveSums stores the part's sums as far as they fill blobs of least bytes.
func (w *writer) saveSums(ctx context.Context, least int) error {
	p := w.part
	for len(p.sums) >= max(least, 1) {
		n := min(len(p.sums), metaBlob)
		b := new(blob)
		data := append(w.spare.get(n), p.sums[:n]...)
		p.sums = p.sums[:copy(p.sums, p.sums[n:])]
		p.sumBlob, p.sumSize = append(p.sumBlob, b), p.sumSize+int64(n)
		if err := w.save(ctx, repo.KindMeta, b, data); err != nil {
			return err
		}
	}
	return nil
}

// closePart stores index and nodes of the part, which ends at end, and starts
// the next one.
func (w *writer) closePart(ctx context.Context, end int64) error {
	p := w.part
	if err := w.saveSums(ctx, 0); err != nil {
		return err
	}
	w.open.Wait()
	if err := context.Cause(ctx); err != nil {
		return err
	}
	w.part = &part{start: end}
	w.split.part = w.part
	if len(p.extents) == 0 {
		return nil
	}
	node, err := SavePart(ctx, w.to, PartFiles{
		Index: p.index(end), Data: ids(p.blobs), Sums: ids(p.sumBlob), SumSize: p.sumSize, Time: w.o.Time,
	})
	if err != nil {
		return err
	}
	w.parts = append(w.parts, node)
	return nil
}

func ids(blobs []*blob) []repo.ID {
	out := make([]repo.ID, len(blobs))
	for i, b := range blobs {
		out[i] = b.id
	}
	return out
}
