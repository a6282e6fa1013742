// SPDX-License-Identifier: BSD-2-Clause

// Package repo reads and writes a restic repository: keys, config, locks,
// snapshots, trees, packs and indexes, with a local cache of what is small.
//
// It promises that whatever it writes, stock restic (0.14 and later) reads;
// that packs are durable before the index that lists them, and indexes before
// the snapshot that needs them; and that it hands out no byte whose MAC and
// SHA-256 it has not checked. It writes format version 2 and reads version 1
// too. It knows nothing of devices, block indexes or what is in a file.
//
// docs/repository.md says what is written and where the cache keeps things.
package repo

import (
	"errors"

	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/repo/crypto"
	"github.com/dsync-backup/dsync-backup/repo/index"
	"github.com/dsync-backup/dsync-backup/repo/pack"
)

// The vocabulary of the repository, which sub-packages define.
type (
	// ID is the SHA-256 of a file as stored, or of a blob's plaintext.
	ID = pack.ID
	// BlobType says whether a blob is a piece of a file or a directory.
	BlobType = pack.BlobType
	// BlobHandle names a blob by type and ID.
	BlobHandle = pack.Handle
	// BlobLocation is a blob's place inside a pack that is known already.
	BlobLocation = pack.Blob
	// Location is a blob's place in the repository.
	Location = index.Location
	// KDFParams are scrypt's cost parameters.
	KDFParams = crypto.Params
)

// The types of blobs.
const (
	DataBlob = pack.DataBlob
	TreeBlob = pack.TreeBlob
)

// Hash is the ID of data.
func Hash(data []byte) ID { return pack.Hash(data) }

// ParseID reads 64 hex digits.
func ParseID(s string) (ID, error) { return pack.ParseID(s) }

// Errors on which callers decide. Test with errors.Is.
var (
	ErrNoRepository  = errors.New("there is no repository")
	ErrExist         = errors.New("there is a repository already")
	ErrWrongPassword = errors.New("wrong password, or no key for it")
	ErrVersion1      = errors.New("the repository has format version 1")
	ErrLocked        = errors.New("repository is locked")
	ErrLockLost      = errors.New("the lock on the repository was lost")
	ErrNoSnapshot    = errors.New("no snapshot found")
	ErrBlobNotFound  = errors.New("not in the repository's index")
	// ErrDamaged says that a file or a blob in the store is not what was
	// written there.
	ErrDamaged = errors.New("damaged in the repository")
)

// IsDamage tells an error about what is damaged or missing from one of a store
// that does not answer.
func IsDamage(err error) bool {
	return errors.Is(err, ErrDamaged) || errors.Is(err, ErrBlobNotFound) ||
		errors.Is(err, backend.ErrNotExist) || errors.Is(err, backend.ErrRange)
}
