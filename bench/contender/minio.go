// SPDX-License-Identifier: BSD-2-Clause

package contender

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"time"
)

// server is a MinIO on a free port, behind a proxy that counts.
type server struct {
	cmd   *exec.Cmd
	dir   string
	proxy *proxy
}

const minioKey, minioSecret = "benchmark", "benchmark-secret"

func (m *server) env() []string {
	return []string{"AWS_ACCESS_KEY_ID=" + minioKey, "AWS_SECRET_ACCESS_KEY=" + minioSecret}
}

func startMinIO(ctx context.Context, program, dir string) (*server, error) {
	if err := os.MkdirAll(filepath.Join(dir, "bench"), 0o700); err != nil {
		return nil, err
	}
	addr, err := freePort()
	if err != nil {
		return nil, err
	}
	m := &server{dir: dir, cmd: exec.Command(program, "server", "--quiet", "--address", addr, dir)}
	m.cmd.Env = append(os.Environ(), "MINIO_ROOT_USER="+minioKey, "MINIO_ROOT_PASSWORD="+minioSecret, "MINIO_BROWSER=off", "MINIO_UPDATE=off")
	m.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	if err := m.cmd.Start(); err != nil {
		return nil, err
	}
	for start := time.Now(); ; time.Sleep(100 * time.Millisecond) {
		resp, err := http.Get("http://" + addr + "/minio/health/ready")
		if err == nil {
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				break
			}
		}
		if time.Since(start) > time.Minute || ctx.Err() != nil {
			return nil, errors.Join(fmt.Errorf("MinIO does not answer on %s", addr), ctx.Err(), m.stop())
		}
	}
	if m.proxy, err = newProxy(addr); err != nil {
		return nil, errors.Join(err, m.stop())
	}
	return m, nil
}

func (m *server) stop() error {
	if m.proxy != nil {
		m.proxy.l.Close()
	}
	_ = m.cmd.Process.Signal(syscall.SIGTERM)
	_ = m.cmd.Wait() // however it ends
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

// proxy passes connections on and counts what the clients send.
type proxy struct {
	l    net.Listener
	addr string
	sent atomic.Int64
}

func newProxy(to string) (*proxy, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	p := &proxy{l: l, addr: l.Addr().String()}
	go func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			go p.pass(client, to)
		}
	}()
	return p, nil
}

func (p *proxy) pass(client net.Conn, to string) {
	defer client.Close()
	server, err := net.Dial("tcp", to)
	if err != nil {
		return
	}
	defer server.Close()
	go func() {
		n, _ := io.Copy(server, client) // the kernel splices it
		p.sent.Add(n)
		server.Close()
	}()
	_, _ = io.Copy(client, server)
}
