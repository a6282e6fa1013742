// SPDX-License-Identifier: BSD-2-Clause

// Package backend stores whole, immutable files under a type and a name: all
// that a restic repository asks of a store.
//
// It promises that a file is either there as a whole or not at all, and that
// it survives a crash once Save has returned. It knows nothing of encryption,
// packs or snapshots.
package backend

import (
	"context"
	"errors"
	"fmt"
	"io"
)

// FileType says which folder of the repository a file lives in.
type FileType uint8

// The types of files in a repository.
const (
	ConfigFile FileType = iota + 1 // a single file, its name is empty
	KeyFile
	LockFile
	SnapshotFile
	IndexFile
	PackFile
)

var typeNames = map[FileType]string{
	ConfigFile: "config", KeyFile: "key", LockFile: "lock",
	SnapshotFile: "snapshot", IndexFile: "index", PackFile: "data",
}

func (t FileType) String() string { return typeNames[t] }

// Handle names a file.
type Handle struct {
	Type FileType
	Name string // hex of the SHA-256 for all but the config file
}

func (h Handle) String() string {
	if h.Type == ConfigFile {
		return "config"
	}
	return fmt.Sprintf("%s/%.10s", h.Type, h.Name)
}

// FileInfo is what List and Stat say of a file; sizes are in bytes.
type FileInfo struct {
	Name string
	Size int64
}

// Errors on which callers decide. Test with errors.Is.
var (
	ErrNotExist = errors.New("file does not exist")
	ErrExist    = errors.New("file already exists")
	// ErrPermanent marks what no retry can mend (a wrong key, a missing
	// bucket, a full disk, no permission). Its text tells the user what to do.
	ErrPermanent = errors.New("")
)

// Backend is a store. All methods may be called from many goroutines. They
// give up soon after ctx is done.
type Backend interface {
	// Location is the store's name for messages, without secrets.
	Location() string

	// Connections is how many calls are worth having in flight.
	Connections() int

	// Save stores data under h. It may be called again with the same data
	// after a failure. On return without error the file is durable. A file
	// that already exists is ErrExist for the config file and is replaced or
	// left alone otherwise (names are hashes of contents, except for keys'
	// and locks', which are as good as unique).
	Save(ctx context.Context, h Handle, data []byte) error

	// Load calls fn with a reader of length bytes from offset on; length 0
	// means up to the end. fn may be called several times (a retry), and must
	// be idempotent. A range that the file does not hold is an error.
	Load(ctx context.Context, h Handle, length int, offset int64, fn func(io.Reader) error) error

	// Stat says how long a file is, or ErrNotExist.
	Stat(ctx context.Context, h Handle) (FileInfo, error)

	// List calls fn for each file of a type, in no order, from one goroutine.
	// A folder that is not there holds no files.
	List(ctx context.Context, t FileType, fn func(FileInfo) error) error

	// Remove deletes a file; ErrNotExist if there is none.
	Remove(ctx context.Context, h Handle) error

	// Create makes the folders or the prefix of a new repository.
	Create(ctx context.Context) error

	Close() error
}
