// SPDX-License-Identifier: BSD-2-Clause

package restore

import "sync"

// The phases of a restore.
const (
	PhaseRestoring = "restoring"
	PhaseVerifying = "verifying"
)

// Progress tells how far a phase is, in bytes of the device.
type Progress struct {
	Phase       string
	Done, Total int64
}

// progress adds up and tells, one call at a time.
type progress struct {
	mu  sync.Mutex
	now Progress
	fn  func(Progress) // may be nil
}

func newProgress(phase string, total int64, fn func(Progress)) *progress {
	p := &progress{now: Progress{Phase: phase, Total: total}, fn: fn}
	p.add(0)
	return p
}

func (p *progress) add(n int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.now.Done += n
	if p.fn != nil {
		p.fn(p.now)
	}
}
