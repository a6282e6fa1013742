// SPDX-License-Identifier: BSD-2-Clause

package layer

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/snapshot/blockindex"
)

// The files of a part.
const (
	indexFile = "index"
	dataFile  = "data"
	sumsFile  = "sums"
)

// PartFiles is the content of a part whose data and sums are stored already.
type PartFiles struct {
	Index   *blockindex.Index
	Data    []repo.ID
	Sums    []repo.ID
	SumSize int64
	Time    time.Time
}

// SavePart stores the index and the tree of a part and returns its node.
func SavePart(ctx context.Context, to Saver, f PartFiles) (*repo.Node, error) {
	fail := func(err error) (*repo.Node, error) {
		return nil, fmt.Errorf("save part at %d: %w", f.Index.Start, err)
	}
	if err := f.Index.Validate(); err != nil {
		return fail(err)
	}
	index, size, err := SaveFile(ctx, to, f.Index.Encode())
	if err != nil {
		return fail(err)
	}
	tree := &repo.Tree{Nodes: []*repo.Node{
		FileNode(dataFile, f.Data, f.Index.DataLength, f.Time),
		FileNode(indexFile, index, size, f.Time),
		FileNode(sumsFile, f.Sums, f.SumSize, f.Time),
	}}
	saved, err := to.SaveTree(ctx, tree)
	if err != nil {
		return fail(err)
	}
	return DirNode(formatName(uint64(f.Index.Start)), saved.ID, f.Time), nil
}

// SaveFile stores a small file of ours, in blobs of at most 1 MiB.
func SaveFile(ctx context.Context, to Saver, b []byte) (ids []repo.ID, size int64, err error) {
	size = int64(len(b))
	for len(b) > 0 {
		n := min(len(b), metaBlob)
		saved, err := to.SaveBlob(ctx, repo.KindMeta, b[:n])
		if err != nil {
			return nil, 0, err
		}
		ids, b = append(ids, saved.ID), b[n:]
	}
	return ids, size, nil
}

// formatName names layers by their number and parts by their first byte.
func formatName(n uint64) string { return fmt.Sprintf("%016x", n) }

func parseName(s string) (uint64, error) {
	n, err := strconv.ParseUint(s, 16, 64)
	if err != nil || formatName(n) != s {
		return 0, fmt.Errorf("name %q is not 16 hex digits", s)
	}
	return n, nil
}
