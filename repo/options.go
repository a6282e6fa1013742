// SPDX-License-Identifier: BSD-2-Clause

package repo

import (
	"fmt"
	"log/slog"
)

// Compression is how hard blobs are compressed with zstd. Trees, snapshots and
// indexes are compressed in any case, as restic does.
type Compression string

// The modes of compression, named as restic names them. The zero value is
// CompressionAuto.
const (
	CompressionAuto    Compression = "auto"
	CompressionOff     Compression = "off"
	CompressionFastest Compression = "fastest"
	CompressionBetter  Compression = "better"
	CompressionMax     Compression = "max"
)

// ParseCompression reads the name of a mode.
func ParseCompression(s string) (Compression, error) {
	switch c := Compression(s); c {
	case CompressionAuto, CompressionOff, CompressionFastest, CompressionBetter, CompressionMax:
		return c, nil
	case "":
		return CompressionAuto, nil
	}
	return "", fmt.Errorf("compression %q is not one of auto, off, fastest, better, max", s)
}

// Sizes of packs, in bytes.
const (
	MinPackSize     = 4 << 20
	DefaultPackSize = 16 << 20
	MaxPackSize     = 128 << 20
)

// Options say how a repository is used. The zero value is good.
type Options struct {
	Compression Compression
	PackSize    int    // no pack grows beyond it, in bytes; 0 means DefaultPackSize
	CacheDir    string // holds a folder for each repository; "" means no cache
	Logger      *slog.Logger

	// Keys, if set, keeps what is derived from passwords, which takes half a
	// second each time.
	Keys KeyStore

	// KDF is for Init: how costly the password is to guess. The zero value
	// measures this machine and takes about half a second.
	KDF KDFParams
}

// KeyStore keeps keys that open files below keys/, by the files' IDs. What
// fails is logged, and costs a derivation. It is trusted: what it gives opens
// the repository without a password.
type KeyStore interface {
	// Get gives nil if it has no such key.
	Get(name string) ([]byte, error)
	Put(name string, key []byte) error
	Drop(name string) error
}

func (o Options) withDefaults() (Options, error) {
	c, err := ParseCompression(string(o.Compression))
	if err != nil {
		return o, err
	}
	o.Compression = c
	if o.PackSize == 0 {
		o.PackSize = DefaultPackSize
	}
	if o.PackSize < MinPackSize || o.PackSize > MaxPackSize {
		return o, fmt.Errorf("pack size of %d bytes is not between %d and %d MiB", o.PackSize, MinPackSize>>20, MaxPackSize>>20)
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return o, nil
}
