// SPDX-License-Identifier: BSD-2-Clause

// Package keyring keeps keys in the Linux kernel: in the keyring of the user,
// which all of that user's processes share and nobody else reads, which is
// never written to a disk, and which ends with the machine's uptime.
//
// It knows nothing of what the keys are for.
package keyring

import (
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

const (
	prefix = "dsync-backup:" // of the keys' descriptions, as /proc/keys shows them

	// The permissions of a key, as keyctl(2) has them. Jobs of one user run in
	// sessions of their own, so that possession is not enough.
	possessor = 0x3f << 24                               // everything
	owner     = (0x01 | 0x02 | 0x04 | 0x08 | 0x20) << 16 // view, read, write, search, set attributes

	ring    = unix.KEY_SPEC_USER_KEYRING // of the real user ID
	maxKey  = 4096                       // bytes that Get reads
	maxKept = 90 * 24 * time.Hour
)

// Keyring keeps keys for a time.
type Keyring struct{ kept time.Duration }

// New makes a keyring whose keys expire so long after they were put in, be they
// used or not; from a second to 90 days.
func New(kept time.Duration) (*Keyring, error) {
	if kept < time.Second || kept > maxKept {
		return nil, fmt.Errorf("keys can be kept from 1s to %s, not %s", maxKept, kept)
	}
	return &Keyring{kept}, nil
}

// Get gives the key of that name, or nil if there is none (any more).
func (k *Keyring) Get(name string) ([]byte, error) {
	id, err := unix.KeyctlSearch(ring, "user", prefix+name, 0)
	if err != nil {
		return nil, absent(name, err)
	}
	buf := make([]byte, maxKey)
	n, err := unix.KeyctlBuffer(unix.KEYCTL_READ, id, buf, 0)
	if err != nil {
		return nil, absent(name, err)
	}
	if n > len(buf) {
		return nil, fmt.Errorf("read key %s from the kernel's keyring: it has %d bytes", name, n)
	}
	return buf[:n], nil
}

// absent is nil for a key that is not there.
func absent(name string, err error) error {
	if errors.Is(err, unix.ENOKEY) || errors.Is(err, unix.EKEYEXPIRED) || errors.Is(err, unix.EKEYREVOKED) {
		return nil
	}
	return fmt.Errorf("look for key %s in the kernel's keyring: %w", name, err)
}

// Put keeps a key, in place of one of the same name.
func (k *Keyring) Put(name string, key []byte) error {
	id, err := unix.AddKey("user", prefix+name, key, ring)
	if err != nil {
		return fmt.Errorf("put key %s into the kernel's keyring: %w", name, err)
	}
	_, err = unix.KeyctlInt(unix.KEYCTL_SET_TIMEOUT, id, int(k.kept/time.Second), 0, 0)
	if err == nil {
		err = unix.KeyctlSetperm(id, possessor|owner)
	}
	if err != nil {
		// It must not stay without an end.
		_, dropErr := unix.KeyctlInt(unix.KEYCTL_REVOKE, id, 0, 0, 0)
		return fmt.Errorf("put key %s into the kernel's keyring: %w", name, errors.Join(err, dropErr))
	}
	return nil
}

// Drop forgets a key.
func (k *Keyring) Drop(name string) error {
	id, err := unix.KeyctlSearch(ring, "user", prefix+name, 0)
	if err == nil {
		_, err = unix.KeyctlInt(unix.KEYCTL_REVOKE, id, 0, 0, 0)
	}
	if err != nil {
		return absent(name, err)
	}
	return nil
}
