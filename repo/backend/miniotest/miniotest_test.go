// SPDX-License-Identifier: BSD-2-Clause

package miniotest

import (
	"bytes"
	"context"
	"net"
	"testing"

	"github.com/minio/minio-go/v7"
)

func TestServerKeepsItsDataOverARestart(t *testing.T) {
	for name, opts := range map[string][]Option{"plain": nil, "TLS": {WithTLS()}} {
		t.Run(name, func(t *testing.T) {
			s := Start(t, opts...)
			s.MakeBucket("kept")
			ctx := context.Background()
			_, err := s.Client().PutObject(ctx, "kept", "x", bytes.NewReader([]byte("data")), 4, minio.PutObjectOptions{})
			if err != nil {
				t.Fatal(err)
			}
			s.Stop()
			if c, err := net.Dial("tcp", s.Host); err == nil {
				c.Close()
				t.Fatal("a stopped server takes connections")
			}
			s.Restart()
			info, err := s.Client().StatObject(ctx, "kept", "x", minio.StatObjectOptions{})
			if err != nil || info.Size != 4 {
				t.Fatalf("stat after the restart: %+v, %v", info, err)
			}
			s.RemoveBucket("kept")
			if ok, err := s.Client().BucketExists(ctx, "kept"); ok || err != nil {
				t.Fatalf("bucket is there after its removal: %v, %v", ok, err)
			}
		})
	}
}
