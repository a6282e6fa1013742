// SPDX-License-Identifier: BSD-2-Clause

package backend

import (
	"context"
	"io"
)

// FileInfo is what List and Stat say of a file; sizes are in bytes.
type FileInfo struct {
	Name string
	Size int64
}

// Backend is a store. All methods may be called from many goroutines. They
// give up soon after ctx is done. Called with a ctx that is done already, none
// changes the store. Errors begin with what was tried and with which file.
type Backend interface {
	// Location is the store's name for messages, without secrets.
	Location() string

	// Connections is how many calls are worth having in flight.
	Connections() int

	// Save stores data under h and keeps no reference to it. It may be called
	// again with the same data after a failure. On return without error the
	// file is durable. A file that already exists is ErrExist for the config
	// file (of several Saves at a time one wins, if the store is able to tell)
	// and is replaced or left alone otherwise (names are hashes of contents,
	// except for keys' and locks', which are as good as unique).
	Save(ctx context.Context, h Handle, data []byte) error

	// Load calls fn with a reader of length bytes from offset on; length 0
	// means up to the end. The reader gives exactly that many bytes or an
	// error other than io.EOF; fn need not read them all. fn may be called
	// several times (a retry), and must be idempotent. An error that fn
	// returns by itself, that is, not after one of the reader, ends Load
	// without a retry. A range that the file does not hold is ErrRange.
	Load(ctx context.Context, h Handle, length int, offset int64, fn func(io.Reader) error) error

	// Stat says how long a file is, or ErrNotExist.
	Stat(ctx context.Context, h Handle) (FileInfo, error)

	// List calls fn for each file of a type, in no order, from one goroutine,
	// once per name. A folder that is not there holds no files. What is not
	// named as a file of that type (leftovers, others' files) is left out. An
	// error of fn ends List without a retry.
	List(ctx context.Context, t FileType, fn func(FileInfo) error) error

	// Remove deletes a file; ErrNotExist if there is none.
	Remove(ctx context.Context, h Handle) error

	// Create makes the folders or the bucket of a new repository. What is
	// there already is left as it is.
	Create(ctx context.Context) error

	Close() error
}
