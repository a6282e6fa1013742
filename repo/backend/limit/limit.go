// SPDX-License-Identifier: BSD-2-Clause

// Package limit bounds the bytes per second that go to and come from a store,
// over all calls together.
//
// [New] decorates any store. For one on HTTP, [Limiter.Transport] limits the
// bodies on the wire instead, which spreads an upload evenly. It knows nothing
// of requests and files: only bytes are counted, not headers.
package limit

import (
	"context"
	"fmt"
	"io"
	"net/http"

	"github.com/dsync-backup/dsync-backup/repo/backend"
	"golang.org/x/time/rate"
)

// Rates are the limits in KiB (1024 bytes) per second; 0 is no limit.
type Rates struct {
	UploadKiB, DownloadKiB int
}

// maxStep is how many bytes go at once at most. A tenth of a second's worth is
// taken if that is less, so that slow rates flow too.
const maxStep = 64 << 10

// Limiter holds the two limits. It is for many goroutines and stores.
type Limiter struct {
	up, down *rate.Limiter // nil: no limit
}

// NewLimiter makes a limiter.
func NewLimiter(r Rates) *Limiter { return &Limiter{bucket(r.UploadKiB), bucket(r.DownloadKiB)} }

func bucket(kib int) *rate.Limiter {
	if kib <= 0 {
		return nil
	}
	perSecond := kib << 10
	return rate.NewLimiter(rate.Limit(perSecond), min(maxStep, max(perSecond/10, 1)))
}

// take waits until n bytes may pass.
func take(ctx context.Context, l *rate.Limiter, n int) error {
	for n > 0 && l != nil {
		step := min(n, l.Burst())
		if err := l.WaitN(ctx, step); err != nil {
			if cerr := context.Cause(ctx); cerr != nil {
				return cerr
			}
			return err
		}
		n -= step
	}
	return nil
}

// reader lets bytes through at the rate of l.
func reader(ctx context.Context, l *rate.Limiter, r io.Reader) io.Reader {
	if l == nil {
		return r
	}
	return &limitedReader{ctx, l, r}
}

type limitedReader struct {
	ctx context.Context
	l   *rate.Limiter
	r   io.Reader
}

func (r *limitedReader) Read(p []byte) (int, error) {
	n, err := r.r.Read(p[:min(len(p), r.l.Burst())])
	if terr := take(r.ctx, r.l, n); terr != nil {
		return n, terr
	}
	return n, err
}

// Backend decorates another one.
type Backend struct {
	backend.Backend
	l *Limiter
}

// New decorates be. A file to save is held back before the call, since the
// store takes it as a whole.
func New(be backend.Backend, l *Limiter) *Backend { return &Backend{be, l} }

// Unwrap is the decorated store.
func (b *Backend) Unwrap() backend.Backend { return b.Backend }

// Save waits until the data may pass.
func (b *Backend) Save(ctx context.Context, h backend.Handle, data []byte) error {
	if err := take(ctx, b.l.up, len(data)); err != nil {
		return fmt.Errorf("save %v: %w", h, err)
	}
	return b.Backend.Save(ctx, h, data)
}

// Load slows the reader that fn reads.
func (b *Backend) Load(ctx context.Context, h backend.Handle, length int, offset int64, fn func(io.Reader) error) error {
	return b.Backend.Load(ctx, h, length, offset, func(r io.Reader) error {
		return fn(reader(ctx, b.l.down, r))
	})
}

// Transport slows the bodies of requests and of answers.
func (l *Limiter) Transport(next http.RoundTripper) http.RoundTripper {
	if l.up == nil && l.down == nil {
		return next
	}
	return transport{l, next}
}

type transport struct {
	l    *Limiter
	next http.RoundTripper
}

type body struct {
	io.Reader
	io.Closer
}

func (t transport) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.Body != nil && req.Body != http.NoBody && t.l.up != nil {
		limited := *req // a round tripper must not change the request
		limited.Body = body{reader(req.Context(), t.l.up, req.Body), req.Body}
		limited.GetBody = nil // the client seeks and sends the request anew
		req = &limited
	}
	resp, err := t.next.RoundTrip(req)
	if err == nil && resp.Body != nil && t.l.down != nil {
		resp.Body = body{reader(req.Context(), t.l.down, resp.Body), resp.Body}
	}
	return resp, err
}
