// SPDX-License-Identifier: BSD-2-Clause

package repo

import (
	"context"
	"fmt"
	"path"
	"strings"
)

// CleanCache drops cached blobs that the loaded index does not know any more,
// and says how many. It looks at every entry: a thing to do after a prune.
// Tables and snapshots need no cleaning, since loading and listing drop what is
// gone.
func (r *Repository) CleanCache(ctx context.Context) (removed int, err error) {
	for _, shard := range r.cache.list(blobFolder) {
		for _, name := range r.cache.list(path.Join(blobFolder, shard)) {
			if err := ctx.Err(); err != nil {
				return removed, fmt.Errorf("clean cache: %w", err)
			}
			if h, ok := parseBlobName(name); !ok || !r.Has(h) {
				r.cache.remove(path.Join(blobFolder, shard, name))
				removed++
			}
		}
	}
	return removed, nil
}

const blobFolder = "blobs"

// blobName is a blob's name in the cache.
func blobName(h BlobHandle) string {
	id := h.ID.String()
	return path.Join(blobFolder, id[:2], h.Type.String()+"-"+id)
}

func parseBlobName(name string) (h BlobHandle, ok bool) {
	kind, id, _ := strings.Cut(name, "-")
	if h.Type.UnmarshalText([]byte(kind)) != nil {
		return h, false
	}
	return h, h.ID.UnmarshalText([]byte(id)) == nil
}
