// SPDX-License-Identifier: BSD-2-Clause

// Package miniotest runs a real MinIO server for the tests of other packages,
// on a free port of the loopback device and a temporary folder.
//
// The program is the one named by the environment variable MINIO, else
// .build/minio in the module's root. The server ends with the test, also when
// the test is killed.
package miniotest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"
)

// startTimeout is how long a server may take to answer: it may share a busy
// machine.
const startTimeout = 2 * time.Minute

// Server is a running MinIO.
type Server struct {
	Host      string // 127.0.0.1:port
	AccessKey string
	SecretKey string
	CACert    string // file of the certificate to trust; "" without TLS

	t      testing.TB
	env    []string
	data   string
	dir    string
	exited chan struct{} // closed when the process has ended; nil before a start
	proc   *os.Process
}

// Option changes how [Start] runs the server.
type Option func(*Server)

// WithEnv adds variables (NAME=value) to the server's environment; MinIO takes
// all its settings there.
func WithEnv(env ...string) Option { return func(s *Server) { s.env = append(s.env, env...) } }

// WithData makes the server keep its data in dir, on a small disk perhaps.
func WithData(dir string) Option { return func(s *Server) { s.data = dir } }

// Start runs a server until the test ends.
func Start(t testing.TB, opts ...Option) *Server {
	t.Helper()
	s := &Server{AccessKey: "root-of-the-test", SecretKey: "secret-of-the-test", t: t, dir: t.TempDir()}
	s.data = filepath.Join(s.dir, "data")
	for _, o := range opts {
		o(s)
	}
	t.Cleanup(s.Stop)
	// The port may be taken between its choice and its use.
	var err error
	for range 3 {
		if s.Host, err = freePort(); err != nil {
			break
		}
		if err = s.start(); err == nil {
			return s
		}
		s.Stop()
	}
	t.Fatalf("start MinIO: %v\n%s", err, s.log())
	return nil
}

func freePort() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	return l.Addr().String(), nil
}

// program finds the server's binary.
func program() (string, error) {
	if p := os.Getenv("MINIO"); p != "" {
		return p, nil
	}
	dir, err := os.Getwd()
	for err == nil {
		p := filepath.Join(dir, ".build", "minio")
		if _, serr := os.Stat(filepath.Join(dir, "go.mod")); serr == nil {
			_, err = os.Stat(p)
			return p, err
		}
		if dir == filepath.Dir(dir) {
			err = errors.New("no go.mod above the working directory")
		}
		dir = filepath.Dir(dir)
	}
	return "", err
}

func (s *Server) logFile() string { return filepath.Join(s.dir, "log") }

