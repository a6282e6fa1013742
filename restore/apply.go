// SPDX-License-Identifier: BSD-2-Clause

package restore

import (
	"context"
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/snapshot/device"
	"github.com/dsync-backup/dsync-backup/snapshot/stream"
)

// The phases of a merge.
const (
	PhaseMerging   = "merging"
	PhaseComparing = "comparing"
	PhaseSpooling  = "spooling"
)

// MergeResult is what `merge --json` says at the end.
type MergeResult struct {
	MessageType   string           `json:"message_type"` // "summary"
	Target        string           `json:"target"`
	Source        string           `json:"source"`
	Stream        stream.ID        `json:"stream"`
	Changes       string           `json:"changes"`
	Size          int64            `json:"size"`
	Position      *kernel.Position `json:"position"` // complete up to; null if nothing tracks the source
	BytesReceived int64            `json:"bytes_received"`
	BytesWritten  int64            `json:"bytes_written"`
	BytesZeroed   int64            `json:"bytes_zeroed"`
	Rounds        int              `json:"rounds"`
	Duration      float64          `json:"duration_seconds"`
}

// Apply applies a stream. When it returns without an error, the target holds
// what the source did, and that and its position are durable. Errors on which
// callers decide: [ErrNotFollowing], [ErrHasData], [ErrTooSmall], those of
// package stream. One that is [ErrIncomplete] comes after the target was
// touched; the target's state then says so, durably, until a stream mends it.
func (m *Merge) Apply(ctx context.Context, in io.Reader) (res *MergeResult, err error) {
	started := time.Now()
	defer func() {
		if err == nil {
			res.Duration = time.Since(started).Seconds()
			return
		}
		err = fmt.Errorf("merge to %s: %w", m.target.path, err)
		if m.started {
			err = fmt.Errorf("%w: %w (%s): %s", err, ErrIncomplete, m.Position(), m.mend())
		}
	}()
	in, done, err := m.spool(ctx, in)
	if err != nil {
		return nil, err
	}
	defer done()
	r, err := stream.NewReader(in)
	if err != nil {
		return nil, err
	}
	h := r.Header()
	if err := m.follows(h); err != nil {
		return nil, err
	}
	if m.target.kind == device.Block && m.target.size < h.Size {
		return nil, fmt.Errorf("%w: it has %d bytes, and %s has %d", ErrTooSmall, m.target.size, h.Source, h.Size)
	}
	if err := m.begin(ctx, h); err != nil {
		return nil, err
	}
	a := &applier{m: m, r: r, told: newProgress(PhaseMerging, h.Size, m.o.Progress)}
	if err := a.run(ctx); err != nil {
		return nil, err
	}
	if !m.o.Serving {
		if err := r.Trailing(); err != nil {
			return nil, err
		}
	}
	if err := m.finish(ctx, r, a); err != nil {
		return nil, err
	}
	res = &MergeResult{
		MessageType: "summary", Target: m.target.path, Source: h.Source, Stream: h.ID, Changes: h.Kind.String(), Size: h.Size,
		BytesReceived: r.Bytes(), BytesWritten: a.written.Load(), BytesZeroed: a.zeroed.Load(), Rounds: a.rounds,
	}
	if p := r.To(); !p.IsZero() {
		res.Position = &p
	}
	return res, nil
}

// mend says what makes an incomplete target whole again.
func (m *Merge) mend() string {
	if m.state.At.IsZero() {
		return "send the same again, or with --changes compare, or full"
	}
	return "send what changed since that position again, or with --changes compare, or full"
}

// begin notes durably that the target is about to be incomplete, and only then
// touches it.
func (m *Merge) begin(ctx context.Context, h stream.Header) error {
	t := m.target
	if m.absent() {
		if err := m.create(ctx); err != nil {
			return err
		}
	}
	identity, err := identify(ctx, t.path, t.kind)
	if err != nil {
		return err
	}
	s := &mergeState{
		Target: t.path, Identity: identity, Written: true, Source: h.Source, Size: h.Size, Stream: h.ID, Incomplete: true,
	}
	if h.Kind == stream.Since {
		// Where it was before stays its position until it is at another: what
		// is sent again has to begin there at the latest.
		s.At, s.Partly = m.state.At, h.To
		if m.state.Partly.Epoch > s.Partly.Epoch {
			s.Partly = m.state.Partly // the same stream again, cut short earlier
		}
	}
	if err := s.write(m.statePath); err != nil {
		return err
	}
	m.state, m.started = s, true
	if t.kind == device.Block {
		return nil
	}
	t.touched.Store(true)
	if h.Kind == stream.Full {
		if err := t.soft.Truncate(0); err != nil {
			return fmt.Errorf("empty target: %w", err)
		}
		t.sparse = true
	}
	if err := t.soft.Truncate(h.Size); err != nil {
		return fmt.Errorf("set size of target: %w", err)
	}
	return nil
}

