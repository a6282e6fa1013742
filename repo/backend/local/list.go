// SPDX-License-Identifier: BSD-2-Clause

package local

import (
	"context"
	"errors"
	"fmt"

	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/repo/backend/layout"
	"golang.org/x/sys/unix"
)

// List reads one folder at a time and calls fn for its files before it reads
// the next.
func (b *Backend) List(ctx context.Context, t backend.FileType, fn func(backend.FileInfo) error) error {
	if err := b.list(ctx, t, fn); err != nil {
		return fmt.Errorf("list %s files in %s: %w", t, b.path, explain(err))
	}
	return nil
}

func (b *Backend) list(ctx context.Context, t backend.FileType, fn func(backend.FileInfo) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	d, err := b.open()
	if errors.Is(err, unix.ENOENT) || err == nil && d.gone() {
		return b.missing(nil, t)
	}
	if err != nil {
		return err
	}
	switch t {
	case backend.ConfigFile:
		err = listNames(ctx, d, t, ".", []string{"config"}, fn)
	case backend.PackFile:
		for i := 0; i < 256 && err == nil; i++ {
			err = listDir(ctx, d, t, fmt.Sprintf("data/%02x", i), fn)
		}
	default:
		err = listDir(ctx, d, t, layout.Dir(t), fn)
	}
	if err == nil && d.gone() {
		return b.missing(d, t)
	}
	return err
}

func listDir(ctx context.Context, d *dir, t backend.FileType, folder string, fn func(backend.FileInfo) error) error {
	names, err := d.names(folder)
	if err != nil {
		return err
	}
	return listNames(ctx, d, t, folder, names, fn)
}

func listNames(ctx context.Context, d *dir, t backend.FileType, folder string, names []string, fn func(backend.FileInfo) error) error {
	for _, name := range names {
		if err := ctx.Err(); err != nil {
			return err
		}
		path := name
		if folder != "." {
			path = folder + "/" + name
		}
		h, ok := layout.Parse(t, path)
		if !ok {
			continue // a temporary file, or not ours
		}
		size, regular, err := d.stat(path)
		if errors.Is(err, unix.ENOENT) || err == nil && !regular {
			continue // removed meanwhile, or a folder
		}
		if err != nil {
			return err
		}
		if err := consumed(fn(backend.FileInfo{Name: h.Name, Size: size})); err != nil {
			return err
		}
	}
	return nil
}
