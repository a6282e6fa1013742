// SPDX-License-Identifier: BSD-2-Clause

package backend

import (
	"errors"
	"fmt"
)

// Errors on which callers decide. Test with errors.Is.
var (
	// ErrNotExist says that the store is there and the file is not.
	ErrNotExist = errors.New("file does not exist")

	// ErrExist says that there is a config file already.
	ErrExist = errors.New("file already exists")

	// ErrPermanent marks what no retry can mend (a wrong key, a missing
	// bucket, a full disk, no permission). It adds nothing to the text of the
	// error that it marks: see [Permanent].
	ErrPermanent = errors.New("permanent error")

	// ErrNoStore says that what should hold the files is not there: the bucket
	// or the directory. It is permanent. Asked for the config file it is
	// ErrNotExist as well (there is no repository); for all others it is not,
	// since a store that went away is no proof that a file is gone.
	ErrNoStore = errors.New("no such store")

	// ErrRange says that a file is shorter than the range asked for. It is
	// permanent.
	ErrRange = errors.New("range is not inside the file")

	// ErrBroken says that the medium does not give what was asked for of a
	// file: a bad sector. It is permanent. Other ranges of the file may be
	// good. See [Broken].
	ErrBroken = errors.New("the medium is broken")
)

// permanentError is an error that also is ErrPermanent.
type permanentError struct{ err error }

func (e permanentError) Error() string        { return e.err.Error() }
func (e permanentError) Unwrap() error        { return e.err }
func (e permanentError) Is(target error) bool { return target == ErrPermanent }

// Permanent marks err as one that no retry can mend, so that
// errors.Is(err, ErrPermanent) holds. The text stays as it is; it should tell
// the user what to do. Permanent(nil) is nil.
func Permanent(err error) error {
	if err == nil {
		return nil
	}
	return permanentError{err}
}

// noStoreError is ErrNoStore with a text for the user.
type noStoreError struct {
	text   string
	config bool
}

func (e noStoreError) Error() string { return e.text }

func (e noStoreError) Is(target error) bool {
	return target == ErrNoStore || target == ErrPermanent || e.config && target == ErrNotExist
}

// NoStore is the [ErrNoStore] for an operation on files of type t; text tells
// the user what is missing.
func NoStore(t FileType, text string) error { return noStoreError{text, t == ConfigFile} }

// brokenError is an error that also is ErrBroken.
type brokenError struct{ permanentError }

func (e brokenError) Is(target error) bool { return target == ErrBroken || target == ErrPermanent }

// Broken marks err as one of the medium, so that errors.Is(err, ErrBroken)
// holds. The text stays as it is. Broken(nil) is nil.
func Broken(err error) error {
	if err == nil {
		return nil
	}
	return brokenError{permanentError{err}}
}

// OutOfRange is the [ErrRange] for length bytes (0: up to the end) from offset
// on of a file of size bytes.
func OutOfRange(length int, offset, size int64) error {
	return Permanent(fmt.Errorf("read %d bytes at %d of a file of %d bytes: %w", length, offset, size, ErrRange))
}
