// SPDX-License-Identifier: BSD-2-Clause

package freeze

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// WatchdogArg is the hidden first argument that makes the program a watchdog.
const WatchdogArg = "freeze-watchdog"

// IsWatchdog reports that this process was started as a watchdog: main calls
// [WatchdogMain] at once and exits with what it returns.
func IsWatchdog() bool { return len(os.Args) == 2 && os.Args[1] == WatchdogArg }

// WatchdogMain freezes and thaws as the parent orders, and thaws by itself on
// the deadline, on SIGTERM and when the parent is gone. It returns the exit
// code. It writes to nothing but its parent's socket.
func WatchdogMain() int {
	// It has a session of its own, so no terminal sends these; but somebody
	// may mean the whole program.
	signal.Ignore(unix.SIGINT, unix.SIGHUP, unix.SIGQUIT, unix.SIGPIPE, unix.SIGTSTP, unix.SIGUSR1, unix.SIGUSR2, unix.SIGALRM)
	term := make(chan os.Signal, 1)
	signal.Notify(term, unix.SIGTERM)

	w := &watchdog{term: term, done: make(chan error, 1), began: make(chan struct{})}
	if err := w.prepare(); err != nil {
		w.report(report{Kind: reportEnded, Ended: endedFailed, Text: err.Error()})
		return 1
	}
	w.report(report{Kind: reportReady})
	select {
	case o, ok := <-w.orders:
		if o != orderFreeze {
			if ok {
				w.report(report{Kind: reportEnded, Ended: endedThaw})
			}
			return 0
		}
	case <-term:
		w.report(report{Kind: reportEnded, Ended: endedTerminated})
		return 1
	}
	return w.hold()
}

type watchdog struct {
	socket *os.File
	enc    *json.Encoder
	orders chan order // closed when the parent is gone
	term   <-chan os.Signal
	config config
	files  []*os.File

	done  chan error    // of freezeAll
	began chan struct{} // closed before the first freeze

	mu       sync.Mutex // also orders the reports of the two goroutines
	frozen   []int      // indices, in the order in which they were frozen
	aborted  bool       // freezeAll shall freeze no more
	start    time.Time
	failedAt int
}

func (w *watchdog) prepare() error {
	w.socket = os.NewFile(socketFD, "parent")
	w.enc = json.NewEncoder(w.socket)
	dec := json.NewDecoder(w.socket)
	if err := dec.Decode(&w.config); err != nil {
		return fmt.Errorf("read configuration of the watchdog: %w", err)
	}
	for i, m := range w.config.Mounts {
		fd := firstMount + i
		unix.CloseOnExec(fd)
		w.files = append(w.files, os.NewFile(uintptr(fd), m.Name))
	}
	if err := lockProgram(); err != nil {
		return err
	}
	// Best effort: without the right to do so, the parent is the safeguard.
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0)
	w.orders = make(chan order)
	go func() {
		defer close(w.orders)
		for {
			var o order
			if dec.Decode(&o) != nil {
				return
			}
			w.orders <- o
		}
	}()
	return nil
}

// report drops what cannot be sent: then the parent is gone, and orders says so.
func (w *watchdog) report(r report) { _ = w.enc.Encode(r) }

// hold freezes, waits for a reason to thaw, thaws, and reports.
func (w *watchdog) hold() int {
	go w.freezeAll()
	began, done := w.began, w.done
	var deadline <-chan time.Time
	tooSlow := time.After(w.config.MaxSync)
	why := report{Kind: reportEnded}
	for why.Ended == "" {
		select {
		case <-began:
			began, tooSlow, deadline = nil, nil, time.After(w.config.MaxFreeze)
		case err := <-done:
			done = nil
			if err != nil {
				why.Ended = endedFailed
				why.Index, why.Errno = w.failedAt, errnoOf(err)
			}
		case _, ok := <-w.orders: // after freeze there is only thaw
			why.Ended = endedThaw
			if !ok {
				why.Ended = endedOrphaned
			}
		case <-tooSlow:
			why.Ended = endedSync
		case <-deadline:
			why.Ended = endedDeadline
		case <-w.term:
			why.Ended = endedTerminated
		}
	}
	resume(w.config.Resume)
	w.thawAll(&why)
	w.report(why)
	if done != nil {
		<-done //nolint:errcheck // a freeze that is still under way thaws as soon as it is done
	}
	if why.Ended != endedThaw {
		return 1
	}
	return 0
}

// freezeAll freezes in order. It runs beside hold, which must be able to thaw
// the first file systems while the freeze of the next is stuck, perhaps
// because it waits for them.
func (w *watchdog) freezeAll() {
	// What is written out now need not be written out while writers wait.
	for _, f := range w.files {
		if w.isAborted() {
			break
		}
		_ = unix.Syncfs(int(f.Fd())) // a failure shows again in the freeze
	}
	w.mu.Lock()
	w.start = time.Now()
	w.mu.Unlock()
	close(w.began)
	for i := range w.files {
		if err := w.freezeOne(i); err != nil {
			w.failedAt = i
			w.done <- err
			return
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.aborted {
		w.report(report{Kind: reportHolding})
	}
	w.done <- nil
}

func (w *watchdog) isAborted() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.aborted
}

func (w *watchdog) freezeOne(i int) error {
	w.mu.Lock()
	if w.aborted {
		w.mu.Unlock()
		return nil
	}
	w.report(report{Kind: reportFreezing, Index: i})
	w.mu.Unlock()

	err := freezeFS(w.files[i])

	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case err == nil && w.aborted:
		if thawRetry(w.files[i]) == nil {
			w.report(report{Kind: reportThawed, Index: i})
		}
	case err == nil:
		w.frozen = append(w.frozen, i)
		w.report(report{Kind: reportFrozen, Index: i})
	default:
		w.report(report{Kind: reportRefused, Index: i})
		// Nothing writes to it, so what cannot be frozen is still.
		if w.config.Mounts[i].ReadOnly && errors.Is(err, unix.EOPNOTSUPP) {
			return nil
		}
	}
	return err
}

// thawAll thaws in reverse, and says in r how long it was and what failed.
func (w *watchdog) thawAll(r *report) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.aborted = true
	for n := len(w.frozen) - 1; n >= 0; n-- {
		i := w.frozen[n]
		err := thawRetry(w.files[i])
		if err != nil && r.Ended == endedThaw {
			r.Ended, r.Index, r.Errno, r.Thaw = endedFailed, i, errnoOf(err), true
		}
		// What is not reported as thawed, the parent tries to thaw.
		if err == nil || errors.Is(err, unix.EINVAL) {
			w.report(report{Kind: reportThawed, Index: i})
		}
	}
	w.frozen = nil
	if !w.start.IsZero() {
		r.Frozen = time.Since(w.start)
	}
}

// thawRetry tries again what may pass, an error of the disk among them. Not
// frozen is final.
func thawRetry(f *os.File) (err error) {
	for range 50 {
		if err = thawFS(f); err == nil || errors.Is(err, unix.EINVAL) {
			return err
		}
		time.Sleep(100 * time.Millisecond)
	}
	return err
}

func errnoOf(err error) int {
	var errno unix.Errno
	errors.As(err, &errno)
	return int(errno)
}
