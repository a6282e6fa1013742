// SPDX-License-Identifier: BSD-2-Clause

package s3_test

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/repo/backend/backendtest"
	"github.com/dsync-backup/dsync-backup/repo/backend/miniotest"
	"github.com/dsync-backup/dsync-backup/repo/backend/retry"
	"github.com/dsync-backup/dsync-backup/repo/backend/s3"
	"github.com/minio/minio-go/v7/pkg/credentials"
)

var someFile = backendtest.HandleOf(backend.PackFile, []byte("x"))

// everyCall makes each kind of call and returns the errors by name.
func everyCall(be backend.Backend) map[string]error {
	ctx := context.Background()
	_, load := backendtest.Load(ctx, be, someFile, 0, 0)
	_, stat := be.Stat(ctx, someFile)
	_, list := backendtest.List(ctx, be, someFile.Type)
	return map[string]error{
		"load": load, "stat": stat, "list": list, "remove": be.Remove(ctx, someFile),
		"save":        be.Save(ctx, someFile, []byte("x")),
		"save config": be.Save(ctx, backend.Handle{Type: backend.ConfigFile}, []byte("x")),
		"create":      be.Create(ctx),
	}
}

// wantPermanent checks that each error is permanent and one line that holds
// all of the words.
func wantPermanent(t *testing.T, errs map[string]error, words ...string) {
	t.Helper()
	for call, err := range errs {
		if !errors.Is(err, backend.ErrPermanent) || errors.Is(err, backend.ErrNotExist) {
			t.Errorf("%s: error %v is not permanent, or says that the file is missing", call, err)
			continue
		}
		t.Logf("%s: %v", call, err)
		for _, word := range append(words, "") {
			if !strings.Contains(err.Error(), word) || strings.Contains(err.Error(), "\n") {
				t.Errorf("%s: error %q is not one line with %q", call, err, word)
			}
		}
	}
}

func TestRefusalsSayWhatToDo(t *testing.T) {
	server := miniotest.Start(t)
	server.MakeBucket("bucket")
	location := server.Location("bucket", "repo")
	t.Run("WrongKeyID", func(t *testing.T) {
		server.Setenv(t)
		t.Setenv("AWS_ACCESS_KEY_ID", "nobody-knows-me")
		wantPermanent(t, everyCall(open(t, location, s3.Options{})), `"nobody-knows-me"`, "AWS_ACCESS_KEY_ID", server.Host)
	})
	t.Run("WrongSecret", func(t *testing.T) {
		server.Setenv(t)
		t.Setenv("AWS_SECRET_ACCESS_KEY", "hunter2hunter2")
		errs := everyCall(open(t, location, s3.Options{}))
		wantPermanent(t, errs, server.AccessKey, "AWS_SECRET_ACCESS_KEY")
		for call, err := range errs {
			if strings.Contains(err.Error(), "hunter2") {
				t.Errorf("%s: error %q shows the secret", call, err)
			}
		}
	})
	t.Run("WrongSessionToken", func(t *testing.T) {
		server.Setenv(t)
		t.Setenv("AWS_SESSION_TOKEN", "stale")
		wantPermanent(t, everyCall(open(t, location, s3.Options{})), "AWS_SESSION_TOKEN")
	})
	t.Run("Anonymous", func(t *testing.T) {
		errs := everyCall(open(t, location, s3.Options{Anonymous: true}))
		delete(errs, "create") // whether the bucket may be used shows later
		wantPermanent(t, errs, "unsigned requests", `"bucket"`)
	})
	t.Run("MissingBucket", func(t *testing.T) {
		server.Setenv(t)
		errs := everyCall(open(t, server.Location("not-there", ""), s3.Options{}))
		if err := errs["create"]; err != nil {
			t.Errorf("create: %v", err)
		}
		if err := errs["save config"]; !errors.Is(err, backend.ErrNoStore) || !errors.Is(err, backend.ErrNotExist) {
			t.Errorf("save config: %v", err)
		}
		delete(errs, "create")
		delete(errs, "save config")
		wantPermanent(t, errs, `bucket "not-there" does not exist`)
	})
	t.Run("BadBucketName", func(t *testing.T) {
		server.Setenv(t)
		wantPermanent(t, everyCall(open(t, server.Location("Not_A_Bucket", ""), s3.Options{})), `"Not_A_Bucket" is not a valid bucket name`)
	})
}

func TestARegionIsFoundOutAndAWrongOneNamed(t *testing.T) {
	server := miniotest.Start(t, miniotest.WithEnv("MINIO_SITE_REGION=mars-north-1"))
	server.Setenv(t)
	for i, o := range []s3.Options{{}, {Region: "mars-north-1"}} {
		be := open(t, server.Location("bucket-"+string(rune('a'+i)), ""), o)
		if err := be.Create(context.Background()); err != nil {
			t.Fatal(err)
		}
		if err := be.Save(context.Background(), someFile, []byte("x")); err != nil {
			t.Error(err)
		}
	}
	t.Setenv("AWS_DEFAULT_REGION", "venus-south-1")
	wantPermanent(t, everyCall(open(t, server.Location("bucket-a", ""), s3.Options{})), "s3.region", "AWS_DEFAULT_REGION")
}

