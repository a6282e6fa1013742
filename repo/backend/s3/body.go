// SPDX-License-Identifier: BSD-2-Clause

package s3

import (
	"errors"
	"io"
	"net/http"
	"sync"
)

// ownBody ends the use of a request's body with the round trip. Go's transport
// may go on reading it after it has returned (a server that answers early, a
// connection that breaks), while the data belongs to the caller of Save again
// and the next try reads from the same place.
type ownBody struct{ next http.RoundTripper }

func (o ownBody) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.Body == nil || r.Body == http.NoBody {
		return o.next.RoundTrip(r)
	}
	body := &lentBody{body: r.Body}
	lent := *r // a round tripper must not change the request
	lent.Body = body
	resp, err := o.next.RoundTrip(&lent)
	body.takeBack()
	return resp, err
}

var errTakenBack = errors.New("the request is over")

// lentBody passes reads on until it is taken back.
type lentBody struct {
	mu   sync.Mutex
	body io.ReadCloser
	over bool
}

func (l *lentBody) Read(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.over {
		return 0, errTakenBack
	}
	return l.body.Read(p)
}

func (l *lentBody) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.body.Close()
}

func (l *lentBody) takeBack() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.over = true
}
