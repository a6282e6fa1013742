// SPDX-License-Identifier: BSD-2-Clause

package snapshot

import (
	"bytes"
	"context"
	"math"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/dsync-backup/dsync-backup/kernel"
)

// marking is a History that knows what a test writes, but for what it leaves
// out.
type marking struct {
	claims
	running *kernel.Bitmap
	ended   map[uint64]*kernel.Bitmap
	mine    uint64 // the newest epoch that the backup itself ended
	invalid string
	peek    func() // called before Peek answers
	since   func() // called before Since answers
}

func newMarking(size int64) *marking {
	return &marking{
		claims:  claims{size: size, uuid: kernel.NewUUID()},
		running: kernel.NewBitmap(kernel.BlocksOf(size)), ended: map[uint64]*kernel.Bitmap{},
	}
}

func (m *marking) Status(ctx context.Context) (kernel.Status, error) {
	st, err := m.claims.Status(ctx)
	st.Reliable, st.Reason = m.invalid == "", m.invalid
	return st, err
}

func (m *marking) Rotate(ctx context.Context) (kernel.Epoch, error) {
	e, err := m.claims.Rotate(ctx)
	e.Bitmap = m.running
	m.ended[e.Position.Epoch], m.mine = m.running, e.Position.Epoch
	m.running = kernel.NewBitmap(m.running.Blocks())
	return e, err
}

func (m *marking) Since(_ context.Context, pos kernel.Position) (*kernel.Bitmap, error) {
	if m.since != nil {
		m.since()
	}
	out := kernel.NewBitmap(m.running.Blocks())
	for n := pos.Epoch + 1; n <= m.mine; n++ {
		if err := out.Or(m.ended[n]); err != nil {
			return nil, err
		}
	}
	return out, nil
}

func (m *marking) Peek(context.Context) (*kernel.Bitmap, error) {
	if m.peek != nil {
		m.peek()
	}
	return m.running.Clone(), nil
}

func (m *marking) Invalidate(ctx context.Context, reason string) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	m.invalid = reason
	return nil
}

// TestALyingTrackerIsCaught has a tracker leave out one write in 1,000. The
// spot check must find out within as many backups as its sample predicts for
// all but one of 1,000 runs, and the image must be right from then on.
func TestALyingTrackerIsCaught(t *testing.T) {
	const size, writes = 16 << 20, 200
	for seed := range uint64(3) {
		rng := rand.New(rand.NewPCG(seed, 77))
		f := newImage(t, size)
		f.write(0, noise(rng, size))
		m := newMarking(size)
		with := func(o *Options) { o.History, o.SpotCheck, o.SpotSeed = m, DefaultSpotCheck, seed+1 }
		f.backup(with)
		lies := map[int64]bool{}
		missed := 1.0 // how likely it is that all samples so far missed all lies
		for n := 1; ; n++ {
			for range writes {
				b := rng.Int64N(size / kernel.BlockSize)
				f.write(b*kernel.BlockSize, noise(rng, kernel.BlockSize))
				if rng.IntN(1000) == 0 && !m.running.Get(b) {
					lies[b] = true
				} else {
					m.running.Set(b)
					delete(lies, b)
				}
			}
			// Half of the sample is anywhere among the blocks that were not marked.
			clean := float64(size/kernel.BlockSize - m.running.Count())
			s := f.backup(with)
			if s.Changes == ChangesCompare {
				if len(lies) == 0 || !strings.Contains(s.FallbackReason, "cannot be trusted") || m.invalid == "" || s.Position != nil {
					t.Fatalf("seed %d: %d lies, %+v", seed, len(lies), s)
				}
				if !bytes.Equal(f.restored(s.SnapshotID), f.content()) {
					t.Fatalf("seed %d: the image is wrong", seed)
				}
				t.Logf("seed %d: caught at backup %d, with %d lies", seed, n, len(lies))
				break
			}
			missed *= math.Pow(1-float64(len(lies))/clean, DefaultSpotCheck/2)
			if missed < 0.001 {
				t.Fatalf("seed %d: not caught in %d backups, with %d lies", seed, n, len(lies))
			}
		}
	}
}

// newChecked is an image with a backup, whose tracker each further one checks as a whole.
func newChecked(t *testing.T, size int64) (*imageFile, *marking, *rand.Rand, func(*Options)) {
	t.Helper()
	rng := rand.New(rand.NewPCG(5, 6))
	f, m := newImage(t, int(size)), newMarking(size)
	f.write(0, noise(rng, int(size)))
	with := func(o *Options) { o.History, o.SpotCheck = m, int(size/kernel.BlockSize) }
	f.backup(with)
	return f, m, rng, with
}

