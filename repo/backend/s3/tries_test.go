// SPDX-License-Identifier: BSD-2-Clause

package s3_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"sync/atomic"
	"testing"

	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/repo/backend/backendtest"
	"github.com/dsync-backup/dsync-backup/repo/backend/miniotest"
	"github.com/dsync-backup/dsync-backup/repo/backend/retry"
	"github.com/dsync-backup/dsync-backup/repo/backend/s3"
)

// TestARequestThatFailsIsSentOnce counts what reaches the server: further tries
// are package retry's, which tells of them.
func TestARequestThatFailsIsSentOnce(t *testing.T) {
	(&miniotest.Server{AccessKey: "key", SecretKey: "secret"}).Setenv(t)
	for name, fail := range map[string]func(http.ResponseWriter){
		"Busy":   func(w http.ResponseWriter) { refuse(w, 503, "SlowDown") },
		"Broken": func(http.ResponseWriter) { panic(http.ErrAbortHandler) },
	} {
		t.Run(name, func(t *testing.T) {
			var requests atomic.Int32
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				requests.Add(1)
				fail(w)
			}))
			defer server.Close()
			be := open(t, "s3:"+server.URL+"/bucket", s3.Options{Region: "us-east-1"})
			if err := be.Save(t.Context(), someFile, []byte("x")); err == nil || requests.Load() != 1 {
				t.Errorf("%d requests, error %v", requests.Load(), err)
			}
		})
	}
}

// TestAConfigThatWeStoredIsNotInOurWay loses the answer to the PUT of the config
// file, on the way back to us or to a proxy, which sends the request again.
func TestAConfigThatWeStoredIsNotInOurWay(t *testing.T) {
	server := miniotest.Start(t)
	server.Setenv(t)
	config := backend.Handle{Type: backend.ConfigFile}
	for name, lose := range map[string]func(w http.ResponseWriter, again func(http.ResponseWriter)){
		"OnTheWayToUs":    func(http.ResponseWriter, func(http.ResponseWriter)) { panic(http.ErrAbortHandler) },
		"OnTheWayToProxy": func(w http.ResponseWriter, again func(http.ResponseWriter)) { again(w) },
	} {
		t.Run(name, func(t *testing.T) {
			server.MakeBucket("bucket")
			defer server.RemoveBucket("bucket")
			lost := 0
			location := proxy(t, server, nil, func(pass http.Handler, w http.ResponseWriter, r *http.Request) {
				if r.Method != http.MethodPut || lost > 0 {
					pass.ServeHTTP(w, r)
					return
				}
				lost++
				body, err := io.ReadAll(r.Body)
				if err != nil {
					panic(http.ErrAbortHandler)
				}
				send := func(w http.ResponseWriter) {
					r.Body = io.NopCloser(bytes.NewReader(body))
					pass.ServeHTTP(w, r)
				}
				send(httptest.NewRecorder())
				lose(w, send)
			})
			be := retry.New(open(t, location, s3.Options{}), retry.Options{FirstWait: 1, MaxWait: 1})
			if err := be.Save(t.Context(), config, []byte("ours")); err != nil || lost != 1 {
				t.Errorf("%d answers were lost, error %v", lost, err)
			}
			if err := be.Save(t.Context(), config, []byte("others'")); !errors.Is(err, backend.ErrExist) {
				t.Errorf("another config: %v", err)
			}
		})
	}
}

// TestARegionIsLearntFromARefusal has a server that is wrong about where the
// bucket is when it is asked for that, and right when it refuses a request.
func TestARegionIsLearntFromARefusal(t *testing.T) {
	server := miniotest.Start(t, miniotest.WithEnv("MINIO_SITE_REGION=mars-north-1"))
	server.Setenv(t)
	ctx := t.Context()
	be := open(t, server.Location("bucket", ""), s3.Options{})
	if err := errors.Join(be.Create(ctx), be.Save(ctx, someFile, []byte("x"))); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		call func(be backend.Backend) error
	}{
		{"load", func(be backend.Backend) error { _, err := backendtest.Load(ctx, be, someFile, 0, 0); return err }},
		{"stat", func(be backend.Backend) error { _, err := be.Stat(ctx, someFile); return err }},
		{"list", func(be backend.Backend) error {
			files, err := backendtest.List(ctx, be, someFile.Type)
			if err == nil && len(files) != 1 {
				err = fmt.Errorf("%d files", len(files))
			}
			return err
		}},
		{"create", func(be backend.Backend) error { return be.Create(ctx) }},
		{"save", func(be backend.Backend) error { return be.Save(ctx, someFile, []byte("x")) }},
		{"remove", func(be backend.Backend) error { return be.Remove(ctx, someFile) }},
	} {
		refused := 0
		location := proxy(t, server, func(r *http.Response) error {
			if r.StatusCode == http.StatusBadRequest {
				refused++
			}
			return nil
		}, func(pass http.Handler, w http.ResponseWriter, r *http.Request) {
			if r.URL.Query().Has("location") {
				fmt.Fprint(w, `<?xml version="1.0" encoding="UTF-8"?><LocationConstraint xmlns="http://s3.amazonaws.com/doc/2006-03-01/"/>`)
				return
			}
			pass.ServeHTTP(w, r)
		})
		if err := c.call(open(t, location, s3.Options{})); err != nil || refused == 0 {
			t.Errorf("%s: %d refusals, error %v", c.name, refused, err)
		}
	}
}
