// SPDX-License-Identifier: BSD-2-Clause

package s3_test

import (
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/repo/backend/backendtest"
	"github.com/dsync-backup/dsync-backup/repo/backend/miniotest"
	"github.com/dsync-backup/dsync-backup/repo/backend/retry"
	"github.com/dsync-backup/dsync-backup/repo/backend/s3"
)

// refuse answers as an S3 server does.
func refuse(w http.ResponseWriter, status int, code string) {
	w.Header().Set("Content-Type", "application/xml")
	w.WriteHeader(status)
	fmt.Fprintf(w, `<?xml version="1.0" encoding="UTF-8"?><Error><Code>%s</Code><Message>no</Message></Error>`, code)
}

// refuser is the location of a server that refuses every request.
func refuser(t testing.TB, status int, code string) string {
	t.Helper()
	(&miniotest.Server{AccessKey: "key", SecretKey: "secret"}).Setenv(t)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { refuse(w, status, code) }))
	t.Cleanup(server.Close)
	return "s3:" + server.URL + "/bucket"
}

func TestWhatARefusedRequestMayDoAgain(t *testing.T) {
	for _, c := range []struct {
		status int
		code   string
		passes bool
	}{
		{400, "InvalidStorageClass", false},
		{400, "InvalidRequest", false},
		{400, "InvalidArgument", false},
		{400, "KMS.DisabledException", false},
		{400, "EntityTooLarge", false},
		{403, "SomethingForbidden", false},
		{404, "NoSuchUpload", false},
		{405, "MethodNotAllowed", false},
		{411, "MissingContentLength", false},
		{413, "RequestEntityTooLarge", false},
		{501, "NotImplemented", false},
		{400, "RequestTimeout", true},
		{400, "IncompleteBody", true},
		{400, "BadDigest", true},
		{400, "XAmzContentSHA256Mismatch", true},
		{400, "ThrottlingException", true},
		{408, "RequestTimeout", true},
		{409, "OperationAborted", true},
		{425, "TooEarly", true},
		{429, "TooManyRequests", true},
		{499, "ClientDisconnected", true},
		{500, "InternalError", true},
		{502, "BadGateway", true},
		{503, "SlowDown", true},
		{503, "ServiceUnavailable", true},
		{504, "GatewayTimeout", true},
	} {
		be := open(t, refuser(t, c.status, c.code), s3.Options{Region: "us-east-1"})
		_, load := backendtest.Load(t.Context(), be, someFile, 0, 0)
		save := be.Save(t.Context(), someFile, []byte("x"))
		for call, err := range map[string]error{"load": load, "save": save} {
			if err == nil || errors.Is(err, backend.ErrNotExist) || errors.Is(err, backend.ErrPermanent) == c.passes {
				t.Errorf("%s, %d %s: error %v", call, c.status, c.code, err)
			} else if !strings.Contains(err.Error(), c.code) {
				t.Errorf("%s, %d %s: error %v does not name the code", call, c.status, c.code, err)
			}
		}
	}
}

// TestABusyServerIsAskedAgain refuses every request twice.
func TestABusyServerIsAskedAgain(t *testing.T) {
	server := miniotest.Start(t)
	server.Setenv(t)
	server.MakeBucket("bucket")
	for _, c := range []struct {
		status int
		code   string
	}{{503, "SlowDown"}, {429, "TooManyRequests"}} {
		var requests atomic.Int32
		location := proxy(t, server, nil, func(pass http.Handler, w http.ResponseWriter, r *http.Request) {
			if requests.Add(1)%3 != 0 {
				refuse(w, c.status, c.code)
				return
			}
			pass.ServeHTTP(w, r)
		})
		be := retry.New(open(t, location, s3.Options{Region: "us-east-1"}), retry.Options{FirstWait: 1, MaxWait: 1})
		if err := be.Save(t.Context(), someFile, []byte("x")); err != nil {
			t.Errorf("save, %d: %v", c.status, err)
		}
		if fi, err := be.Stat(t.Context(), someFile); err != nil || fi.Size != 1 {
			t.Errorf("stat, %d: %d bytes, %v", c.status, fi.Size, err)
		}
	}
}
