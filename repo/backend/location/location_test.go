// SPDX-License-Identifier: BSD-2-Clause

package location_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/repo/backend/backendtest"
	"github.com/dsync-backup/dsync-backup/repo/backend/limit"
	"github.com/dsync-backup/dsync-backup/repo/backend/location"
	"github.com/dsync-backup/dsync-backup/repo/backend/miniotest"
	"github.com/minio/minio-go/v7"
)

var rates = limit.Rates{UploadKiB: 1 << 20, DownloadKiB: 1 << 20}

func TestOpenedDirectoryIsABackend(t *testing.T) {
	backendtest.Run(t, func(t testing.TB) backendtest.Store {
		dir := filepath.Join(t.TempDir(), "repo")
		return backendtest.Store{Put: backendtest.LocalStore(dir).Put, Open: opener("local:"+dir, location.Options{Rates: rates})}
	})
}

func TestOpenedBucketIsABackend(t *testing.T) {
	server := miniotest.Start(t, miniotest.WithTLS())
	server.Setenv(t)
	n := 0
	backendtest.Run(t, func(testing.TB) backendtest.Store {
		n++
		bucket := "bucket-" + string(rune('a'+n))
		return backendtest.Store{
			Open: opener(server.Location(bucket, "host/disk"), location.Options{
				CACert: server.CACert, Rates: rates,
				Extended: map[string]string{"s3.region": "us-east-1", "s3.connections": "3", "s3.bucket-lookup": "path"},
			}),
			Put: func(t testing.TB, path string, data []byte) {
				_, err := server.Client().PutObject(context.Background(), bucket, "host/disk/"+path,
					bytes.NewReader(data), int64(len(data)), minio.PutObjectOptions{})
				if err != nil {
					t.Fatal(err)
				}
			},
		}
	})
}

func opener(loc string, o location.Options) func(testing.TB) backend.Backend {
	return func(t testing.TB) backend.Backend {
		t.Helper()
		be, err := location.Open(context.Background(), loc, o)
		if err != nil {
			t.Fatal(err)
		}
		return be
	}
}

func TestLocationsReadAsInRestic(t *testing.T) {
	wd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for in, want := range map[string]string{
		"/srv/repo":                       "/srv/repo",
		"/srv/with:colon":                 "/srv/with:colon",
		"local:/srv/repo/":                "/srv/repo",
		"local:s3:x":                      wd + "/s3:x",
		"repo":                            wd + "/repo",
		"./re:po":                         wd + "/re:po",
		"s3:http://127.0.0.1:9000/b":      "s3:http://127.0.0.1:9000/b",
		"s3:https://host/bucket/a/b/":     "s3:https://host/bucket/a/b",
		"s3:https://host/bucket/":         "s3:https://host/bucket",
		"s3:s3.amazonaws.com/bucket":      "s3:https://s3.amazonaws.com/bucket",
		"s3://host:9000/bucket/p/../q/./": "s3:https://host:9000/bucket/q",
		"s3:httpbin.example/bucket":       "s3:https://httpbin.example/bucket",
		"s3:https://host/bucket/a%20b":    "s3:https://host/bucket/a b",
	} {
		l, err := location.Parse(in)
		if err != nil || l.String() != want {
			t.Errorf("Parse(%q) is %q, error %v; want %q", in, l, err, want)
		}
	}
}

func TestBadLocationsSayWhatIsWrongAndShowNoSecret(t *testing.T) {
	for in, want := range map[string]string{
		"":                                   "empty",
		"local:":                             "no path",
		"sftp:user@host:/hunter2":            "restic's sftp: is not supported, supported are",
		"rest:https://user:hunter2@host/":    "restic's rest: is not supported",
		"b2:bucket:hunter2":                  "restic's b2: is not supported",
		"KEYhunter2:x":                       "no known scheme",
		"s3:":                                "no host",
		"s3:https://host":                    "no bucket",
		"s3:host/":                           "no bucket",
		"s3:https:///bucket":                 "no host",
		"s3:https://key:hunter2@host/bucket": "AWS_ACCESS_KEY_ID",
		"s3:key:hunter2@host/bucket":         "AWS_ACCESS_KEY_ID",
		"s3:https://host/bucket?X-Amz-Key=hunter2": "?",
		"s3:https://ho st:hunter2/bucket":          "not a valid URL",
		"s3:host/bucket/../../x":                   "leads out",
	} {
		_, err := location.Open(context.Background(), in, location.Options{})
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("Open(%q): error %q, want one line with %q", in, err, want)
			continue
		}
		if strings.Contains(err.Error(), "hunter2") {
			t.Errorf("Open(%q): error %q shows a secret", in, err)
		}
		if !errors.Is(err, backend.ErrPermanent) {
			t.Errorf("Open(%q): error %q is not permanent", in, err)
		}
	}
}

func TestUnknownOptionsAreRefused(t *testing.T) {
	for key, value := range map[string]string{
		"s3.regoin": "x", "sftp.command": "x", "region": "x", "": "", "s3.": "", "local.layout": "default",
		"s3.connections": "0", "local.connections": "many", "s3.list-objects-v1": "maybe", "s3.bucket-lookup": "ask",
	} {
		_, err := location.Open(context.Background(), t.TempDir(), location.Options{Extended: map[string]string{key: value}})
		if err == nil || !strings.Contains(err.Error(), key) {
			t.Errorf("option %q=%q: error %v", key, value, err)
		}
	}
	be, err := location.Open(context.Background(), t.TempDir(), location.Options{
		Extended: map[string]string{"local.connections": "7", "s3.connections": "3", "s3.region": "eu-west-1"},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer be.Close()
	if be.Connections() != 7 {
		t.Errorf("Connections is %d, want 7", be.Connections())
	}
}
