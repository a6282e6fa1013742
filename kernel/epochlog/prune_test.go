// SPDX-License-Identifier: BSD-2-Clause

package epochlog

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/dsync-backup/dsync-backup/kernel"
)

func hold(t *testing.T, s *Session, repository string, p kernel.Position, at time.Time) Holder {
	t.Helper()
	h := Holder{Repository: repository, Location: "/" + repository, Name: "/dev/x", Snapshot: "s", Position: p, Time: at}
	relock(t, s)
	if err := errors.Join(s.Hold(h), s.Unlock()); err != nil {
		t.Fatal(err)
	}
	return h
}

func relock(t *testing.T, s *Session) {
	t.Helper()
	if err := s.Relock(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func prune(t *testing.T, s *Session, l Limits, now time.Time) Pruned {
	t.Helper()
	relock(t, s)
	p, err := s.Prune(l, now)
	if err := errors.Join(err, s.Unlock()); err != nil {
		t.Fatal(err)
	}
	return p
}

func epochs(t *testing.T, s *Session) (out []uint64) {
	t.Helper()
	list, err := s.log.list()
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range list {
		out = append(out, e.epoch)
	}
	return out
}

// TestPruneKeepsWhatHoldersNeed runs two repositories over one log at random,
// prunes without mercy, and asks for what was written since each position.
func TestPruneKeepsWhatHoldersNeed(t *testing.T) {
	d, dir, rng := newDisk(t), t.TempDir(), newRand(t)
	now := time.Now()
	since := map[string]*kernel.Bitmap{} // the model
	at := map[string]kernel.Position{}
	s := d.open(t, dir)
	removed := 0
	for round := range 60 {
		who := []string{"hourly", "hourly", "hourly", "daily"}[rng.IntN(4)]
		b := rng.Int64N(testBlocks)
		d.write(t, b)
		for _, m := range since {
			m.Set(b)
		}
		relock(t, s)
		p := rotate(t, s)
		if err := errors.Join(s.Commit(t.Context()), s.Unlock()); err != nil {
			t.Fatal(err)
		}
		if m := since[who]; m != nil {
			var blocks []int64
			for i := m.NextSet(0); i < testBlocks; i = m.NextSet(i + 1) {
				blocks = append(blocks, i)
			}
			wantSince(t, s, at[who], blocks...)
		}
		hold(t, s, who, p, now)
		at[who], since[who] = p, kernel.NewBitmap(testBlocks)
		removed += prune(t, s, Limits{HolderAge: time.Hour}, now).Entries
		oldest := p.Epoch
		for _, p := range at {
			oldest = min(oldest, p.Epoch)
		}
		if got := epochs(t, s); got[0] != oldest || got[len(got)-1] != p.Epoch || len(got) != int(p.Epoch-oldest)+1 {
			t.Fatalf("round %d: the log holds %v, want %d to %d", round, got, oldest, p.Epoch)
		}
	}
	if removed < 30 {
		t.Fatalf("only %d entries were removed", removed)
	}
	list, err := Holders(dir, d.tracker.UUID())
	if err != nil || len(list) != 2 || list[0].Repository != "daily" || list[1].Position != at["hourly"] {
		t.Fatalf("holders: %+v, %v", list, err)
	}
}

func TestPruneGoesByCountSizeAndAge(t *testing.T) {
	now := time.Now()
	all := Limits{Count: 100, Bytes: 1 << 30, Age: time.Hour, HolderAge: time.Hour}
	for name, c := range map[string]struct {
		change func(l *Limits, entry int64)
		want   []uint64
	}{
		"Nothing": {func(*Limits, int64) {}, []uint64{1, 2, 3, 4, 5, 6}},
		"Count":   {func(l *Limits, _ int64) { l.Count = 4 }, []uint64{3, 4, 5, 6}},
		"Size":    {func(l *Limits, entry int64) { l.Bytes = 5*entry + 1 }, []uint64{2, 3, 4, 5, 6}},
		"Age":     {func(l *Limits, _ int64) { l.Age = 30 * time.Minute }, []uint64{4, 5, 6}},
		"Holder":  {func(l *Limits, _ int64) { l.Count = 0 }, []uint64{5, 6}},
		"Expired": {func(l *Limits, _ int64) { l.Count, l.HolderAge = 0, time.Minute }, []uint64{6}},
	} {
		t.Run(name, func(t *testing.T) {
			d, dir := newDisk(t), t.TempDir()
			var pos []kernel.Position
			for range 6 {
				pos = append(pos, d.backup(t, dir, 7))
			}
			s := d.open(t, dir)
			if err := s.Unlock(); err != nil {
				t.Fatal(err)
			}
			hold(t, s, "r", pos[4], now.Add(-10*time.Minute))
			var size int64
			for i, e := range must(s.log.list())(t) {
				size = e.size
				if i < 3 {
					old := now.Add(-45 * time.Minute)
					if err := os.Chtimes(s.log.path(e.epoch), old, old); err != nil {
						t.Fatal(err)
					}
				}
			}
			l := all
			c.change(&l, size)
			prune(t, s, l, now)
			if got := epochs(t, s); !slices.Equal(got, c.want) {
				t.Fatalf("the log holds %v, want %v", got, c.want)
			}
			if c.want[0] > 1 {
				wantBroken(t, s, pos[0], "is not in the log")
			}
			if c.want[0] > 5 {
				wantBroken(t, s, pos[4], "is not in the log")
			} else {
				wantSince(t, s, pos[4], 7)
			}
		})
	}
}

func must[T any](v T, err error) func(t *testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func TestHoldGoesForward(t *testing.T) {
	d, dir := newDisk(t), t.TempDir()
	first, second := d.backup(t, dir), d.backup(t, dir)
	s := d.open(t, dir)
	if err := s.Unlock(); err != nil {
		t.Fatal(err)
	}
	if err := s.Hold(Holder{Position: first}); !errors.Is(err, errUnlocked) {
		t.Fatalf("without the lock: %v", err)
	}
	position := func() kernel.Position { return must(s.log.holders())(t)[0].Position }
	now := time.Now()
	hold(t, s, "r", second, now)
	if hold(t, s, "r", first, now); position() != second {
		t.Fatal("a backup that ended late took the repository back")
	}
	// One from a future that never was is no obstacle.
	future := second
	future.Epoch, future.Nonce = 99, kernel.NewNonce()
	hold(t, s, "r", future, now)
	if hold(t, s, "r", second, now); position() != second {
		t.Fatal("a position that means nothing was kept")
	}
	relock(t, s)
	if err := s.Hold(Holder{Position: kernel.Position{Tracker: kernel.NewUUID()}}); err == nil {
		t.Fatal("a position of another history was held")
	}
	// What is damaged is passed over.
	if err := os.WriteFile(filepath.Join(s.log.dir, holderDir, "x.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if n := len(must(s.log.holders())(t)); n != 1 {
		t.Fatalf("%d holders", n)
	}
}

func TestPruneDeadKeepsTheLiving(t *testing.T) {
	d, dir := newDisk(t), t.TempDir()
	d.backup(t, dir, 1)
	alive := d.tracker.UUID()
	dead, fresh := kernel.NewUUID(), kernel.NewUUID()
	now := time.Now()
	for _, u := range []kernel.UUID{dead, fresh} {
		l := logOf(dir, u)
		e := sample()
		e.Position.Tracker = u
		if err := l.write(e); err != nil {
			t.Fatal(err)
		}
	}
	old := now.Add(-40 * 24 * time.Hour)
	for _, u := range []kernel.UUID{dead, alive} {
		err := filepath.WalkDir(logOf(dir, u).dir, func(p string, _ os.DirEntry, err error) error {
			return errors.Join(err, os.Chtimes(p, old, old))
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	got, err := PruneDead(dir, []kernel.UUID{alive}, DefaultLimits(), now)
	if err != nil || !slices.Equal(got, []kernel.UUID{dead}) {
		t.Fatalf("removed %v, %v; want %s", got, err, dead)
	}
	for u, want := range map[kernel.UUID]bool{alive: true, fresh: true, dead: false} {
		if _, err := os.Stat(logOf(dir, u).dir); (err == nil) != want {
			t.Errorf("%s: %v", u, err)
		}
	}
}

// growing is a tracker of a device that changes its size between epochs.
type growing struct {
	kernel.Tracker
	blocks int64
	mark   int64
}

func (g *growing) Rotate(ctx context.Context, n kernel.Nonce) (kernel.Epoch, error) {
	e, err := g.Tracker.Rotate(ctx, n)
	e.Bitmap = kernel.NewBitmap(g.blocks)
	e.Bitmap.Set(g.mark)
	return e, err
}

// TestADeviceThatGrewIsBridged: only a tracker that keeps its history over a
// change of size gets here; the eBPF one does not, so its epochs are changed.
func TestADeviceThatGrewIsBridged(t *testing.T) {
	d, dir := newDisk(t), t.TempDir()
	g := &growing{d.tracker, 100, 3}
	turn := func(blocks, mark int64) kernel.Position {
		t.Helper()
		g.blocks, g.mark = blocks, mark
		s := must(Open(t.Context(), g, dir))(t)
		p := rotate(t, s)
		// The kernel side holds what really was; the log gets what is said.
		if err := errors.Join(s.log.write(*s.rotated), s.Commit(t.Context()), s.Unlock()); err != nil {
			t.Fatal(err)
		}
		return p
	}
	p1 := turn(100, 3)
	turn(100, 5)
	p3 := turn(110, 7)
	s := must(Open(t.Context(), g, dir))(t)
	defer func() { _ = s.Unlock() }()
	b := must(s.Since(t.Context(), p1))(t)
	want := kernel.NewBitmap(110)
	want.Set(5)
	want.Set(7)
	want.SetRange(99, 109)
	if b.Blocks() != 110 || !b.Equal(want) {
		t.Fatalf("since %v: %v of %d", p1, b.Extents(1<<30), b.Blocks())
	}
	if err := s.Unlock(); err != nil {
		t.Fatal(err)
	}
	turn(105, 1)
	relock(t, s)
	wantBroken(t, s, p3, "shrank")
	wantBroken(t, s, p1, "shrank")
}
