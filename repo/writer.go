// SPDX-License-Identifier: BSD-2-Clause

package repo

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"

	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/repo/index"
	"github.com/dsync-backup/dsync-backup/repo/pack"
)

// An index file is saved on the way when it has so many blobs or has waited so
// long, so that a long backup that dies need not begin again. They are
// restic's limits.
const (
	indexBlobs = 50_000
	indexAge   = 10 * time.Minute
)

// WriterOptions say how a Writer works.
type WriterOptions struct {
	// Ready, if set, returns when the store may be written to, such as
	// [Lock.Settled]. The writer gathers packs meanwhile.
	Ready func(context.Context) error
}

// Saved says what became of a blob.
type Saved struct {
	ID         ID
	Known      bool // the repository, or this writer, has it already
	StoredSize int  // bytes that it takes in its pack; 0 if it is known
	PlainSize  int
}

// KindStats counts what a writer stored of one kind of blobs.
type KindStats struct {
	Blobs       int   // new ones
	PlainBytes  int64 // of the new ones
	Packs       int   // uploaded
	StoredBytes int64 // length of the uploaded packs: exact once Flush has returned
}

// Stats counts what a writer stored. The stored bytes of all kinds and
// IndexBytes are together exactly what the store grew by, as of Flush.
type Stats struct {
	Data, Meta, Tree KindStats
	IndexFiles       int
	IndexBytes       int64
}

// Writer stores blobs. Once one of its methods has failed they all fail: the
// blobs that it called known may not have reached the store. Its methods are
// safe for concurrent use, except that Flush must not run at the same time as
// any other.
type Writer struct {
	repo   *Repository
	ready  func(context.Context) error
	ctx    context.Context // of the uploads; cancelled by the first failure
	cancel context.CancelCauseFunc

	packers     [kinds]*packer
	memory      *semaphore.Weighted // bytes of full packs
	connections *semaphore.Weighted
	uploads     sync.WaitGroup
	scratch     sync.Pool // of *scratch

	freeMu sync.Mutex
	free   [][]byte

	// inFlight are the blobs that this writer has taken on and that lookups do
	// not find yet. It is not shared with other writers: theirs may fail.
	flightMu sync.Mutex
	inFlight map[BlobHandle]int // length of the plaintext

	// Under flightMu: packs that the store has, and their sizes; nil: all that the index lists.
	stored map[ID]int64

	indexBlobs int // how many blobs make an index file due

	indexMu sync.Mutex
	pending []index.Pack // uploaded, not in an index file yet
	blobs   int          // in pending
	oldest  time.Time    // when pending got its first pack

	statsMu sync.Mutex
	stats   [kinds]KindStats
	index   struct {
		files int
		bytes int64
	}
}

// maxScratch is up to which length of a blob scratch is used again, in bytes:
// memory for the few larger ones is not kept.
const maxScratch = 3 << 20

var errAborted = errors.New("the writer was aborted")

// scratch is what one call of SaveBlob works with.
type scratch struct{ compressed, other, sealed, plain []byte }

// NewWriter starts a writer, whose uploads end with ctx. The caller holds a
// lock and has loaded the index.
func (r *Repository) NewWriter(ctx context.Context, o WriterOptions) *Writer {
	w := &Writer{
		repo:        r,
		ready:       o.Ready,
		memory:      semaphore.NewWeighted(uploadMemory),
		connections: semaphore.NewWeighted(int64(max(1, r.be.Connections()))),
		scratch:     sync.Pool{New: func() any { return new(scratch) }},
		inFlight:    map[BlobHandle]int{},
		indexBlobs:  indexBlobs,
	}
	if w.ready == nil {
		w.ready = func(context.Context) error { return nil }
	}
	w.ctx, w.cancel = context.WithCancelCause(ctx)
	for k := range w.packers {
		w.packers[k] = newPacker(w, Kind(k), r.opts.PackSize)
	}
	if err := r.RequireWritable(); err != nil {
		w.fail(err)
	}
	return w
}

// fail makes this the writer's error, if it has none yet.
func (w *Writer) fail(err error) { w.cancel(err) }

// Err is why the writer failed, or nil.
func (w *Writer) Err() error { return context.Cause(w.ctx) }

