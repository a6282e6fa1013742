// SPDX-License-Identifier: BSD-2-Clause

package s3

import (
	"context"
	"fmt"
	"iter"
	"strings"

	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/repo/backend/layout"
	"github.com/minio/minio-go/v7"
)

// List reads the server's listing page by page, and calls fn for each page
// before it asks for the next.
func (b *Backend) List(ctx context.Context, t backend.FileType, fn func(backend.FileInfo) error) error {
	if err := b.regional(func() error { return b.list(ctx, t, fn) }); err != nil {
		return fmt.Errorf("list %s files in %s: %w", t, b.loc, b.explain(t, err))
	}
	return nil
}

func (b *Backend) list(ctx context.Context, t backend.FileType, fn func(backend.FileInfo) error) error {
	folder := "config"
	if t != backend.ConfigFile {
		folder = layout.Dir(t) + "/"
	}
	root := strings.TrimSuffix(b.loc.key("config"), "config")
	for obj := range b.objects(ctx, folder, 0) {
		if obj.Err != nil {
			return obj.Err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		h, ok := layout.Parse(t, strings.TrimPrefix(obj.Key, root))
		if !ok {
			continue
		}
		if err := consumed(fn(backend.FileInfo{Name: h.Name, Size: obj.Size})); err != nil {
			return err
		}
	}
	return ctx.Err() // a done context ends the listing without an error
}

// objects lists what lies under a path of the repository; pageSize 0 leaves
// the size of a page to the server (1000).
func (b *Backend) objects(ctx context.Context, folder string, pageSize int) iter.Seq[minio.ObjectInfo] {
	prefix := b.loc.key(folder)
	if strings.HasSuffix(folder, "/") {
		prefix += "/" // which joining cleaned away
	}
	return b.withPrefix(ctx, prefix, pageSize)
}

func (b *Backend) withPrefix(ctx context.Context, prefix string, pageSize int) iter.Seq[minio.ObjectInfo] {
	return b.core.ListObjectsIter(ctx, b.loc.Bucket, minio.ListObjectsOptions{
		Prefix: prefix, Recursive: true, UseV1: b.opts.ListV1, MaxKeys: pageSize, FetchOwner: new(bool),
	})
}
