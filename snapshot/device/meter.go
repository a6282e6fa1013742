// SPDX-License-Identifier: BSD-2-Clause

package device

import (
	"context"
	"sync"
	"time"
)

// What a device is taken for as long as nothing was measured: a slow disk.
const (
	unknownRate  = 50 << 20 // bytes a second
	unknownReads = 200      // reads a second
	// leastReads is how many reads are worth being called a measurement.
	leastReads = 100
)

// Meter measures how fast a device is read: the time in which at least one
// read was under way counts, and that in which others were waited for does
// not.
type Meter struct {
	mu     sync.Mutex
	active int
	since  time.Time
	now    measured
	last   measured // the newest that means anything
}

type measured struct {
	busy         time.Duration
	bytes, reads int64
}

// Restart begins another measurement.
func (m *Meter) Restart() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.best()
	m.now = measured{}
}

func (m *Meter) best() measured {
	if m.now.reads >= leastReads {
		m.last = m.now
	}
	return m.last
}

// Estimate is about how long it takes to read so many bytes in so many extents, were they as
// scattered as what was measured, or in as many reads, whichever is slower.
func (m *Meter) Estimate(bytes, extents int64) time.Duration {
	m.mu.Lock()
	defer m.mu.Unlock()
	b := m.best()
	perByte, perRead := 1/float64(unknownRate), 1/float64(unknownReads)
	if b.reads > 0 {
		perByte, perRead = b.busy.Seconds()/float64(b.bytes), b.busy.Seconds()/float64(b.reads)
	}
	return time.Duration(max(float64(bytes)*perByte, float64(extents)*perRead) * float64(time.Second))
}

// Of measures the reads of a source.
func (m *Meter) Of(s Source) Source { return metered{s, m} }

type metered struct {
	Source
	m *Meter
}

// ReadExtents implements [Source].
func (s metered) ReadExtents(ctx context.Context, reads []Read, most int) error {
	s.m.begin()
	defer s.m.end(reads)
	return s.Source.ReadExtents(ctx, reads, most)
}

func (m *Meter) begin() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.active == 0 {
		m.since = time.Now()
	}
	m.active++
}

func (m *Meter) end(reads []Read) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, r := range reads {
		m.now.bytes += int64(len(r.Into))
		m.now.reads++
	}
	if m.active--; m.active == 0 {
		m.now.busy += time.Since(m.since)
	}
}