// SaveBlob stores data, unless the repository has it. It is not kept after the
// return. Known does not mean durable: what this call or an earlier one saved
// is so only when Flush has returned without error.
func (w *Writer) SaveBlob(ctx context.Context, kind Kind, data []byte) (Saved, error) {
	if err := w.Err(); err != nil {
		return Saved{}, fmt.Errorf("save blob: %w", err)
	}
	sum := plainSum(data)
	s := Saved{ID: Hash(data), PlainSize: len(data)}
	h := BlobHandle{Type: kind.BlobType(), ID: s.ID}
	// First claim, then look: a blob leaves inFlight only after lookups find it.
	if !w.claim(h, len(data)) {
		s.Known = true
		return s, nil
	}
	known, err := w.stores(ctx, kind, h)
	if known {
		w.release(h)
		s.Known = true
		return s, nil
	}
	if err != nil {
		w.fail(err)
		return Saved{}, err
	}
	stored, err := w.store(ctx, kind, h, data, sum)
	if err != nil {
		// Somebody may have been told that this blob is known.
		w.fail(err)
		return Saved{}, err
	}
	s.StoredSize = stored
	return s, nil
}

func (w *Writer) claim(h BlobHandle, size int) bool {
	w.flightMu.Lock()
	defer w.flightMu.Unlock()
	if _, taken := w.inFlight[h]; taken {
		return false
	}
	w.inFlight[h] = size
	return true
}

// BelieveOnly has the writer take a blob for known only where the index has it in one of
// these packs, inside of its size in bytes: what else it lists is lost, and stored again. So are
// metadata and trees that can be read no more, which are looked at, since they are few. It is called
// before anything is saved.
func (w *Writer) BelieveOnly(packs map[ID]int64) {
	w.stored = make(map[ID]int64, len(packs))
	maps.Copy(w.stored, packs)
}

// stores reports whether a blob is in the repository, as far as that is to be believed.
func (w *Writer) stores(ctx context.Context, kind Kind, h BlobHandle) (bool, error) {
	if w.stored == nil {
		return w.repo.Has(h), nil
	}
	places := w.believed(h)
	if len(places) == 0 || kind == KindData {
		return len(places) > 0, nil
	}
	_, err := w.repo.loadFrom(ctx, h, KindData, places) // not from the cache
	if err != nil && (errors.Is(err, ErrDamaged) || unreadable(err)) {
		return false, nil
	}
	return err == nil, err
}

func (w *Writer) believed(h BlobHandle) []Location {
	places := w.repo.Locations(h)
	w.flightMu.Lock()
	defer w.flightMu.Unlock()
	return slices.DeleteFunc(places, func(l Location) bool {
		return int64(l.Offset)+int64(l.Length) > w.stored[l.Pack]
	})
}

// BlobSize is the length of the plaintext of a blob that the repository or
// this writer has, in bytes.
func (w *Writer) BlobSize(h BlobHandle) (int, bool) {
	w.flightMu.Lock()
	size, ok := w.inFlight[h]
	w.flightMu.Unlock()
	if ok {
		return size, true
	}
	return w.repo.BlobSize(h)
}

func (w *Writer) release(h BlobHandle) {
	w.flightMu.Lock()
	defer w.flightMu.Unlock()
	delete(w.inFlight, h)
}

// store seals a blob, checks that what it sealed opens and has the sum that data had before its
// ID was computed, and packs it. The IDs of what describes data are computed again, and some others.
func (w *Writer) store(ctx context.Context, kind Kind, h BlobHandle, data []byte, sum uint32) (int, error) {
	if len(data) > maxBlob {
		return 0, fmt.Errorf("save %s: %d bytes are too many for a blob", h, len(data))
	}
	s := w.scratch.Get().(*scratch)
	defer func() {
		if cap(s.sealed) <= maxScratch {
			w.scratch.Put(s)
		}
	}()
	codec := w.repo.codec
	uncompressed := codec.sealBlob(s, kind, data)
	// Bad memory must show now and not when the blob is needed. The sum is older
	// than the ID, so that data which changed under us are noticed, too.
	blob := pack.Blob{Handle: h, Length: uint32(len(s.sealed)), UncompressedLength: uint32(uncompressed)}
	if err := codec.checkBlob(s, blob, sum, kind != KindData || rand.Uint32N(hashEvery) == 0); err != nil {
		return 0, fmt.Errorf("check %s before storing it (bad memory, or it was changed meanwhile): %w", h, err)
	}
	if err := w.packers[kind].add(ctx, h, s.sealed, uncompressed); err != nil {
		return 0, fmt.Errorf("save %s: %w", h, err)
	}
	if kind.cached() && w.repo.cache != nil {
		w.repo.cache.save(blobName(h), cacheEntry(blob, s.sealed))
	}
	w.statsMu.Lock()
	defer w.statsMu.Unlock()
	w.stats[kind].Blobs++
	w.stats[kind].PlainBytes += int64(len(data))
	return len(s.sealed) + pack.EntrySize(blob), nil
}

