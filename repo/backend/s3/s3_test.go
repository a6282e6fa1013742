// SPDX-License-Identifier: BSD-2-Clause

package s3_test

import (
	"bytes"
	"context"
	"fmt"
	"path"
	"sync/atomic"
	"testing"

	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/repo/backend/backendtest"
	"github.com/dsync-backup/dsync-backup/repo/backend/miniotest"
	"github.com/dsync-backup/dsync-backup/repo/backend/s3"
	"github.com/minio/minio-go/v7"
)

func open(t testing.TB, location string, o s3.Options) *s3.Backend {
	t.Helper()
	loc, err := s3.ParseLocation(location)
	if err != nil {
		t.Fatal(err)
	}
	be, err := s3.Open(context.Background(), loc, o)
	if err != nil {
		t.Fatal(err)
	}
	return be
}

// stores makes stores in buckets of the server that are not there yet.
func stores(server *miniotest.Server, prefix string, o s3.Options) func(testing.TB) backendtest.Store {
	var n atomic.Int32
	return func(testing.TB) backendtest.Store {
		bucket := fmt.Sprintf("bucket-%d-%s", n.Add(1), path.Base("x"+prefix))
		return backendtest.Store{
			Open: func(t testing.TB) backend.Backend { return open(t, server.Location(bucket, prefix), o) },
			Put: func(t testing.TB, p string, data []byte) {
				t.Helper()
				_, err := server.Client().PutObject(context.Background(), bucket, path.Join(prefix, p),
					bytes.NewReader(data), int64(len(data)), minio.PutObjectOptions{})
				if err != nil {
					t.Fatalf("put %s: %v", p, err)
				}
			},
		}
	}
}

func TestS3(t *testing.T) {
	server := miniotest.Start(t)
	server.Setenv(t)
	t.Run("prefix", func(t *testing.T) { backendtest.Run(t, stores(server, "some/prefix", s3.Options{})) })
	t.Run("no prefix", func(t *testing.T) { backendtest.Run(t, stores(server, "", s3.Options{})) })
	t.Run("old listing", func(t *testing.T) { backendtest.Run(t, stores(server, "v1", s3.Options{ListV1: true})) })
}

func TestS3OverTLS(t *testing.T) {
	server := miniotest.Start(t, miniotest.WithTLS())
	server.Setenv(t)
	backendtest.Run(t, stores(server, "secret", s3.Options{CACert: server.CACert, Region: "us-east-1"}))
}

func BenchmarkS3(b *testing.B) {
	server := miniotest.Start(b)
	server.Setenv(b)
	backendtest.Benchmark(b, stores(server, "bench", s3.Options{})(b))
}

func BenchmarkS3OverTLS(b *testing.B) {
	server := miniotest.Start(b, miniotest.WithTLS())
	server.Setenv(b)
	backendtest.Benchmark(b, stores(server, "bench", s3.Options{CACert: server.CACert})(b))
}
