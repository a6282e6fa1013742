// SPDX-License-Identifier: BSD-2-Clause

// Package s3 stores a repository in a bucket of an S3-compatible object store,
// under the same keys as restic.
//
// It promises what the server promises: once Save has returned, the server has
// acknowledged the whole object, sent in one request and checked there against
// its SHA-256 and MD5. Errors that no retry can mend are marked and say in one
// line what to do; all others are left to package retry. It knows nothing of
// what the files hold.
package s3

import (
	"bytes"
	"context"
	"crypto/md5" //nolint:gosec // S3's Content-MD5; object lock insists on it
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"sync/atomic"

	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/repo/backend/layout"
	"github.com/minio/minio-go/v7"
)

// clientTries is how often the S3 client itself sends a request. Retries are
// package retry's, which reports them.
const clientTries = 1

// Backend is a store in a bucket.
type Backend struct {
	loc       Location
	opts      Options
	core      minio.Core
	transport *http.Transport
	keyID     string
	ahead     atomic.Int64 // see clockWatch
}

var _ backend.Backend = (*Backend)(nil)

// Open returns the store at loc. It finds the credentials, but does not
// contact the store yet.
func Open(ctx context.Context, loc Location, o Options) (*Backend, error) {
	if o.Connections <= 0 {
		o.Connections = DefaultConnections
	}
	if o.Region == "" {
		o.Region = os.Getenv("AWS_DEFAULT_REGION")
	}
	lookup, err := o.lookup()
	if err != nil {
		return nil, permanentf("set option s3.bucket-lookup: %w", err)
	}
	b := &Backend{loc: loc, opts: o}
	if b.transport, err = newTransport(o); err != nil {
		return nil, err
	}
	creds, keyID, err := findCredentials(ctx, o)
	if err != nil {
		return nil, err
	}
	b.keyID = keyID
	var rt http.RoundTripper = b.transport
	if o.Wrap != nil {
		rt = o.Wrap(rt)
	}
	client, err := minio.New(loc.Host, &minio.Options{
		Creds: creds, Secure: !loc.HTTP, Region: o.Region, BucketLookup: lookup,
		Transport: ownBody{clockWatch{rt, &b.ahead}}, MaxRetries: clientTries,
	})
	if err != nil {
		return nil, permanentf("open %s: %w", loc, err)
	}
	b.core = minio.Core{Client: client}
	return b, nil
}

// Location is the full form of the location.
func (b *Backend) Location() string { return b.loc.String() }

// Connections is as set in Options.
func (b *Backend) Connections() int { return b.opts.Connections }

// Close closes idle connections.
func (b *Backend) Close() error {
	b.transport.CloseIdleConnections()
	return nil
}

// Create makes the bucket if it is not there. A key that may not ask for the
// bucket may still be allowed to use it, so that is tried.
func (b *Backend) Create(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	// Listing, unlike a HEAD of the bucket, answers with the reason.
	err := b.regional(func() error {
		for obj := range b.objects(ctx, "config", 1) {
			return obj.Err
		}
		return nil
	})
	if err == nil || isCode(err, minio.AccessDenied) {
		return ctx.Err()
	}
	if isCode(err, minio.NoSuchBucket) {
		err = b.core.MakeBucket(ctx, b.loc.Bucket, minio.MakeBucketOptions{Region: b.opts.Region})
		switch {
		case isCode(err, minio.BucketAlreadyOwnedByYou): // made by somebody else meanwhile
			return nil
		case isCode(err, minio.BucketAlreadyExists):
			return permanentf("create bucket at %s: the name %q is taken by another account", b.loc.Host, b.loc.Bucket)
		}
	}
	if err != nil {
		return fmt.Errorf("create bucket %q at %s: %w", b.loc.Bucket, b.loc.Host, b.explain(0, err))
	}
	return nil
}