// create makes the file.
func (m *Merge) create(ctx context.Context) error {
	t := m.target
	f, err := os.OpenFile(t.path, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return fmt.Errorf("create target: %w", err)
	}
	if err := f.Close(); err != nil {
		return fmt.Errorf("create target: %w", err)
	}
	t.created = true
	if err := t.open(); err != nil {
		return err
	}
	if err := lockFile(t.soft); err != nil {
		return err
	}
	identity, err := identify(ctx, t.path, t.kind)
	m.statePath = statePath(t.path, m.o.StateDir, t.kind, identity)
	return err
}

// round notes durably that the target is about to be brought further.
func (m *Merge) round(to kernel.Position) error {
	if m.state.At.IsZero() {
		return nil
	}
	s := *m.state
	if s.Partly.Epoch < to.Epoch {
		s.Partly = to
	}
	if err := s.write(m.statePath); err != nil {
		return err
	}
	m.state = &s
	return nil
}

// finish makes the target durable, and then its position.
func (m *Merge) finish(ctx context.Context, r *stream.Reader, a *applier) error {
	t, h := m.target, r.Header()
	if n := int64(len(a.tail)); n > 0 {
		if err := t.writeTail(a.tail, h.Size-n); err != nil {
			return err
		}
		a.written.Add(n)
	}
	if err := t.sync(); err != nil {
		return err
	}
	s := *m.state
	s.Size, s.At, s.Partly, s.Incomplete = h.Size, r.To(), kernel.Position{}, false
	if t.kind == device.File {
		if err := stampTime(t.soft); err != nil {
			return err
		}
		var err error
		if s.Changed, err = changeTime(t.soft); err != nil {
			return err
		}
		t.size = h.Size
	}
	if err := s.testify(ctx, t.path, a.sample.list(h.Size)); err != nil {
		return err
	}
	if err := s.write(m.statePath); err != nil {
		return err
	}
	m.state, m.started = &s, false
	return nil
}

// spool keeps a stream in a file until it is known to be whole.
func (m *Merge) spool(ctx context.Context, in io.Reader) (io.Reader, func(), error) {
	if m.o.Spool == "" {
		return in, func() {}, nil
	}
	f, err := os.CreateTemp(m.o.Spool, "dsync-stream-")
	if err != nil {
		return nil, nil, fmt.Errorf("spool the stream: %w", err)
	}
	done := func() { f.Close() }
	_ = os.Remove(f.Name()) // it goes with its descriptor
	err = m.keep(ctx, f, in)
	if err == nil {
		_, err = f.Seek(0, io.SeekStart)
	}
	if err != nil {
		done()
		return nil, nil, fmt.Errorf("spool the stream: %w: nothing of it was applied", err)
	}
	return f, done, nil
}

// keep checks all of a stream on its way into a file.
func (m *Merge) keep(ctx context.Context, f io.Writer, in io.Reader) error {
	r, err := stream.NewReader(io.TeeReader(in, f))
	if err != nil {
		return err
	}
	if err := m.follows(r.Header()); err != nil {
		return err // before all of it is sent
	}
	told := newProgress(PhaseSpooling, r.Header().Size, m.o.Progress)
	u, err := stream.NewUnpacker(r.Header(), 1)
	if err != nil {
		return err
	}
	defer u.Close()
	var rec stream.Record
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		ev, err := r.Next(&rec)
		if err != nil {
			return err
		}
		switch ev {
		case stream.GotEnd:
			if m.o.Serving {
				return nil
			}
			return r.Trailing()
		case stream.GotRound:
			continue
		}
		b, err := u.Unpack(&rec)
		if err != nil {
			return err
		}
		told.add(b.Length())
	}
}
