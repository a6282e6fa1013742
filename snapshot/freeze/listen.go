// SPDX-License-Identifier: BSD-2-Clause

package freeze

import (
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// listen follows what the watchdog reports until it is gone, and then thaws
// what it left. The end of file comes when the last of its threads has left the
// kernel, so no freeze of its own can follow. It never waits for anything but
// the watchdog.
func (f *Freezer) listen() {
	dec := json.NewDecoder(f.socket)
	for {
		var r report
		if dec.Decode(&r) != nil {
			break
		}
		f.note(r)
	}
	f.mu.Lock()
	if f.backstop != nil {
		f.backstop.Stop()
	}
	f.mu.Unlock()
	resume(f.options.Resume)
	err := f.rescue(true)
	f.finish(f.sinceBegan(), errors.Join(fmt.Errorf("freeze: %w", ErrWatchdog), err))
	_ = f.cmd.Wait() // its exit code says no more than its reports
	f.socket.Close()
	f.closeFiles()
	close(f.gone)
}

func (f *Freezer) note(r report) {
	f.mu.Lock()
	switch r.Kind {
	case reportReady:
		close(f.ready)
	case reportFreezing:
		f.states[r.Index] = freezing
		if f.began.IsZero() {
			f.began = time.Now()
			f.backstop.Reset(f.options.MaxFreeze + grace)
		}
	case reportFrozen:
		f.states[r.Index] = frozen
	case reportRefused, reportThawed:
		f.states[r.Index] = idle
	case reportHolding:
		close(f.holding)
	}
	f.mu.Unlock()
	if r.Kind == reportEnded {
		f.finish(r.Frozen, errors.Join(f.endError(r), f.rescue(false)))
	}
}

func (f *Freezer) endError(r report) error {
	switch r.Ended {
	case endedThaw, endedOrphaned: // orphaned is what Close asks for
		return nil
	case endedDeadline:
		return fmt.Errorf("freeze: %w: more than %v", ErrTooLong, f.options.MaxFreeze)
	case endedSync:
		return fmt.Errorf("freeze: %w: dirty data was not written out in %v", ErrTooLong, f.options.MaxSync)
	case endedTerminated:
		return fmt.Errorf("freeze: %w: it was terminated", ErrWatchdog)
	}
	switch {
	case r.Text != "":
		return fmt.Errorf("freeze: %w: %s", ErrWatchdog, r.Text)
	case r.Thaw:
		return thawError(f.mounts[r.Index].Path, unix.Errno(r.Errno))
	}
	return freezeError(f.mounts[r.Index].Path, unix.Errno(r.Errno))
}

// overdue runs when the watchdog should have thawed long ago: stopped, starved,
// or stuck in the freeze of another file system.
func (f *Freezer) overdue() {
	err := f.rescue(false)
	f.finish(f.sinceBegan(), errors.Join(fmt.Errorf("freeze: %w: the watchdog did not keep its deadline", ErrTooLong), err))
}

// rescue thaws what the watchdog reported as frozen and has not thawed. Once it
// is gone, that includes what it was about to freeze: its call has run to its
// end, and most likely worked. (If it was refused because somebody else's freeze
// was there first, and the watchdog was killed in the instant before it could
// say so, then that freeze ends here: a backup that another tool makes is lost,
// where the alternative is a machine that hangs.)
func (f *Freezer) rescue(gone bool) (err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for i := len(f.states) - 1; i >= 0; i-- {
		if f.states[i] == idle || f.states[i] == freezing && !gone {
			continue
		}
		thawErr := thawRetry(f.files[i])
		if thawErr != nil && !errors.Is(thawErr, unix.EINVAL) {
			err = errors.Join(err, thawError(f.mounts[i].Path, thawErr))
		}
		f.states[i] = idle
	}
	return err
}

func (f *Freezer) sinceBegan() time.Duration {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.began.IsZero() {
		return 0
	}
	return time.Since(f.began)
}

// finish records the first outcome, and tells those who wait.
func (f *Freezer) finish(d time.Duration, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.end.set {
		return
	}
	f.end = outcome{set: true, frozen: d, err: err}
	close(f.ended)
	if !f.thawing {
		close(f.expired)
	}
}
