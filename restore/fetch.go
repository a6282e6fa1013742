// SPDX-License-Identifier: BSD-2-Clause

package restore

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/snapshot/layer"
)

const (
	maxFetches = 16
	// splitBytes is the least that is asked of a pack at a time, where there
	// are too few packs to keep all fetches busy.
	splitBytes = 4 << 20
)

// sink takes the blobs that one goroutine fetched.
type sink interface {
	// blob takes a blob that was checked. plain is good during the call.
	blob(segs []segment, plain []byte) error
	// close is called once, when there are no more, unless something failed.
	close() error
}

// fetcher loads what windows need.
type fetcher struct {
	chain    *chain
	parallel int
	loads    chan struct{} // holds one for each load in flight, of all fetches together
	kept     *blobCache    // if set, for blobs that further windows need as well
	bytes    atomic.Int64
	// bad is told of a blob of which no good copy is left, from many
	// goroutines. Its error ends the fetch.
	bad func(segs []segment, err error) error
}

func newFetcher(c *chain) *fetcher {
	n := max(c.store.Backend().Connections(), runtime.GOMAXPROCS(0))
	n = min(n, maxFetches)
	return &fetcher{chain: c, parallel: n, loads: make(chan struct{}, n)}
}

// batchOf is blobs of one pack.
type batchOf struct {
	pack  repo.ID
	blobs []repo.BlobLocation
	bytes int64
}

// fetch loads each of the window's needs that is picked once and hands it to
// the sink of the goroutine that did.
func (f *fetcher) fetch(ctx context.Context, w *window, needs []need, pick func(*need) bool, newSink func() sink) error {
	packs, err := f.group(needs, pick)
	if err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(f.parallel)
	for _, p := range f.split(packs) {
		g.Go(func() error {
			select {
			case f.loads <- struct{}{}:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
			defer func() { <-f.loads }()
			return f.load(ctx, w, p, newSink())
		})
	}
	return g.Wait()
}

// group looks for each blob in a pack that is needed anyway, else in any. The
// packs are in the order of the device.
func (f *fetcher) group(needs []need, pick func(*need) bool) ([]*batchOf, error) {
	byPack := map[repo.ID]*batchOf{}
	var packs []*batchOf
	for i := range needs {
		n := &needs[i]
		if !pick(n) {
			continue
		}
		places := f.chain.locations(n.id)
		if len(places) == 0 {
			if err := f.bad(n.segs, fmt.Errorf("load %s: %w", dataBlob(n.id), repo.ErrBlobNotFound)); err != nil {
				return nil, err
			}
			continue
		}
		l := places[max(0, slices.IndexFunc(places, func(l repo.Location) bool { return byPack[l.Pack] != nil }))]
		p := byPack[l.Pack]
		if p == nil {
			p = &batchOf{pack: l.Pack}
			byPack[l.Pack] = p
			packs = append(packs, p)
		}
		p.blobs = append(p.blobs, repo.BlobLocation{
			Handle: dataBlob(n.id), Offset: l.Offset, Length: l.Length, UncompressedLength: l.UncompressedLength,
		})
		p.bytes += int64(l.Length)
	}
	return packs, nil
}

// split cuts packs into pieces if there are fewer than could be fetched at a
// time.
func (f *fetcher) split(packs []*batchOf) []*batchOf {
	if len(packs) == 0 || len(packs) >= f.parallel {
		return packs
	}
	var out []*batchOf
	for _, p := range packs {
		slices.SortFunc(p.blobs, func(a, b repo.BlobLocation) int { return cmp.Compare(a.Offset, b.Offset) })
		limit := max(p.bytes*int64(len(packs))/int64(f.parallel), splitBytes)
		part := &batchOf{pack: p.pack}
		for _, b := range p.blobs {
			part.blobs = append(part.blobs, b)
			if part.bytes += int64(b.Length); part.bytes >= limit {
				out, part = append(out, part), &batchOf{pack: p.pack}
			}
		}
		if len(part.blobs) > 0 {
			out = append(out, part)
		}
	}
	return out
}

func (f *fetcher) load(ctx context.Context, w *window, p *batchOf, to sink) error {
	stored := make(map[repo.ID]int64, len(p.blobs))
	for _, b := range p.blobs {
		stored[b.ID] = int64(b.Length)
	}
	err := f.chain.store.LoadPackBlobs(ctx, p.pack, p.blobs, func(h repo.BlobHandle, plain []byte, err error) error {
		n := &w.needs[w.byID[h.ID]]
		last := n.segs[len(n.segs)-1]
		for _, s := range n.segs {
			if err == nil && s.in+s.length > int64(len(plain)) {
				err = fmt.Errorf("load %s: it has %d bytes and should have %d: %w", h, len(plain), s.in+s.length, repo.ErrDamaged)
			}
		}
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case err != nil && isDamage(err):
			return f.bad(n.segs, err)
		case err != nil:
			return err
		}
		f.bytes.Add(stored[h.ID])
		if f.kept != nil && last.in+last.length < int64(len(plain)) {
			f.kept.put(h.ID, plain)
		}
		return to.blob(n.segs, plain)
	})
	if err != nil {
		return err
	}
	return to.close()
}

// isDamage tells blobs that are lost from a store that does not answer: of the
// others there is still something to be had.
func isDamage(err error) bool {
	return layer.IsDamage(err) || errors.Is(err, unix.EIO)
}

// A blobCache holds a 32nd part of the machine's memory, within these bounds.
const (
	leastKept = 24 << 20
	mostKept  = 256 << 20
)

// blobCache keeps blobs that further windows may need as well. The windows come back to all blobs
// of what is written all the time, again and again: whichever was kept last would be gone before
// it is needed, so that it is a random one that makes room.
type blobCache struct {
	limit int // bytes

	mu    sync.Mutex
	ids   []repo.ID // in no order
	blobs map[repo.ID][]byte
	bytes int
}

func newBlobCache() *blobCache {
	c := &blobCache{limit: leastKept, blobs: map[repo.ID][]byte{}}
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) == nil {
		c.limit = int(min(max(info.Totalram*uint64(info.Unit)/32, leastKept), mostKept))
	}
	return c
}

func (c *blobCache) get(id repo.ID) ([]byte, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	b, ok := c.blobs[id]
	return b, ok
}

func (c *blobCache) put(id repo.ID, plain []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.blobs[id]; ok || len(plain) > c.limit {
		return
	}
	for c.bytes+len(plain) > c.limit {
		i := rand.IntN(len(c.ids))
		c.bytes -= len(c.blobs[c.ids[i]])
		delete(c.blobs, c.ids[i])
		c.ids[i] = c.ids[len(c.ids)-1]
		c.ids = c.ids[:len(c.ids)-1]
	}
	c.blobs[id] = bytes.Clone(plain) // the memory of others may be in use
	c.ids = append(c.ids, id)
	c.bytes += len(plain)
}
