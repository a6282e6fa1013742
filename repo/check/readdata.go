// SPDX-License-Identifier: BSD-2-Clause

package check

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"

	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/repo/backend"
)

const (
	// maxReaders bounds how many packs are read at a time.
	maxReaders = 8

	// maxPackBytes bounds how much of packs is in memory at a time. A larger one is
	// read alone.
	maxPackBytes = 128 << 20
)

// Subset says which packs to read. The zero value is none.
type Subset struct {
	all     bool
	part    int // of parts, from 1
	parts   int
	percent float64
	bytes   int64
}

// All is all packs.
func All() Subset { return Subset{all: true} }

// ParseSubset reads restic's --read-data-subset: n/t, x% or a size in bytes. The
// parts of n/t are told apart by the packs' names, as restic does, so that t runs
// read all.
func ParseSubset(s string) (Subset, error) {
	fail := fmt.Errorf("subset %q: want n/t with 1 ≤ n ≤ t ≤ 256, a percentage above 0 and up to 100, or a size", s)
	if n, t, ok := strings.Cut(s, "/"); ok {
		part, err1 := strconv.Atoi(n)
		parts, err2 := strconv.Atoi(t)
		if err1 != nil || err2 != nil || part < 1 || part > parts || parts > 256 {
			return Subset{}, fail
		}
		return Subset{part: part, parts: parts}, nil
	}
	if p, ok := strings.CutSuffix(s, "%"); ok {
		percent, err := strconv.ParseFloat(p, 64)
		if err != nil || !(percent > 0 && percent <= 100) {
			return Subset{}, fail
		}
		return Subset{percent: percent}, nil
	}
	n, err := repo.ParseSize(s)
	if err != nil || n < 1 {
		return Subset{}, fail
	}
	return Subset{bytes: n}, nil
}

// pick chooses among packs.
func (s Subset) pick(packs map[repo.ID]int64) []repo.ID {
	var ids []repo.ID
	var total int64
	for id, size := range packs {
		total += size
		if s.parts == 0 || int(id[0])%s.parts == s.part-1 {
			ids = append(ids, id)
		}
	}
	slices.SortFunc(ids, repo.ID.Compare)
	if s.all || s.parts > 0 || len(ids) == 0 {
		return ids
	}
	percent := s.percent
	if s.bytes > 0 {
		percent = min(100, float64(s.bytes)/float64(max(total, 1))*100)
	}
	rand.Shuffle(len(ids), func(i, j int) { ids[i], ids[j] = ids[j], ids[i] })
	return ids[:max(1, int(float64(len(ids))*percent/100))]
}