// TestAKeyWithFewerRightsIsToldSo also proves that session tokens are used.
func TestAKeyWithFewerRightsIsToldSo(t *testing.T) {
	server := miniotest.Start(t)
	server.MakeBucket("bucket")
	server.Setenv(t)
	location := server.Location("bucket", "")
	full := open(t, location, s3.Options{})
	if err := full.Save(context.Background(), someFile, []byte("x")); err != nil {
		t.Fatal(err)
	}
	sts, err := credentials.NewSTSAssumeRole(server.URL(), credentials.STSAssumeRoleOptions{
		AccessKey: server.AccessKey, SecretKey: server.SecretKey,
		Policy: `{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Action":["s3:GetObject","s3:ListBucket"],"Resource":["arn:aws:s3:::*"]}]}`,
	})
	if err != nil {
		t.Fatal(err)
	}
	value, err := sts.GetWithContext(&credentials.CredContext{Client: http.DefaultClient})
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("AWS_ACCESS_KEY_ID", value.AccessKeyID)
	t.Setenv("AWS_SECRET_ACCESS_KEY", value.SecretAccessKey)
	t.Setenv("AWS_SESSION_TOKEN", value.SessionToken)
	errs := everyCall(open(t, location, s3.Options{}))
	for _, call := range []string{"load", "stat", "list", "create"} {
		if errs[call] != nil {
			t.Errorf("%s, which is allowed: %v", call, errs[call])
		}
		delete(errs, call)
	}
	wantPermanent(t, errs, value.AccessKeyID, "not allowed", `"bucket"`)
}

// TestAWrongClockIsNamed puts a proxy between that shifts the times of requests
// and answers, as a wrong clock on this side would.
func TestAWrongClockIsNamed(t *testing.T) {
	server := miniotest.Start(t)
	server.Setenv(t)
	server.MakeBucket("bucket")
	target, err := url.Parse(server.URL())
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		ahead time.Duration
		want  string
	}{{2 * time.Hour, "ahead of"}, {-30 * time.Minute, "behind"}} {
		proxy := &httputil.ReverseProxy{
			Rewrite: func(r *httputil.ProxyRequest) {
				r.Out.URL.Scheme, r.Out.URL.Host = target.Scheme, target.Host
				r.Out.Header.Set("X-Amz-Date", time.Now().Add(c.ahead).UTC().Format("20060102T150405Z"))
			},
			ModifyResponse: func(r *http.Response) error {
				r.Header.Set("Date", time.Now().Add(-c.ahead).UTC().Format(http.TimeFormat))
				return nil
			},
		}
		front := &http.Server{Handler: proxy, ReadHeaderTimeout: time.Minute}
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		go front.Serve(l) //nolint:errcheck // ends with Close
		defer front.Close()
		errs := everyCall(open(t, "s3:http://"+l.Addr().String()+"/bucket", s3.Options{}))
		wantPermanent(t, errs, "the clock of this machine is", c.want, "set it right")
	}
}

func TestARefusedConnectionIsRetriedThenClear(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	host := l.Addr().String()
	l.Close()
	(&miniotest.Server{AccessKey: "key", SecretKey: "secret"}).Setenv(t)
	be := retry.New(open(t, "s3:http://"+host+"/bucket", s3.Options{}), retry.Options{Budget: 1, FirstWait: 1, MaxWait: 1})
	for call, err := range everyCall(be) {
		if err == nil || errors.Is(err, backend.ErrPermanent) || errors.Is(err, backend.ErrNotExist) {
			t.Errorf("%s: error %v is none, or final", call, err)
			continue
		}
		t.Logf("%s: %v", call, err)
		for _, word := range []string{"connect to " + host, "connection refused", "tried 2 times"} {
			if !strings.Contains(err.Error(), word) {
				t.Errorf("%s: error %q lacks %q", call, err, word)
			}
		}
	}
}

