// SPDX-License-Identifier: BSD-2-Clause

package backend_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/dsync-backup/dsync-backup/repo/backend"
)

func TestPermanentMarksWithoutChangingTheText(t *testing.T) {
	cause := errors.New("the disk is on fire")
	err := fmt.Errorf("save x: %w", backend.Permanent(cause))
	if err.Error() != "save x: the disk is on fire" {
		t.Errorf("text is %q", err)
	}
	if !errors.Is(err, backend.ErrPermanent) || !errors.Is(err, cause) {
		t.Errorf("%v is not both permanent and its cause", err)
	}
	if errors.Is(fmt.Errorf("save x: %w", cause), backend.ErrPermanent) {
		t.Error("an unmarked error is permanent")
	}
	if backend.Permanent(nil) != nil {
		t.Error("Permanent(nil) is an error")
	}
}

func TestNoStoreMeansNoConfigButNoMissingFile(t *testing.T) {
	for ft, missing := range map[backend.FileType]bool{backend.ConfigFile: true, backend.PackFile: false, backend.LockFile: false} {
		err := fmt.Errorf("load: %w", backend.NoStore(ft, "gone"))
		if !errors.Is(err, backend.ErrNoStore) || !errors.Is(err, backend.ErrPermanent) || errors.Is(err, backend.ErrNotExist) != missing {
			t.Errorf("%v: ErrNoStore %t, ErrPermanent %t, ErrNotExist %t", ft,
				errors.Is(err, backend.ErrNoStore), errors.Is(err, backend.ErrPermanent), errors.Is(err, backend.ErrNotExist))
		}
	}
}

func TestExactReaderEndsWhereItShould(t *testing.T) {
	broken := errors.New("broken")
	for name, c := range map[string]struct {
		r    io.Reader
		n    int64
		want string
		err  error
	}{
		"longer":               {strings.NewReader("abcdef"), 3, "abc", nil},
		"as long":              {strings.NewReader("abc"), 3, "abc", nil},
		"end with the data":    {iotest.DataErrReader(strings.NewReader("abc")), 3, "abc", nil},
		"shorter":              {strings.NewReader("ab"), 3, "ab", io.ErrUnexpectedEOF},
		"short with the data":  {iotest.DataErrReader(strings.NewReader("ab")), 3, "ab", io.ErrUnexpectedEOF},
		"none":                 {strings.NewReader("abc"), 0, "", nil},
		"broken in the middle": {io.MultiReader(strings.NewReader("a"), iotest.ErrReader(broken)), 3, "a", broken},
	} {
		var got bytes.Buffer
		_, err := got.ReadFrom(backend.ExactReader(c.r, c.n))
		if got.String() != c.want || !errors.Is(err, c.err) {
			t.Errorf("%s: read %q, error %v; want %q, %v", name, &got, err, c.want, c.err)
		}
	}
}
