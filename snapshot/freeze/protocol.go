// SPDX-License-Identifier: BSD-2-Clause

package freeze

import (
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// Errors on which callers decide. Test with errors.Is.
var (
	// ErrTooLong says that the deadline passed: the file systems were thawed
	// and what was read is no point in time.
	ErrTooLong = errors.New("the freeze took too long")
	// ErrFrozen says that somebody else has frozen the file system. What we
	// did not freeze, we do not thaw.
	ErrFrozen = errors.New("already frozen by somebody else")
	// ErrNotSupported says that the file system cannot be frozen.
	ErrNotSupported = errors.New("this type of file system cannot be frozen")
	// ErrThawed says that somebody else thawed a file system before we did.
	ErrThawed = errors.New("thawed by somebody else before the time")
	// ErrWatchdog says that the watchdog process ended before its work was
	// done; the file systems were thawed.
	ErrWatchdog = errors.New("the freeze watchdog ended early")
)

// The parent and the watchdog speak JSON over a socket pair. The parent sends
// a config and then orders; its end of file is an order to thaw and leave.
type config struct {
	Mounts    []fsConfig    `json:"mounts"` // in the order of freezing; descriptors from firstMount on
	MaxFreeze time.Duration `json:"max_freeze"`
	MaxSync   time.Duration `json:"max_sync"`
	Resume    []string      `json:"resume,omitempty"` // device-mapper devices
}

type fsConfig struct {
	Name     string `json:"name"`
	ReadOnly bool   `json:"read_only"`
}

// Descriptors that the watchdog inherits.
const (
	socketFD   = 3
	firstMount = 4
)

type order string

const (
	orderFreeze order = "freeze"
	orderThaw   order = "thaw"
)

// A report goes from the watchdog to the parent. "freezing" precedes the
// system call and "frozen" or "refused" follows it, so that the parent knows
// at each instant what it may have to thaw itself; "ended" is the last.
type report struct {
	Kind   reportKind    `json:"kind"`
	Index  int           `json:"index"`            // of the mount, for freezing, frozen, refused, thawed
	Ended  ending        `json:"ended,omitempty"`  // for ended
	Errno  int           `json:"errno,omitempty"`  // of the system call on Index that failed
	Thaw   bool          `json:"thaw,omitempty"`   // that call was a thaw
	Text   string        `json:"text,omitempty"`   // of any other failure
	Frozen time.Duration `json:"frozen,omitempty"` // from the first freeze to the last thaw
}

type reportKind string

const (
	reportReady    reportKind = "ready"
	reportFreezing reportKind = "freezing"
	reportFrozen   reportKind = "frozen"
	reportRefused  reportKind = "refused" // it is not frozen by us
	reportThawed   reportKind = "thawed"
	reportHolding  reportKind = "holding" // all are frozen
	reportEnded    reportKind = "ended"   // all are thawed
)

type ending string

const (
	endedThaw       ending = "thaw"       // as ordered
	endedFailed     ending = "failed"     // a freeze or a thaw did not work: Index, Errno, Text
	endedDeadline   ending = "deadline"   // MaxFreeze passed
	endedSync       ending = "sync"       // MaxSync passed
	endedTerminated ending = "terminated" // by SIGTERM
	endedOrphaned   ending = "orphaned"   // nobody is there to read it
)

func freezeError(name string, errno unix.Errno) error {
	switch errno {
	case unix.EBUSY:
		return fmt.Errorf("freeze %s: %w", name, ErrFrozen)
	case unix.EOPNOTSUPP, unix.ENOTTY:
		return fmt.Errorf("freeze %s: %w", name, ErrNotSupported)
	}
	return fmt.Errorf("freeze %s: %w", name, errno)
}

func thawError(name string, err error) error {
	if errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("thaw %s: %w", name, ErrThawed)
	}
	return fmt.Errorf("thaw %s (by hand: fsfreeze -u): %w", name, err)
}