// do runs op on the handle's key and says in its error what was tried.
func (b *Backend) do(ctx context.Context, verb string, h backend.Handle, op func(key string) error) error {
	if err := h.Validate(); err != nil {
		return err
	}
	err := ctx.Err()
	if err == nil {
		err = b.regional(func() error { return op(b.loc.key(layout.Path(h))) })
	}
	if err != nil {
		return fmt.Errorf("%s %v in %s: %w", verb, h, b.loc, b.explain(h.Type, err))
	}
	return nil
}

// regional calls op, and once more if the answer told of another region, which
// the client has noted then. Such an answer is the first.
func (b *Backend) regional(op func() error) error {
	err := op()
	var resp minio.ErrorResponse
	if b.opts.Region != "" || errors.As(err, new(callerError)) || !errors.As(err, &resp) || resp.Region == "" {
		return err
	}
	switch resp.Code {
	case minio.AuthorizationHeaderMalformed, minio.InvalidRegion, minio.AccessDenied:
		return op()
	}
	return err
}

// Save puts the object in one request. For the config file the request is
// conditional; a server that does not know conditions is asked before.
func (b *Backend) Save(ctx context.Context, h backend.Handle, data []byte) error {
	return b.do(ctx, "save", h, func(key string) error {
		opts := minio.PutObjectOptions{ContentType: "application/octet-stream", StorageClass: b.storageClass(h)}
		if h.Type != backend.ConfigFile {
			return b.put(ctx, key, data, opts)
		}
		if _, err := b.head(ctx, key); err == nil {
			return backend.Permanent(backend.ErrExist)
		} else if !isCode(err, minio.NoSuchKey) && !errors.Is(err, backend.ErrNotExist) {
			return err
		}
		conditional := opts
		conditional.SetMatchETagExcept("*")
		err := b.put(ctx, key, data, conditional)
		switch {
		case isCode(err, minio.PreconditionFailed):
			return b.unlessStored(ctx, key, data)
		case isCode(err, minio.NotImplemented):
			return b.put(ctx, key, data, opts)
		}
		return err
	})
}

// unlessStored is ErrExist, unless the file that is there is data: a proxy may
// have sent our request twice.
func (b *Backend) unlessStored(ctx context.Context, key string, data []byte) error {
	body, n, err := b.get(ctx, key, 0, 0)
	if err != nil {
		return err
	}
	defer body.Close()
	stored, err := io.ReadAll(io.LimitReader(body, min(n, int64(len(data))+1)))
	if err == nil && !bytes.Equal(stored, data) {
		err = backend.Permanent(backend.ErrExist)
	}
	return err
}

func (b *Backend) put(ctx context.Context, key string, data []byte, opts minio.PutObjectOptions) error {
	sha, sum := sha256.Sum256(data), md5.Sum(data) //nolint:gosec // see the import
	_, err := b.core.PutObject(ctx, b.loc.Bucket, key, bytes.NewReader(data), int64(len(data)),
		base64.StdEncoding.EncodeToString(sum[:]), hex.EncodeToString(sha[:]), opts)
	return err
}

// storageClass keeps all but packs out of the archive classes, where restic
// could not read them.
func (b *Backend) storageClass(h backend.Handle) string {
	switch c := b.opts.StorageClass; c {
	case "GLACIER", "DEEP_ARCHIVE":
		if h.Type != backend.PackFile {
			return ""
		}
		return c
	default:
		return c
	}
}

// Remove looks first, since a server deletes what is not there without a word.
func (b *Backend) Remove(ctx context.Context, h backend.Handle) error {
	return b.do(ctx, "remove", h, func(key string) error {
		if _, err := b.head(ctx, key); err != nil {
			return err
		}
		return b.core.RemoveObject(ctx, b.loc.Bucket, key, minio.RemoveObjectOptions{})
	})
}

func isCode(err error, code string) bool {
	var resp minio.ErrorResponse
	return errors.As(err, &resp) && resp.Code == code && !unexplained(resp)
}