// readData reads packs from end to end.
func (c *checker) readData(ctx context.Context) error {
	numbers := make(map[repo.ID]int32, len(c.sizes))
	present := map[repo.ID]int64{}
	for i, id := range c.catalog.Packs() {
		numbers[id] = int32(i)
		if size, ok := c.files[id]; ok {
			present[id] = size
		}
	}
	c.res.Packs = len(present)
	if c.ReadData == (Subset{}) {
		return nil
	}
	picked := c.ReadData.pick(present)
	var total, done int64
	for _, id := range picked {
		total += present[id]
	}
	var mu sync.Mutex
	var headless []repo.ID
	err := c.eachPack(ctx, picked, present, func(ctx context.Context, id repo.ID) error {
		rep, err := c.repo.ReadPack(ctx, id, present[id], nil)
		if end := c.blameFor(ctx, rep, err); end != nil {
			return end
		}
		if err == nil && rep.Blobs != nil {
			c.compareEntries(id, numbers[id], &rep)
		}
		mu.Lock()
		defer mu.Unlock()
		if err == nil && rep.Blobs == nil {
			headless = append(headless, id)
			return nil
		}
		done += present[id]
		c.tell(PhaseData, done, total)
		c.packRead(id, rep, err)
		return nil
	})
	if err != nil || len(headless) == 0 {
		return err
	}
	// Where the header is lost, the index says what should be there.
	entries := map[repo.ID][]repo.BlobLocation{}
	for _, id := range headless {
		entries[id] = nil
	}
	ids := c.catalog.Packs()
	err = c.catalog.EachBlob(ctx, func(h repo.BlobHandle, places []repo.Place) error {
		for _, at := range places {
			if list, ok := entries[ids[at.Pack]]; ok {
				entries[ids[at.Pack]] = append(list, at.Blob(h))
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	return c.eachPack(ctx, headless, present, func(ctx context.Context, id repo.ID) error {
		rep, err := c.repo.ReadPack(ctx, id, present[id], entries[id])
		if end := c.blameFor(ctx, rep, err); end != nil {
			return end
		}
		mu.Lock()
		defer mu.Unlock()
		done += present[id]
		c.tell(PhaseData, done, total)
		c.packRead(id, rep, err)
		return nil
	})
}

// blameFor is blame for what reading a pack gave.
func (c *checker) blameFor(ctx context.Context, rep repo.PackReport, err error) error {
	if err == nil {
		err = rep.Unread
	}
	if err == nil {
		return nil
	}
	return c.blame(ctx, err)
}

// eachPack calls fn for packs, many at a time, as far as they fit into memory.
func (c *checker) eachPack(ctx context.Context, ids []repo.ID, sizes map[repo.ID]int64, fn func(context.Context, repo.ID) error) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(min(maxReaders, max(c.repo.Backend().Connections(), runtime.GOMAXPROCS(0))))
	memory := semaphore.NewWeighted(maxPackBytes)
	for _, id := range ids {
		g.Go(func() error {
			size := min(sizes[id], maxPackBytes)
			if memory.Acquire(ctx, size) != nil {
				return context.Cause(ctx)
			}
			defer memory.Release(size)
			return fn(ctx, id)
		})
	}
	return g.Wait()
}

// compareEntries makes sure that header and index agree.
func (c *checker) compareEntries(id repo.ID, number int32, rep *repo.PackReport) {
	unlisted := 0
	for _, b := range rep.Blobs {
		here := repo.Location{Pack: id, Offset: b.Offset, Length: b.Length, UncompressedLength: b.UncompressedLength}
		if !slices.Contains(c.repo.Locations(b.Handle), here) {
			unlisted++
		}
	}
	if unlisted > 0 || len(rep.Blobs) != int(c.entries[number]) {
		text := fmt.Sprintf("its header lists %d blobs, of which the index has %d, and the index lists %d; `repair index --read-all-packs` mends that",
			len(rep.Blobs), len(rep.Blobs)-unlisted, c.entries[number])
		if rep.Problem == "" {
			rep.Problem = text
		}
		c.mu.Lock()
		c.res.SuggestRepairIndex = true
		c.mu.Unlock()
	}
}

// packRead reports what reading a pack showed. The caller holds a lock.
func (c *checker) packRead(id repo.ID, rep repo.PackReport, err error) {
	switch {
	case errors.Is(err, backend.ErrNotExist):
		// Only packs that are listed are read.
		c.lose(id, "the store lists it, and does not have it", fmt.Sprintf("pack %s is missing", id.Str()))
		return
	case err != nil:
		c.lose(id, unread(err).Error(), fmt.Sprintf("pack %s cannot be read: %v", id.Str(), err))
		return
	}
	c.res.PacksRead++
	if rep.Problem == "" && len(rep.Bad) == 0 {
		return
	}
	c.broken(id)
	if rep.Problem != "" {
		c.report(Problem{Kind: "pack", ID: id, Message: rep.Problem})
	}
	for b, why := range rep.Bad {
		c.damage.places[place{id, b.Offset}] = fmt.Errorf("%w, in pack %s", why, id.Str())
		c.report(Problem{Kind: "blob", ID: b.ID, Message: fmt.Sprintf("%v, in pack %s", why, id.Str())})
	}
}

// lose reports that nothing of a pack can be had. The caller holds a lock.
func (c *checker) lose(id repo.ID, problem, why string) {
	c.broken(id)
	c.damage.packs[id] = packDamage{-1, why}
	c.report(Problem{Kind: "pack", ID: id, Message: problem})
}

func (c *checker) broken(id repo.ID) {
	if !slices.Contains(c.res.BrokenPacks, id) {
		c.res.BrokenPacks = append(c.res.BrokenPacks, id)
	}
}
