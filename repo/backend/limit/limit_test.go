// SPDX-License-Identifier: BSD-2-Clause

package limit_test

import (
	"bytes"
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"testing"
	"time"

	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/repo/backend/backendtest"
	"github.com/dsync-backup/dsync-backup/repo/backend/limit"
)

func TestLimitIsABackend(t *testing.T) {
	backendtest.Run(t, backendtest.Decorated(func(be backend.Backend) backend.Backend {
		return limit.New(be, limit.NewLimiter(limit.Rates{UploadKiB: 1 << 20, DownloadKiB: 1 << 20}))
	}))
}

// atLeast checks that f took no less time than size bytes take at the rate,
// less the tenth of a second's worth that may go at once. A busy machine only
// makes it longer.
func atLeast(t *testing.T, what string, size, kib int, f func() error) {
	t.Helper()
	start := time.Now()
	if err := f(); err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	want := time.Duration(float64(size)/float64(kib<<10)*float64(time.Second)) - 100*time.Millisecond
	if d := time.Since(start); d < want {
		t.Errorf("%s of %d bytes at %d KiB/s took %s, less than %s", what, size, kib, d, want)
	}
}

func TestNoMoreBytesPassThanTheRateAllows(t *testing.T) {
	const size, kib = 80 << 10, 200
	ctx, data := context.Background(), make([]byte, size)
	h := backendtest.HandleOf(backend.PackFile, data)
	plain := backendtest.LocalStore(filepath.Join(t.TempDir(), "repo")).Open(t)
	defer plain.Close()
	if err := plain.Create(ctx); err != nil {
		t.Fatal(err)
	}
	up := limit.New(plain, limit.NewLimiter(limit.Rates{UploadKiB: kib}))
	atLeast(t, "save", size, kib, func() error { return up.Save(ctx, h, data) })
	down := limit.New(plain, limit.NewLimiter(limit.Rates{DownloadKiB: kib}))
	atLeast(t, "load", size, kib, func() error {
		got, err := backendtest.Load(ctx, down, h, 0, 0)
		if !bytes.Equal(got, data) {
			t.Errorf("loaded %d bytes that differ", len(got))
		}
		return err
	})
}

func TestTransportLimitsBodiesAndChangesNothingElse(t *testing.T) {
	const size, kib = 80 << 10, 200
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body := new(bytes.Buffer)
		if n, err := body.ReadFrom(r.Body); err != nil || n != r.ContentLength {
			w.WriteHeader(http.StatusBadRequest)
		}
		_, _ = w.Write(body.Bytes())
	}))
	defer server.Close()
	data := bytes.Repeat([]byte("limited "), size/8)
	for what, rates := range map[string]limit.Rates{"upload": {UploadKiB: kib}, "download": {DownloadKiB: kib}} {
		client := http.Client{Transport: limit.NewLimiter(rates).Transport(http.DefaultTransport)}
		atLeast(t, what, size, kib, func() error {
			resp, err := client.Post(server.URL, "text/plain", bytes.NewReader(data))
			if err != nil {
				return err
			}
			defer resp.Body.Close()
			got := new(bytes.Buffer)
			_, err = got.ReadFrom(resp.Body)
			if resp.StatusCode != http.StatusOK || !bytes.Equal(got.Bytes(), data) {
				t.Errorf("%s: %s, %d bytes came back", what, resp.Status, got.Len())
			}
			return err
		})
	}
}

func TestCancelEndsTheWaitForTheLimit(t *testing.T) {
	be := backendtest.LocalStore(filepath.Join(t.TempDir(), "repo")).Open(t)
	defer be.Close()
	if err := be.Create(context.Background()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	data := make([]byte, 100<<20) // a day's worth at 1 KiB/s
	h := backendtest.HandleOf(backend.PackFile, data)
	slow := limit.New(be, limit.NewLimiter(limit.Rates{UploadKiB: 1}))
	if err := slow.Save(ctx, h, data); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("save: %v", err)
	}
	if _, err := be.Stat(context.Background(), h); !errors.Is(err, backend.ErrNotExist) {
		t.Errorf("stat afterwards: %v", err)
	}
}
