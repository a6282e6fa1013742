// SPDX-License-Identifier: BSD-2-Clause

package s3_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"testing"

	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/repo/backend/backendtest"
	"github.com/dsync-backup/dsync-backup/repo/backend/miniotest"
	"github.com/dsync-backup/dsync-backup/repo/backend/s3"
)

// proxy puts a handler in front of the server and returns the location of the
// bucket behind it. The handler gets what passes a request on; it may change
// the answer, if change is not nil.
func proxy(t testing.TB, server *miniotest.Server, change func(*http.Response) error,
	handler func(pass http.Handler, w http.ResponseWriter, r *http.Request),
) string {
	t.Helper()
	target, err := url.Parse(server.URL())
	if err != nil {
		t.Fatal(err)
	}
	pass := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.Out.URL.Scheme, r.Out.URL.Host = target.Scheme, target.Host // keeps Host, which is signed
		},
		ModifyResponse: change,
	}
	front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { handler(pass, w, r) }))
	t.Cleanup(front.Close)
	return "s3:" + front.URL + "/bucket"
}

func passAll(pass http.Handler, w http.ResponseWriter, r *http.Request) { pass.ServeHTTP(w, r) }

// TestAProxyThatLeavesLengthsOutIsUnderstood has it send the files in chunks.
func TestAProxyThatLeavesLengthsOutIsUnderstood(t *testing.T) {
	server := miniotest.Start(t)
	server.Setenv(t)
	server.MakeBucket("bucket")
	chunked := 0
	be := open(t, proxy(t, server, func(r *http.Response) error {
		if r.Header.Get("ETag") != "" {
			chunked++
			r.Header.Del("Content-Length")
			r.ContentLength = -1
		}
		return nil
	}, passAll), s3.Options{})
	ctx, rnd := context.Background(), backendtest.Rand(t)
	for _, size := range []int{0, 1, 100_000} {
		data := backendtest.Bytes(rnd, size)
		h := backendtest.HandleOf(backend.PackFile, data)
		if err := be.Save(ctx, h, data); err != nil {
			t.Fatal(err)
		}
		if fi, err := be.Stat(ctx, h); err != nil || fi.Size != int64(size) {
			t.Errorf("a file of %d bytes: stat says %d, %v", size, fi.Size, err)
		}
		for _, c := range []struct{ length, offset int }{{0, 0}, {0, size / 2}, {0, size}, {size / 2, size / 4}, {size, 0}} {
			got, err := backendtest.Load(ctx, be, h, c.length, int64(c.offset))
			end := c.offset + c.length
			if c.length == 0 {
				end = size
			}
			if err != nil || !bytes.Equal(got, data[c.offset:end]) {
				t.Errorf("%d bytes at %d of %d: got %d, %v", c.length, c.offset, size, len(got), err)
			}
		}
		for _, offset := range []int64{int64(size), int64(size) / 2, int64(size) + 5} {
			if _, err := backendtest.Load(ctx, be, h, size+1, offset); !errors.Is(err, backend.ErrRange) {
				t.Errorf("%d bytes at %d of %d: %v", size+1, offset, size, err)
			}
		}
	}
	if chunked < 20 {
		t.Errorf("only %d answers were changed", chunked)
	}
}

// TestAnAnswerThatIsTooShortMayPass has a proxy give less than was asked for,
// with or without saying so: the file is not damaged.
func TestAnAnswerThatIsTooShortMayPass(t *testing.T) {
	server := miniotest.Start(t)
	server.Setenv(t)
	server.MakeBucket("bucket")
	data := []byte("0123456789")
	h := backendtest.HandleOf(backend.PackFile, data)
	if err := open(t, server.Location("bucket", ""), s3.Options{}).Save(context.Background(), h, data); err != nil {
		t.Fatal(err)
	}
	for _, said := range []string{"bytes 2-8/10", "bytes 2-4/10", "bytes 3-8/10", "bytes 2-8/*", "nonsense"} {
		be := open(t, proxy(t, server, func(r *http.Response) error {
			if r.StatusCode == http.StatusPartialContent {
				r.Header.Del("Content-Length")
				r.Header.Set("Content-Range", said)
				r.Body, r.ContentLength = io.NopCloser(bytes.NewReader(data[2:5])), -1
			}
			return nil
		}, passAll), s3.Options{})
		got, err := backendtest.Load(context.Background(), be, h, 7, 2)
		if err == nil || errors.Is(err, backend.ErrPermanent) || errors.Is(err, backend.ErrNotExist) {
			t.Errorf("%s: got %q, error %v", said, got, err)
		}
	}
}