// TestADeviceIsHeldUntilItsTrackerIsChecked: what changed is copied while the tracker is
// checked. A device that is let go only then is written to at once; what it held before is in
// the snapshot, whether the tracker was right, or lied and everything had to be compared.
func TestADeviceIsHeldUntilItsTrackerIsChecked(t *testing.T) {
	const size = 4 << 20
	for name, lie := range map[string]bool{"Honest": false, "Lying": true} {
		t.Run(name, func(t *testing.T) {
			f, m, rng, with := newChecked(t, size)
			for range 300 {
				b := rng.Int64N(size / kernel.BlockSize)
				f.write(b*kernel.BlockSize, noise(rng, kernel.BlockSize))
				if !lie || b%100 > 0 || m.running.Get(b) {
					m.running.Set(b)
				}
			}
			want, ended := f.content(), 0
			s := f.backup(func(o *Options) {
				with(o)
				o.Instant = &letGo{Still(PointInTimeNone), func() {
					ended++
					f.write(0, noise(rng, size))
					m.running.SetRange(0, size/kernel.BlockSize-1)
				}}
			})
			if ended != 1 || (m.invalid != "") != lie || (s.Changes == ChangesCompare) != lie || s.SpotCheckedBytes < size/4 {
				t.Errorf("let go %d times, the tracker is %q: %+v", ended, m.invalid, s)
			}
			if !bytes.Equal(f.restored(s.SnapshotID), want) {
				t.Error("the snapshot is not what the device held")
			}
			if s.DirtyBytes > 300*kernel.BlockSize {
				t.Errorf("%d bytes are dirty", s.DirtyBytes)
			}
		})
	}
}

// TestALieIsNotForgotten: a backup is interrupted the moment that it finds one.
func TestALieIsNotForgotten(t *testing.T) {
	const size = 1 << 20
	for name, freeze := range map[string]bool{"Copy": false, "Precopy": true} {
		t.Run(name, func(t *testing.T) {
			f, m, rng, with := newChecked(t, size)
			f.write(0, noise(rng, size/2))
			m.running.SetRange(0, 20)
			ctx, cancel := context.WithCancel(t.Context())
			_, err := f.tryIn(ctx, func(o *Options) {
				with(o)
				if freeze {
					o.Precopy = &Precopy{MaxFreeze: time.Minute}
				}
				m.peek = func() {
					if m.mine > 1 { // not before the rotation
						cancel()
					}
				}
			})
			if err == nil || m.invalid == "" {
				t.Errorf("the tracker is %q, the backup %v", m.invalid, err)
			}
		})
	}
}

// TestAnHonestTrackerIsNotAccused writes to the device while it is checked.
func TestAnHonestTrackerIsNotAccused(t *testing.T) {
	const size = 1 << 20
	rng := rand.New(rand.NewPCG(3, 4))
	f := newImage(t, size)
	f.write(0, noise(rng, size))
	m := newMarking(size)
	with := func(o *Options) {
		o.History, o.SpotCheck = m, size/kernel.BlockSize
		o.Instant = Still(PointInTimeNone)
	}
	// After the rotation, before the check.
	m.since = func() {
		for range 5 {
			b := rng.Int64N(size / kernel.BlockSize)
			m.running.Set(b)
			f.write(b*kernel.BlockSize, noise(rng, kernel.BlockSize))
		}
	}
	f.backup(with)
	for range 30 {
		s := f.backup(with)
		if s.Changes != ChangesTracker || s.SpotCheckedBytes < size/2 {
			t.Fatalf("%+v", s)
		}
		// Another backup ends the epoch in between.
		m.peek = func() {
			mine := m.mine
			if _, err := m.Rotate(t.Context()); err != nil {
				t.Error(err)
			}
			m.peek, m.mine = nil, mine
		}
	}
	if m.invalid != "" {
		t.Error(m.invalid)
	}
	s := f.backup(func(o *Options) { with(o); o.SpotCheck = 0 })
	if s.SpotCheckedBytes != 0 {
		t.Errorf("%+v", s)
	}
}

func TestSpotBlocksAreClean(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for range 300 {
		b := kernel.NewBitmap(1 + rng.Int64N(5000))
		for range rng.IntN(20) {
			first := rng.Int64N(b.Blocks())
			b.SetRange(first, min(b.Blocks()-1, first+rng.Int64N(500)))
		}
		n := rng.IntN(40)
		got := spotBlocks(rng, b, n)
		limit := max(n, int(b.Count()/100))
		if len(got) > limit || n == 0 && len(got) > 0 {
			t.Fatalf("%d blocks, want at most %d", len(got), limit)
		}
		if b.Count() < b.Blocks()/2 && b.Blocks() > 500 && len(got) < n {
			t.Fatalf("%d of %d clean blocks, want %d", len(got), b.Blocks()-b.Count(), n)
		}
		for i, x := range got {
			if x < 0 || x >= b.Blocks() || b.Get(x) || i > 0 && got[i-1] >= x {
				t.Fatalf("block %d of %d in %v", x, b.Blocks(), got)
			}
		}
	}
}
