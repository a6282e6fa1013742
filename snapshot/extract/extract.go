// SPDX-License-Identifier: BSD-2-Clause

package extract

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/snapshot"
	"github.com/dsync-backup/dsync-backup/snapshot/device"
	"github.com/dsync-backup/dsync-backup/snapshot/stream"
)

// ErrNotBridged says that what changed since the target's position is not
// known. The text gives the reason.
var ErrNotBridged = errors.New("what changed since the target's position is not known")

// History is a tracker together with its epoch log.
type History interface {
	snapshot.History
	// Passed lists the newest positions after pos that the log holds, at most
	// limit, oldest first, without the last.
	Passed(pos kernel.Position, limit int) []kernel.Position
}

// Base is what the target holds already.
type Base struct {
	Position kernel.Position // it is complete up to it; zero if unknown
	// Partly is a position up to which it may have been brought in parts:
	// it must be of the same history too. Zero if there is none.
	Partly kernel.Position
}

// Options say what to send. Device, Instant and Source must be set.
type Options struct {
	Device  *device.Device
	Source  string  // the device's name in the stream: host:path
	History History // nil if nothing tracks the device
	Broken  string  // why History starts afresh although there was a tracker

	Instant snapshot.Instant
	// Precopy has the device copied in use first, so that it stands still for
	// the last copy only. It needs History.
	Precopy *snapshot.Precopy

	// Changes: empty sends what changed since Base if that is known, and else
	// compares if there are Sums, else fails with ErrNotBridged. A Base
	// without a position asks for everything. Tracker is the same without the
	// comparison.
	Changes snapshot.Changes
	Base    *Base // nil: the target holds nothing
	// Sums asks the target for its sums, of this many bytes. It is called
	// once, and nil if that is not possible.
	Sums func(ctx context.Context, size int64) (io.Reader, error)
	// Abort makes reads of the sums and writes to the target end with an
	// error. It is called when something fails; nil if they end by themselves.
	Abort func()

	Encoder  *zstd.Encoder // nil: not compressed
	Parallel int           // reads in flight; 0: device.DefaultParallel
	Progress func(snapshot.Progress)
	Warn     func(error)

	hold   int64 // bytes that the last copy keeps in memory; 0: holdBytes
	rounds int   // copies at most; 0: maxRounds
}

// Result says what was sent; its JSON is the summary of `extract --json`.
type Result struct {
	MessageType    string           `json:"message_type"` // "summary"
	Device         string           `json:"device"`
	DeviceSize     int64            `json:"device_size"`
	Stream         stream.ID        `json:"stream"`
	Changes        snapshot.Changes `json:"changes"`
	FallbackReason string           `json:"fallback_reason,omitempty"`
	From           *kernel.Position `json:"from"`
	Position       *kernel.Position `json:"position"` // what the target is complete up to; null without a tracker
	PointInTime    string           `json:"point_in_time"`
	Rounds         int              `json:"rounds"`
	DirtyBytes     int64            `json:"dirty_bytes"` // of the ranges that were looked at
	BytesRead      int64            `json:"bytes_read"`
	DataBytes      int64            `json:"data_bytes"` // sent, before compression
	ZeroBytes      int64            `json:"zero_bytes"`
	BytesSent      int64            `json:"bytes_sent"`
	FreezeSeconds  float64          `json:"freeze_seconds"`
	Duration       float64          `json:"duration_seconds"`
}

// send is one run.
type send struct {
	Options
	out    io.Writer
	w      *stream.Writer
	res    Result
	kind   stream.Kind
	dirty  *kernel.Bitmap
	frozen time.Duration

	epoch       *kernel.Epoch
	doubt       string
	uncommitted bool
	total, done int64

	sent  kernel.Position // up to which everything was sent by a copy in use
	meter device.Meter
}

// Send writes a stream to out. With an error the stream has no end, and is
// worth nothing to its reader. The tracker's epochs stay in the log.
func Send(ctx context.Context, out io.Writer, o Options) (*Result, error) {
	started := time.Now()
	if o.Warn == nil {
		o.Warn = func(error) {}
	}
	if o.Progress == nil {
		o.Progress = func(snapshot.Progress) {}
	}
	if o.Abort == nil {
		o.Abort = func() {}
	}
	if o.Parallel <= 0 {
		o.Parallel = device.DefaultParallel
	}
	o.hold, o.rounds = cmp.Or(o.hold, holdBytes), cmp.Or(o.rounds, maxRounds)
	s := &send{Options: o, out: out}
	if err := s.copy(ctx); err != nil {
		if s.w != nil {
			_ = s.w.Abort(err) // whoever still reads it knows why
		}
		return nil, err
	}
	if err := s.w.Close(); err != nil {
		return nil, err
	}
	r := &s.res
	r.MessageType, r.Device, r.DeviceSize = "summary", o.Device.Path(), o.Device.Size()
	r.PointInTime = string(o.Instant.Kind())
	r.BytesSent, r.FreezeSeconds, r.Duration = s.w.Bytes(), s.frozen.Seconds(), time.Since(started).Seconds()
	return r, nil
}

