// SPDX-License-Identifier: BSD-2-Clause

package backend

import "io"

// ExactReader reads the next n bytes of r: no more, and if r ends before, the
// error is io.ErrUnexpectedEOF. Stores hand it to the fn of Load, so that a
// connection that broke off is never taken for the end of a file.
func ExactReader(r io.Reader, n int64) io.Reader { return &exactReader{r, n} }

type exactReader struct {
	r    io.Reader
	left int64
}

func (e *exactReader) Read(p []byte) (int, error) {
	if e.left == 0 {
		return 0, io.EOF
	}
	if int64(len(p)) > e.left {
		p = p[:e.left]
	}
	n, err := e.r.Read(p)
	e.left -= int64(n)
	switch {
	case err == io.EOF && e.left > 0:
		err = io.ErrUnexpectedEOF
	case err == io.EOF && n > 0:
		err = nil
	}
	return n, err
}

// WatchedReader remembers why reading R failed, so that what a caller's
// function makes of it is not taken for an error of the function's own.
type WatchedReader struct {
	R   io.Reader
	Err error // nil at a plain end of file
}

func (w *WatchedReader) Read(p []byte) (int, error) {
	n, err := w.R.Read(p)
	if err != nil && err != io.EOF {
		w.Err = err
	}
	return n, err
}