func (w *Writer) countPack(kind Kind, size int) {
	w.statsMu.Lock()
	defer w.statsMu.Unlock()
	w.stats[kind].Packs++
	w.stats[kind].StoredBytes += int64(size)
}

// indexPack notes an uploaded pack, and saves an index file if it is time.
func (w *Writer) indexPack(id ID, blobs []pack.Blob) error {
	w.indexMu.Lock()
	if len(w.pending) == 0 {
		w.oldest = time.Now()
	}
	w.pending = append(w.pending, index.Pack{ID: id, Blobs: blobs})
	w.blobs += len(blobs)
	due := w.blobs >= w.indexBlobs || time.Since(w.oldest) >= indexAge
	w.indexMu.Unlock()
	if !due {
		return nil
	}
	return w.saveIndex(w.ctx)
}

// saveIndex writes an index file of the packs uploaded so far, each of which
// is in this one as a whole, and lets lookups find their blobs.
func (w *Writer) saveIndex(ctx context.Context) error {
	w.indexMu.Lock()
	packs := w.pending
	w.pending, w.blobs = nil, 0
	w.indexMu.Unlock()
	if len(packs) == 0 {
		return nil
	}
	plain, err := index.Encode(packs)
	if err != nil {
		return err
	}
	if err := w.repo.CheckLock(w.ctx); err != nil {
		return err
	}
	id, raw, err := w.repo.saveUnpacked(ctx, backend.IndexFile, plain)
	if err != nil {
		return err
	}
	w.statsMu.Lock()
	w.index.files++
	w.index.bytes += int64(len(raw))
	w.statsMu.Unlock()
	if err := w.repo.addTable(id, packs); err != nil {
		return err
	}
	if w.stored != nil {
		w.flightMu.Lock()
		for _, p := range packs {
			w.stored[p.ID] = packSize(p.Blobs)
		}
		w.flightMu.Unlock()
	}
	for _, p := range packs {
		for _, b := range p.Blobs {
			w.release(b.Handle)
		}
	}
	return nil
}

// Flush makes everything that was saved durable and visible: the packs, then
// an index file of exactly those packs of this writer that no earlier one
// lists. The writer can go on afterwards.
func (w *Writer) Flush(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { w.fail(context.Cause(ctx)) })
	defer stop()
	if err := w.ready(w.ctx); err != nil {
		w.fail(err)
	}
	for _, p := range w.packers {
		if err := p.flush(w.ctx); err != nil {
			w.fail(err)
		}
	}
	w.uploads.Wait()
	if err := w.Err(); err != nil {
		return fmt.Errorf("flush: %w", err)
	}
	if err := w.saveIndex(ctx); err != nil {
		w.fail(err)
		return fmt.Errorf("flush: %w", err)
	}
	return nil
}

// Abort ends the writer without saving any more, and returns when none of its
// uploads runs on. After a Flush it changes nothing that Flush made durable.
func (w *Writer) Abort() {
	w.fail(errAborted)
	w.uploads.Wait()
}

// Stats counts what was stored so far.
func (w *Writer) Stats() Stats {
	w.statsMu.Lock()
	defer w.statsMu.Unlock()
	return Stats{
		Data: w.stats[KindData], Meta: w.stats[KindMeta], Tree: w.stats[KindTree],
		IndexFiles: w.index.files, IndexBytes: w.index.bytes,
	}
}