// choose decides what to send, now that an epoch has ended.
func (s *send) choose(ctx context.Context) error {
	reason := cmp.Or(s.doubt, s.Broken)
	switch s.Changes {
	case snapshot.ChangesFull:
		s.kind = stream.Full
		return nil
	case snapshot.ChangesCompare:
		s.kind = stream.Against
		if s.Sums == nil {
			return errors.New("there is nothing to compare with: have the target write its sums with `merge --sums TARGET`, and name that file with --sums")
		}
		return nil
	case "", snapshot.ChangesTracker:
	default:
		return fmt.Errorf("changes %q are not possible for a stream: use auto, tracker, compare or full", s.Changes)
	}
	if s.Base == nil {
		s.kind = stream.Full
		return nil
	}
	if s.epoch != nil && reason == "" {
		err := s.since(ctx)
		if err == nil {
			s.kind = stream.Since
			return nil
		}
		reason = err.Error()
	}
	if s.History == nil && reason == "" {
		reason = "nothing tracks " + s.Device.Path()
	}
	if s.Changes == snapshot.ChangesTracker || s.Sums == nil {
		return fmt.Errorf("%w: %s: use --changes compare, or full", ErrNotBridged, reason)
	}
	s.kind, s.res.FallbackReason = stream.Against, reason
	return nil
}

// since finds what was written since the target's position.
func (s *send) since(ctx context.Context) error {
	if s.Base.Position.IsZero() {
		return errors.New("the target is at no position")
	}
	if !s.Base.Partly.IsZero() {
		// It may hold blocks from up to there: they must be of this history.
		if _, err := s.History.Since(ctx, s.Base.Partly); err != nil {
			return fmt.Errorf("the target was brought in parts to %v: %w", s.Base.Partly, err)
		}
	}
	dirty, err := s.History.Since(ctx, s.Base.Position)
	if err != nil {
		return err
	}
	if want := kernel.BlocksOf(s.Device.Size()); dirty.Blocks() != want {
		return fmt.Errorf("the tracker knows of %d blocks, and the device has %d", dirty.Blocks(), want)
	}
	s.dirty = dirty
	return nil
}

// begin writes the header, and gives what is to be read.
func (s *send) begin(ctx context.Context, from *device.Device) (plan, error) {
	if err := s.choose(ctx); err != nil {
		return nil, err
	}
	h := stream.Header{Kind: s.kind, Size: s.Device.Size(), ID: stream.NewID(), Source: s.Source}
	if s.epoch != nil {
		h.To = s.epoch.Position
	}
	var spans plan
	switch s.kind {
	case stream.Since:
		h.From = s.Base.Position
		// Two epochs may have ended for this stream.
		h.Through = slices.DeleteFunc(s.History.Passed(h.From, stream.MaxThrough+2), func(p kernel.Position) bool { return p.Epoch >= h.To.Epoch })
		h.Through = h.Through[max(0, len(h.Through)-stream.MaxThrough):]
		s.res.From = &h.From
		s.res.Changes = snapshot.ChangesTracker
		s.total = dirtyBytes(s.dirty, h.Size)
		spans = ofBitmap(s.dirty, h.Size)
	default:
		s.total = h.Size
		data, err := from.DataExtents(ctx)
		if err != nil {
			return nil, err
		}
		spans = ofExtents(data, h.Size)
		s.res.Changes = snapshot.ChangesFull
	}
	if s.kind == stream.Against {
		s.res.Changes = snapshot.ChangesCompare
		r, err := s.Sums(ctx, h.Size)
		if err != nil {
			return nil, err
		}
		sums, err := newSums(r, h.Size)
		if err != nil {
			return nil, fmt.Errorf("read the target's sums: %w", err)
		}
		h.Base = sums.id()
		spans = against(spans, sums)
	}
	s.res.Stream = h.ID
	var err error
	s.w, err = stream.NewWriter(s.out, h)
	return spans, err
}

func (s *send) note(c counts) {
	s.res.DirtyBytes += c.looked
	s.res.BytesRead += c.read
	s.res.DataBytes += c.data
	s.res.ZeroBytes += c.zeros
	if s.epoch != nil {
		p := s.epoch.Position
		s.res.Position = &p
	}
	s.res.Rounds++
}