func TestTLSThatDoesNotFitIsClear(t *testing.T) {
	secure, plain := miniotest.Start(t, miniotest.WithTLS()), miniotest.Start(t)
	secure.Setenv(t)
	secure.MakeBucket("bucket")
	plain.MakeBucket("bucket")
	wantPermanent(t, everyCall(open(t, secure.Location("bucket", ""), s3.Options{})), "unknown authority", "--cacert")
	wantPermanent(t, everyCall(open(t, "s3:"+plain.Host+"/bucket", s3.Options{})), "does not speak TLS", "s3:http://")
	wantPermanent(t, everyCall(open(t, "s3:http://"+secure.Host+"/bucket", s3.Options{})), "speaks TLS", "s3:https://")
	loc, err := s3.ParseLocation(secure.Location("bucket", ""))
	if err != nil {
		t.Fatal(err)
	}
	empty := filepath.Join(t.TempDir(), "empty.pem")
	if err := os.WriteFile(empty, []byte("not a certificate"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, o := range []s3.Options{{CACert: empty}, {CACert: empty + ".not-there"}, {TLSClientCert: secure.CACert}} {
		if _, err := s3.Open(context.Background(), loc, o); !errors.Is(err, backend.ErrPermanent) {
			t.Errorf("open with %+v: %v", o, err)
		}
	}
}

// TestTheClientCertificateIsShown asks a TLS server that wants one.
func TestTheClientCertificateIsShown(t *testing.T) {
	pair := miniotest.Start(t, miniotest.WithTLS())
	pair.Setenv(t)
	key, err := os.ReadFile(filepath.Join(filepath.Dir(pair.CACert), "private.key"))
	if err != nil {
		t.Fatal(err)
	}
	cert, err := os.ReadFile(pair.CACert)
	if err != nil {
		t.Fatal(err)
	}
	both := filepath.Join(t.TempDir(), "client.pem")
	if err := os.WriteFile(both, append(key, cert...), 0o600); err != nil {
		t.Fatal(err)
	}
	server, err := tls.LoadX509KeyPair(both, both)
	if err != nil {
		t.Fatal(err)
	}
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{
		Certificates: []tls.Certificate{server}, ClientAuth: tls.RequireAnyClientCert, MinVersion: tls.VersionTLS12,
	})
	if err != nil {
		t.Fatal(err)
	}
	target, err := url.Parse(pair.URL())
	if err != nil {
		t.Fatal(err)
	}
	proxy := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.Out.URL.Scheme, r.Out.URL.Host = target.Scheme, target.Host // keeps Host, which is signed
		},
		Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}, //nolint:gosec // loopback
	}
	front := &http.Server{Handler: proxy, ReadHeaderTimeout: time.Minute}
	go front.Serve(l) //nolint:errcheck // ends with Close
	defer front.Close()
	location := "s3:https://" + l.Addr().String() + "/bucket"
	ctx := context.Background()
	if err := open(t, location, s3.Options{CACert: pair.CACert}).Create(ctx); err == nil {
		t.Error("create without a client certificate worked")
	}
	be := open(t, location, s3.Options{CACert: pair.CACert, TLSClientCert: both})
	if err := be.Create(ctx); err != nil {
		t.Errorf("create with the client certificate: %v", err)
	}
}

func TestCredentialsComeFromWhereResticLooks(t *testing.T) {
	server := miniotest.Start(t)
	server.MakeBucket("bucket")
	for _, name := range []string{
		"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION", "AWS_PROFILE",
		"AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE", "MINIO_ROOT_USER", "MINIO_ACCESS_KEY",
	} {
		t.Setenv(name, "")
	}
	t.Setenv("HOME", t.TempDir())
	t.Setenv("AWS_EC2_METADATA_DISABLED", "true")
	loc, err := s3.ParseLocation(server.Location("bucket", ""))
	if err != nil {
		t.Fatal(err)
	}
	wantOpenError := func(t *testing.T, words ...string) {
		t.Helper()
		_, err := s3.Open(context.Background(), loc, s3.Options{})
		wantPermanent(t, map[string]error{"open": err}, words...)
	}
	file := filepath.Join(t.TempDir(), "credentials")
	text := "[backup]\naws_access_key_id = " + server.AccessKey + "\naws_secret_access_key = " + server.SecretKey + "\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Run("None", func(t *testing.T) { wantOpenError(t, "none found", "AWS_ACCESS_KEY_ID", "AWS_PROFILE") })
	t.Run("HalfAKey", func(t *testing.T) {
		t.Setenv("AWS_ACCESS_KEY_ID", "x")
		wantOpenError(t, "AWS_SECRET_ACCESS_KEY is not")
	})
	t.Run("OtherHalf", func(t *testing.T) {
		t.Setenv("AWS_SECRET_ACCESS_KEY", "x")
		wantOpenError(t, "AWS_ACCESS_KEY_ID is not")
	})
	t.Run("Profile", func(t *testing.T) {
		t.Setenv("AWS_SHARED_CREDENTIALS_FILE", file)
		t.Setenv("AWS_PROFILE", "backup")
		if err := open(t, server.Location("bucket", ""), s3.Options{}).Create(context.Background()); err != nil {
			t.Error(err)
		}
	})
	t.Run("NoSuchProfile", func(t *testing.T) {
		t.Setenv("AWS_SHARED_CREDENTIALS_FILE", file)
		t.Setenv("AWS_PROFILE", "nobody")
		t.Setenv("MINIO_ACCESS_KEY", server.AccessKey) // not taken in its place
		t.Setenv("MINIO_SECRET_KEY", server.SecretKey)
		wantOpenError(t, `"nobody"`, file)
	})
}
