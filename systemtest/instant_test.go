// SPDX-License-Identifier: BSD-2-Clause

package systemtest

import (
	"context"
	"errors"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/kernel/bpf"
	"github.com/dsync-backup/dsync-backup/kernel/epochlog"
	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/repo/backend/location"
	"github.com/dsync-backup/dsync-backup/snapshot"
	"github.com/dsync-backup/dsync-backup/snapshot/device"
	"github.com/dsync-backup/dsync-backup/snapshot/layer"
)

// watched is a tracked device and its repository, backed up by this process,
// so that a test may have its say at every step.
type watched struct {
	*env
	d       *disk
	tracker *bpf.Tracker
	r       *repo.Repository
}

func newWatched(t testing.TB, d *disk) *watched {
	t.Helper()
	w := &watched{env: lightEnv(t), d: d}
	ctx := context.Background()
	be, err := location.Open(ctx, w.repo, location.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if w.r, err = repo.Open(ctx, be, "geheim", repo.Options{}); err != nil {
		t.Fatal(err)
	}
	if w.tracker, err = bpf.Start(ctx, d.path, bpf.Options{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(w.tracker.Stop(ctx), w.r.Close(), be.Close()); err != nil {
			t.Error(err)
		}
	})
	return w
}

// history is a tracker with its log.
type history struct {
	*epochlog.Session
	*bpf.Tracker
}

func (h history) Rotate(ctx context.Context) (kernel.Epoch, error) { return h.Session.Rotate(ctx) }

func (h history) Restart(_ context.Context, reason string) error { return errors.New(reason) }

// backup makes a snapshot of what the device holds at the instant.
func (w *watched) backup(at snapshot.Instant, precopy *snapshot.Precopy) (*snapshot.Summary, error) {
	w.t.Helper()
	ctx := context.Background()
	dev, err := device.Open(w.d.path, device.Options{})
	if err != nil {
		w.t.Fatal(err)
	}
	defer dev.Close()
	if err := w.r.LoadIndex(ctx); err != nil {
		w.t.Fatal(err)
	}
	s, err := epochlog.Open(ctx, w.tracker, w.state())
	if err != nil {
		w.t.Fatal(err)
	}
	defer s.Unlock()
	if err := s.Unlock(); err != nil {
		w.t.Fatal(err)
	}
	sum, err := snapshot.Backup(ctx, w.r, snapshot.Options{
		Device: dev, Name: "/watched", Host: "here", Time: time.Now(), History: history{s, w.tracker},
		Instant: at, Precopy: precopy, Warn: func(err error) { w.t.Error(err) },
	})
	if err == nil {
		w.t.Logf("%s: %d copies, read %d, dirty %d, stood still for %.3f s", sum.Changes, sum.Rounds, sum.BytesRead, sum.DirtyBytes, sum.FreezeSeconds)
	}
	return sum, err
}

func (w *watched) mustBackup(at snapshot.Instant, precopy *snapshot.Precopy) *snapshot.Summary {
	w.t.Helper()
	s, err := w.backup(at, precopy)
	if err != nil {
		w.t.Fatal(err)
	}
	return s
}

func (w *watched) state() string {
	for _, v := range w.vars {
		if dir, ok := strings.CutPrefix(v, "DSYNC_STATE_DIR="); ok {
			return dir
		}
	}
	return ""
}

// newestLayer adds up what the snapshot's newest layer describes.
func (w *watched) newestLayer(id repo.ID) layer.Stats {
	w.t.Helper()
	ctx, from := context.Background(), snapshot.Store{Repository: w.r}
	if err := w.r.LoadIndex(ctx); err != nil {
		w.t.Fatal(err)
	}
	sn, err := w.r.LoadSnapshot(ctx, id)
	if err != nil {
		w.t.Fatal(err)
	}
	devices, err := snapshot.Devices(ctx, from, id, sn)
	if err != nil {
		w.t.Fatal(err)
	}
	layers, err := layer.Open(ctx, from, devices[0].Manifest.Layers)
	if err != nil {
		w.t.Fatal(err)
	}
	st, err := layers[len(layers)-1].Stats(ctx, from)
	if err != nil {
		w.t.Fatal(err)
	}
	return st
}

// moment is an Instant of a test's making.
type moment struct {
	kind    snapshot.PointInTime
	settles func()       // between copies in use
	begins  func() error // makes the device stand still, and keeps the truth
	ends    func() error

	began time.Time
	took  time.Duration
}

// Kind implements snapshot.Instant.
func (m *moment) Kind() snapshot.PointInTime { return m.kind }

// Settle implements snapshot.Settler.
func (m *moment) Settle(context.Context) error {
	if m.settles != nil {
		m.settles()
	}
	return nil
}

// Begin implements snapshot.Instant.
func (m *moment) Begin(ctx context.Context) (context.Context, error) {
	m.began = time.Now()
	return ctx, m.begins()
}

// End implements snapshot.Instant.
func (m *moment) End() (time.Duration, error) {
	if m.began.IsZero() {
		return m.took, nil
	}
	m.took, m.began = time.Since(m.began), time.Time{}
	return m.took, m.ends()
}

// freezing is the moment at which a mounted file system is frozen, and a copy
// of the device is made.
func (d *disk) freezing(truth string) *moment {
	return &moment{
		kind:    snapshot.PointInTimePrecopy,
		settles: func() { run(d.t, "sync", "-f", d.mnt) },
		begins: func() error {
			run(d.t, "fsfreeze", "-f", d.mnt)
			d.image(truth)
			return nil
		},
		ends: func() error {
			run(d.t, "fsfreeze", "-u", d.mnt)
			return nil
		},
	}
}

// holdsTruth restores a snapshot and compares it.
func (w *watched) holdsTruth(s *snapshot.Summary, truth string) {
	w.t.Helper()
	w.restoresTo(s.SnapshotID.String(), truth)
}

func truthFile(t testing.TB) string { return filepath.Join(t.TempDir(), "truth") }
