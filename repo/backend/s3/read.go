// SPDX-License-Identifier: BSD-2-Clause

package s3

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"

	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/minio/minio-go/v7"
)

// Load asks for exactly the range and refuses another length before fn runs.
func (b *Backend) Load(ctx context.Context, h backend.Handle, length int, offset int64, fn func(io.Reader) error) error {
	return b.do(ctx, "load", h, func(key string) error {
		if length < 0 || offset < 0 {
			return permanentf("read %d bytes at %d: %w", length, offset, backend.ErrRange)
		}
		ctx, cancel := context.WithCancel(ctx)
		defer cancel() // before Close, which would read the rest
		body, n, err := b.get(ctx, key, length, offset)
		if isCode(err, minio.InvalidRange) {
			return b.beyond(ctx, key, length, offset, fn)
		}
		if err != nil {
			return err
		}
		defer body.Close()
		return b.consume(body, n, fn)
	})
}

// get opens the object and says how many bytes follow: length, if it is not 0.
func (b *Backend) get(ctx context.Context, key string, length int, offset int64) (io.ReadCloser, int64, error) {
	if length == 0 && offset == 0 {
		body, info, _, err := b.open(ctx, key, minio.GetObjectOptions{})
		if err != nil || info.Size >= 0 {
			return body, info.Size, err
		}
		body.Close() // a proxy cut the answer into chunks; that to a range says how long it is
	}
	want := fmt.Sprintf("bytes=%d-", offset)
	if length > 0 {
		want = fmt.Sprintf("bytes=%d-%d", offset, offset+int64(length)-1)
	}
	body, r, err := b.getRange(ctx, key, want)
	if err != nil {
		return nil, 0, err
	}
	n := r.last - r.first + 1
	switch {
	case r.first == offset && (n == int64(length) || length == 0 && r.last == r.size-1):
		return body, n, nil
	case r.first == offset && length > 0 && r.last == r.size-1:
		err = backend.OutOfRange(length, offset, r.size)
	default:
		err = fmt.Errorf("read %d bytes at %d: the answer has bytes %d to %d of %d", length, offset, r.first, r.last, r.size)
	}
	body.Close()
	return nil, 0, err
}

// byteRange is what a Content-Range says.
type byteRange struct{ first, last, size int64 }

// getRange asks for a range. What the answer holds is read from its
// Content-Range: its length may be missing behind a proxy.
func (b *Backend) getRange(ctx context.Context, key, want string) (io.ReadCloser, byteRange, error) {
	var opts minio.GetObjectOptions
	opts.Set("Range", want)
	body, _, header, err := b.open(ctx, key, opts)
	if err != nil {
		return nil, byteRange{}, err
	}
	var r byteRange
	said := header.Get("Content-Range")
	if said == "" {
		body.Close()
		return nil, r, permanentf("read %s: the server or a proxy before it ignores ranges", want)
	}
	n, err := fmt.Sscanf(said, "bytes %d-%d/%d", &r.first, &r.last, &r.size)
	if n != 3 || err != nil || r.first < 0 || r.last < r.first || r.size <= r.last {
		body.Close()
		return nil, r, fmt.Errorf("read %s: the answer is for %q", want, oneLine(said))
	}
	return body, r, nil
}

// open sends the request. Whether the file is missing is left to the listing if
// the answer gives no reason.
func (b *Backend) open(ctx context.Context, key string, opts minio.GetObjectOptions) (io.ReadCloser, minio.ObjectInfo, http.Header, error) {
	body, info, header, err := b.core.GetObject(ctx, b.loc.Bucket, key, opts)
	var resp minio.ErrorResponse
	if !errors.As(err, &resp) || !unexplained(resp) {
		return body, info, header, err
	}
	for obj := range b.withPrefix(ctx, key, 1) {
		switch {
		case isCode(obj.Err, minio.NoSuchBucket):
			return nil, info, nil, obj.Err
		case obj.Err != nil || obj.Key == key:
			return nil, info, nil, err
		}
	}
	if ctx.Err() != nil {
		return nil, info, nil, ctx.Err()
	}
	return nil, info, nil, backend.ErrNotExist
}

// beyond handles a range that the server refused: it starts at the end of the
// file or behind it. Nothing from the very end on is a range that every file
// holds.
func (b *Backend) beyond(ctx context.Context, key string, length int, offset int64, fn func(io.Reader) error) error {
	size, err := b.head(ctx, key)
	if err != nil {
		return err
	}
	if length == 0 && offset == size {
		return b.consume(bytes.NewReader(nil), 0, fn)
	}
	return backend.OutOfRange(length, offset, size)
}

func (b *Backend) consume(body io.Reader, n int64, fn func(io.Reader) error) error {
	r := &backend.WatchedReader{R: backend.ExactReader(body, n)}
	err := fn(r)
	if err != nil && r.Err != nil {
		return fmt.Errorf("read the answer: %w", r.Err)
	}
	return consumed(err)
}

// Stat asks for the object's head.
func (b *Backend) Stat(ctx context.Context, h backend.Handle) (backend.FileInfo, error) {
	fi := backend.FileInfo{Name: h.Name}
	err := b.do(ctx, "stat", h, func(key string) (err error) {
		fi.Size, err = b.head(ctx, key)
		return err
	})
	if err != nil {
		return backend.FileInfo{}, err
	}
	return fi, nil
}

// head asks for the object's size. The answer to a HEAD has no body that could
// tell a missing key from a missing bucket, or what is wrong with the
// signature, so a refusal is asked for again by a GET; and so is a length that
// a proxy has left out.
func (b *Backend) head(ctx context.Context, key string) (int64, error) {
	info, err := b.core.StatObject(ctx, b.loc.Bucket, key, minio.StatObjectOptions{})
	if err != nil && !errors.As(err, new(minio.ErrorResponse)) {
		return 0, err
	}
	if err == nil && info.Size >= 0 {
		return info.Size, nil
	}
	body, r, err := b.getRange(ctx, key, "bytes=0-0")
	if isCode(err, minio.InvalidRange) {
		return 0, nil // there is no first byte
	}
	if err != nil {
		return 0, err
	}
	body.Close()
	return r.size, nil
}
