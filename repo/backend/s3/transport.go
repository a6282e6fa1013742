// SPDX-License-Identifier: BSD-2-Clause

package s3

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/http"
	"os"
	"sync/atomic"
	"time"
)

const (
	// stallTimeout is how long a connection may stand still in mid-transfer
	// before the call on it fails (and is retried on a fresh one).
	stallTimeout = 2 * time.Minute

	// answerTimeout is how long a server may think about a request.
	answerTimeout = time.Minute

	// ioBuffer is in bytes. What --limit-upload lets through fills it before it
	// is sent, which must not take stallTimeout even at 1 KiB/s.
	ioBuffer = 64 << 10
)

// newTransport makes the HTTP client's lower half. HTTP/2 stays off: one
// connection per transfer is what object stores are built for.
func newTransport(o Options) (*http.Transport, error) {
	conf, err := tlsConfig(o)
	if err != nil {
		return nil, err
	}
	dialer := &net.Dialer{Timeout: 30 * time.Second, KeepAlive: 30 * time.Second}
	return &http.Transport{
		Proxy: http.ProxyFromEnvironment,
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			c, err := dialer.DialContext(ctx, network, addr)
			if err != nil {
				return nil, err
			}
			return &stallConn{Conn: c}, nil
		},
		TLSClientConfig:       conf,
		TLSHandshakeTimeout:   30 * time.Second,
		ResponseHeaderTimeout: answerTimeout,
		IdleConnTimeout:       time.Minute,
		MaxIdleConnsPerHost:   2 * o.Connections,
		WriteBufferSize:       ioBuffer,
		ReadBufferSize:        ioBuffer,
		DisableCompression:    true, // lengths must be those of the file
	}, nil
}

func tlsConfig(o Options) (*tls.Config, error) {
	conf := &tls.Config{MinVersion: tls.VersionTLS12}
	if o.CACert != "" {
		pem, err := os.ReadFile(o.CACert)
		if err != nil {
			return nil, permanentf("read CA certificate: %w", err)
		}
		conf.RootCAs = x509.NewCertPool()
		if !conf.RootCAs.AppendCertsFromPEM(pem) {
			return nil, permanentf("read CA certificate %s: there is no PEM certificate in it", o.CACert)
		}
	}
	if o.TLSClientCert != "" {
		cert, err := tls.LoadX509KeyPair(o.TLSClientCert, o.TLSClientCert)
		if err != nil {
			return nil, permanentf("read TLS client certificate and key from %s: %w", o.TLSClientCert, err)
		}
		conf.Certificates = []tls.Certificate{cert}
	}
	return conf, nil
}

// stallConn fails once nothing has moved in either direction for stallTimeout.
// A long upload keeps the waiting read alive, and the other way round.
type stallConn struct{ net.Conn }

func (c *stallConn) Read(p []byte) (int, error) {
	if err := c.extend(); err != nil {
		return 0, err
	}
	return c.Conn.Read(p)
}

func (c *stallConn) Write(p []byte) (int, error) {
	if err := c.extend(); err != nil {
		return 0, err
	}
	return c.Conn.Write(p)
}

func (c *stallConn) extend() error {
	if err := c.SetDeadline(time.Now().Add(stallTimeout)); err != nil {
		return fmt.Errorf("set deadline: %w", err)
	}
	return nil
}

// clockWatch remembers by how much this machine's clock is ahead of the
// server's, as the Date of the last refused request told.
type clockWatch struct {
	next  http.RoundTripper
	ahead *atomic.Int64 // nanoseconds
}

func (w clockWatch) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := w.next.RoundTrip(r)
	if err == nil && resp.StatusCode == http.StatusForbidden {
		if date, perr := http.ParseTime(resp.Header.Get("Date")); perr == nil {
			w.ahead.Store(int64(time.Since(date)))
		}
	}
	return resp, err
}
