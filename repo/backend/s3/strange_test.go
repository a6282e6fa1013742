// SPDX-License-Identifier: BSD-2-Clause

package s3_test

import (
	"errors"
	"net/http"
	"testing"

	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/repo/backend/backendtest"
	"github.com/dsync-backup/dsync-backup/repo/backend/miniotest"
	"github.com/dsync-backup/dsync-backup/repo/backend/retry"
	"github.com/dsync-backup/dsync-backup/repo/backend/s3"
)

// pageNotFound is how a load balancer answers that has lost its servers.
func pageNotFound(w http.ResponseWriter) {
	w.Header().Set("Content-Type", "text/html")
	w.WriteHeader(http.StatusNotFound)
	_, _ = w.Write([]byte("<html><body><h1>404 Not Found</h1></body></html>"))
}

func TestAStrangersNotFoundIsNoMissingFile(t *testing.T) {
	server := miniotest.Start(t)
	server.Setenv(t)
	server.MakeBucket("bucket")
	if err := open(t, server.Location("bucket", ""), s3.Options{}).Save(t.Context(), someFile, []byte("x")); err != nil {
		t.Fatal(err)
	}
	t.Run("ForEver", func(t *testing.T) {
		for _, region := range []string{"", "us-east-1"} {
			location := proxy(t, server, nil, func(_ http.Handler, w http.ResponseWriter, _ *http.Request) { pageNotFound(w) })
			for call, err := range everyCall(open(t, location, s3.Options{Region: region})) {
				if err == nil || errors.Is(err, backend.ErrNotExist) || errors.Is(err, backend.ErrNoStore) || errors.Is(err, backend.ErrPermanent) {
					t.Errorf("%s: %v", call, err)
				}
			}
		}
	})
	t.Run("ForAWhile", func(t *testing.T) {
		requests := 0
		location := proxy(t, server, nil, func(pass http.Handler, w http.ResponseWriter, r *http.Request) {
			if requests++; requests <= 4 {
				pageNotFound(w)
				return
			}
			pass.ServeHTTP(w, r)
		})
		be := retry.New(open(t, location, s3.Options{Region: "us-east-1"}), retry.Options{FirstWait: 1, MaxWait: 1})
		if fi, err := be.Stat(t.Context(), someFile); err != nil || fi.Size != 1 {
			t.Errorf("%d bytes, %v", fi.Size, err)
		}
	})
}

// TestAMissingFileIsOneWithoutAReasonToo has a server that gives no reason with
// its refusals: its listing then tells.
func TestAMissingFileIsOneWithoutAReasonToo(t *testing.T) {
	server := miniotest.Start(t)
	server.Setenv(t)
	server.MakeBucket("bucket")
	be := open(t, proxy(t, server, func(r *http.Response) error {
		if r.StatusCode == http.StatusNotFound {
			r.Body, r.ContentLength = http.NoBody, 0
			r.Header = http.Header{"Content-Length": {"0"}}
		}
		return nil
	}, passAll), s3.Options{})
	missing := backendtest.HandleOf(backend.PackFile, []byte("missing"))
	_, load := backendtest.Load(t.Context(), be, missing, 0, 0)
	_, part := backendtest.Load(t.Context(), be, missing, 5, 5)
	_, stat := be.Stat(t.Context(), missing)
	for _, err := range []error{load, part, stat, be.Remove(t.Context(), missing)} {
		if !errors.Is(err, backend.ErrNotExist) || errors.Is(err, backend.ErrNoStore) {
			t.Errorf("got %v", err)
		}
	}
	config := backend.Handle{Type: backend.ConfigFile}
	if err := be.Save(t.Context(), config, []byte("x")); err != nil {
		t.Error(err)
	}
}
