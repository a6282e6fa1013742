// SPDX-License-Identifier: BSD-2-Clause

package prune

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"

	"github.com/dsync-backup/dsync-backup/repo"
)

// Options say what to free. The zero value frees everything that is unused,
// however much has to be packed anew for it.
type Options struct {
	DryRun bool // only say what would be done

	// MaxUnused says how many bytes may stay unused, of so many used ones, in
	// packs that are partly used.
	MaxUnused func(used int64) int64
	// MaxRepack bounds what is packed anew, in bytes; 0 means no bound.
	// RepackNothing is a bound of 0.
	MaxRepack int64
	// SmallPack is the size in bytes below which packs count as small and are
	// put together, if there are ten of them at least; 0 means a 25th of the
	// pack size.
	SmallPack int64

	RepackCacheableOnly bool // pack only trees anew
	RepackSmall         bool // small is what is below 80 % of the pack size
	RepackUncompressed  bool // compress what is not

	// Ignore are snapshots that count as gone: those that a dry run of forget
	// would remove.
	Ignore map[repo.ID]bool

	// IsMeta reports whether the file of that name in a tree is small metadata,
	// which is packed apart from bulk data. It may be nil.
	IsMeta func(name string) bool

	Progress func(phase string, done, total int64) // may be nil; from many goroutines
	Warn     func(error)                           // may be nil
}

// RepackNothing is a MaxRepack that lets nothing be packed anew.
const RepackNothing = -1

// smallPacks is how many small packs are worth putting together.
const smallPacks = 10

// ParseMaxUnused reads restic's --max-unused: a percentage of what stays, a size
// in bytes, or unlimited.
func ParseMaxUnused(s string) (func(used int64) int64, error) {
	s = strings.TrimSpace(s)
	if s == "unlimited" {
		return func(int64) int64 { return math.MaxInt64 }, nil
	}
	if number, ok := strings.CutSuffix(s, "%"); ok {
		p, err := strconv.ParseFloat(number, 64)
		if err != nil || !(p >= 0 && p < 100) {
			return nil, fmt.Errorf("max-unused %q: want a percentage of at least 0 and below 100", s)
		}
		return func(used int64) int64 { return int64(p / (100 - p) * float64(used)) }, nil
	}
	n, err := repo.ParseSize(s)
	if err != nil {
		return nil, fmt.Errorf("max-unused %q: want a percentage, a size such as 500M, or unlimited", s)
	}
	return func(int64) int64 { return n }, nil
}

// Errors on which callers decide.
var (
	// ErrIncomplete says that a snapshot needs what is not there: nothing was
	// deleted, and nothing may be before that is mended.
	ErrIncomplete = errors.New("the repository lacks data that snapshots need")
	// ErrChanged says that somebody wrote to the repository in spite of the
	// lock.
	ErrChanged = errors.New("something was added meanwhile, in spite of the exclusive lock")
)

// Count is a number of blobs or packs, and their bytes in packs.
type Count struct {
	Count int64 `json:"count"`
	Bytes int64 `json:"bytes"`
}

func (c *Count) add(bytes int64) { c.Count++; c.Bytes += bytes }
func (c *Count) sub(bytes int64) { c.Count--; c.Bytes -= bytes }

// Summary says what was, or would be, done. Blobs' bytes are without the packs'
// headers.
type Summary struct {
	MessageType string `json:"message_type"` // "summary"
	DryRun      bool   `json:"dry_run"`
	Snapshots   int    `json:"snapshots"`

	Used       Count `json:"blobs_used"`
	Unused     Count `json:"blobs_unused"`
	Duplicate  Count `json:"blobs_duplicate"` // beyond the first of each
	Removed    Count `json:"blobs_removed"`   // with unused packs
	Repacked   Count `json:"blobs_repacked"`  // in packs that are packed anew
	RepackedRm Count `json:"blobs_repacked_removed"`

	PacksUsed       int   `json:"packs_used"` // wholly
	PacksPartlyUsed int   `json:"packs_partly_used"`
	PacksUnused     int   `json:"packs_unused"`
	PacksKept       int   `json:"packs_kept"`
	PacksRepacked   int   `json:"packs_repacked"`
	PacksRemoved    int   `json:"packs_removed"`
	PacksUnindexed  Count `json:"packs_unindexed"` // leftovers of what died
	PacksMissing    int   `json:"packs_missing"`   // of which nothing is needed

	Uncompressed int64 `json:"uncompressed_bytes"` // that stay so

	BytesBefore int64 `json:"bytes_before"` // of all packs
	BytesAfter  int64 `json:"bytes_after"`  // the same; after a dry run as expected
	UnusedAfter int64 `json:"bytes_unused_after"`

	IndexesWritten  int     `json:"indexes_written"`
	IndexesRemoved  int     `json:"indexes_removed"`
	DurationSeconds float64 `json:"duration_seconds"`
}