func (s *Server) log() string {
	b, err := os.ReadFile(s.logFile())
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// start runs the process on s.Host and waits until it answers.
func (s *Server) start() error {
	bin, err := program()
	if err != nil {
		return fmt.Errorf("find the program (set MINIO, or build it): %w", err)
	}
	log, err := os.OpenFile(s.logFile(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(bin, "server", "--quiet", "--address", s.Host,
		"--certs-dir", filepath.Join(s.dir, "certs"), s.data)
	cmd.Env = append(os.Environ(), "MINIO_ROOT_USER="+s.AccessKey, "MINIO_ROOT_PASSWORD="+s.SecretKey,
		"MINIO_BROWSER=off", "MINIO_UPDATE=off", "MINIO_CI_CD=on", "HOME="+s.dir)
	cmd.Env = append(cmd.Env, s.env...)
	cmd.Stdout, cmd.Stderr = log, log
	// The kernel kills the server when the thread that started it ends, so
	// that thread stays until the server has ended.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started, exited := make(chan error), make(chan struct{})
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // how it ended shows in the log
		}
		close(exited)
	}()
	if err := <-started; err != nil {
		return err
	}
	s.proc, s.exited = cmd.Process, exited
	return s.wait()
}

func (s *Server) wait() error {
	client, err := s.client(s.AccessKey)
	if err != nil {
		return err
	}
	stranger, err := s.client("a-stranger")
	if err != nil {
		return err
	}
	deadline := time.Now().Add(startTimeout)
	for {
		if err = answers(client, stranger); err == nil {
			return nil
		}
		select {
		case <-s.exited:
			return fmt.Errorf("the server ended: %w", err)
		case <-time.After(50 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			return err
		}
	}
}

// answers tells whether the server does. It knows its root user before it knows who
// else there is: a stranger gets another error until then.
func answers(root, stranger *minio.Client) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if _, err := root.ListBuckets(ctx); err != nil {
		return err
	}
	if _, err := stranger.ListBuckets(ctx); minio.ToErrorResponse(err).Code != "InvalidAccessKeyId" {
		return fmt.Errorf("it does not know its users yet: %w", err)
	}
	return nil
}

// Stop ends the server, as the store that goes away in the middle of
// something. Its data and its port stay for [Server.Restart].
func (s *Server) Stop() {
	if s.proc == nil {
		return
	}
	_ = s.proc.Signal(syscall.SIGTERM) // it may have ended already
	select {
	case <-s.exited:
	case <-time.After(10 * time.Second):
		_ = s.proc.Kill()
		<-s.exited
	}
	s.proc = nil
}

// Restart starts a stopped server again with the same data and address.
func (s *Server) Restart() {
	s.t.Helper()
	if err := s.start(); err != nil {
		s.t.Fatalf("restart MinIO: %v\n%s", err, s.log())
	}
}

// URL is where the server answers.
func (s *Server) URL() string {
	if s.CACert != "" {
		return "https://" + s.Host
	}
	return "http://" + s.Host
}

// Location is the repository location for a bucket and a prefix, which may be
// empty.
func (s *Server) Location(bucket, prefix string) string {
	l := "s3:" + s.URL() + "/" + bucket
	if prefix != "" {
		l += "/" + prefix
	}
	return l
}

// Environ are the credentials for a child process.
func (s *Server) Environ() []string {
	return []string{
		"AWS_ACCESS_KEY_ID=" + s.AccessKey, "AWS_SECRET_ACCESS_KEY=" + s.SecretKey,
		"AWS_SESSION_TOKEN=", "AWS_DEFAULT_REGION=", "AWS_PROFILE=",
	}
}

// Setenv puts the credentials into the environment of this test, which must
// not be parallel.
func (s *Server) Setenv(t testing.TB) {
	t.Helper()
	t.Setenv("AWS_ACCESS_KEY_ID", s.AccessKey)
	t.Setenv("AWS_SECRET_ACCESS_KEY", s.SecretKey)
	for _, name := range []string{"AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION", "AWS_PROFILE"} {
		t.Setenv(name, "")
	}
}

// Client is a client of the server with all rights.
func (s *Server) Client() *minio.Client {
	s.t.Helper()
	c, err := s.client(s.AccessKey)
	if err != nil {
		s.t.Fatalf("make MinIO client: %v", err)
	}
	return c
}

func (s *Server) client(key string) (*minio.Client, error) {
	o := &minio.Options{
		Creds:      credentials.NewStaticV4(key, s.SecretKey, ""),
		Secure:     s.CACert != "",
		Region:     "us-east-1",
		MaxRetries: 1,
	}
	if s.CACert != "" {
		o.Transport = &http.Transport{TLSClientConfig: s.tlsConfig(), DisableCompression: true}
	}
	return minio.New(s.Host, o)
}

// MakeBucket makes a bucket.
func (s *Server) MakeBucket(name string) {
	s.t.Helper()
	if err := s.Client().MakeBucket(context.Background(), name, minio.MakeBucketOptions{}); err != nil {
		s.t.Fatalf("make bucket %s: %v", name, err)
	}
}

// RemoveBucket removes a bucket and all that is in it.
func (s *Server) RemoveBucket(name string) {
	s.t.Helper()
	err := s.Client().RemoveBucketWithOptions(context.Background(), name, minio.RemoveBucketOptions{ForceDelete: true})
	if err != nil {
		s.t.Fatalf("remove bucket %s: %v", name, err)
	}
}
