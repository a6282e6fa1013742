// SPDX-License-Identifier: BSD-2-Clause

package restore

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/snapshot/blocksum"
	"github.com/dsync-backup/dsync-backup/snapshot/device"
	"github.com/dsync-backup/dsync-backup/snapshot/stream"
)

const randomWitnesses = 28

// sampler picks blocks among those that a merge writes, each as likely as any
// other record's.
type sampler struct {
	mu   sync.Mutex
	seen int64
	at   []int64
}

func (s *sampler) offer(off int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seen++
	if len(s.at) < randomWitnesses {
		s.at = append(s.at, off)
	} else if i := rand.Int64N(s.seen); i < randomWitnesses {
		s.at[i] = off
	}
}

// list adds the blocks that change when a device is merely mounted: where file
// systems keep their superblocks.
func (s *sampler) list(size int64) []int64 {
	out := append([]int64{0, kernel.BlockSize, 64 << 10, (size - 1) / kernel.BlockSize * kernel.BlockSize}, s.at...)
	slices.Sort(out)
	return slices.DeleteFunc(slices.Compact(out), func(off int64) bool { return off < 0 || off >= size })
}

// testify reads blocks of the target back, for the next merge to find them as
// they are now.
func (s *mergeState) testify(ctx context.Context, path string, offsets []int64) error {
	s.Key, s.Witnesses = stream.NewID(), nil
	d, err := device.Open(path, device.Options{})
	if err != nil {
		return err
	}
	defer d.Close()
	for _, off := range offsets {
		sum, err := s.sum(ctx, d, off)
		if err != nil {
			return fmt.Errorf("read target: %w", err)
		}
		s.Witnesses = append(s.Witnesses, witness{off, sum})
	}
	return nil
}

func (s *mergeState) sum(ctx context.Context, d *device.Device, off int64) (uint64, error) {
	b := device.AlignedBuffer(int(min(kernel.BlockSize, s.Size-off)))
	if err := d.ReadExtent(ctx, b, off); err != nil {
		return 0, err
	}
	key := blocksum.Key(s.Key)
	return key.Sum(b), nil
}

// doubt says why the target is not as the last merge left it, or "" if nothing
// tells.
func (s *mergeState) doubt(ctx context.Context, t *target, changed int64) (string, error) {
	if s.Incomplete {
		return "", nil // nobody knows what it holds
	}
	if t.kind == device.File && (changed != s.Changed || t.size != s.Size) {
		return "it was written to after the last merge", nil
	}
	if t.size < s.Size {
		return fmt.Sprintf("it has %d bytes, and had at least %d when it was merged to", t.size, s.Size), nil
	}
	d, err := device.Open(t.path, device.Options{})
	if err != nil {
		return "", err
	}
	defer d.Close()
	for _, w := range s.Witnesses {
		sum, err := s.sum(ctx, d, w.Offset)
		if err != nil {
			return "", fmt.Errorf("read target: %w", err)
		}
		if sum != w.Sum {
			return fmt.Sprintf("its block at %d is not as the last merge left it: it was written to, or is another", w.Offset), nil
		}
	}
	return "", nil
}
