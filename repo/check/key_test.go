// SPDX-License-Identifier: BSD-2-Clause

package check

import (
	"bytes"
	"io"
	"testing"

	"github.com/dsync-backup/dsync-backup/repo/backend"
)

// TestAKeyWithAnotherNameIsDamage, also where it still opens the repository.
func TestAKeyWithAnotherNameIsDamage(t *testing.T) {
	f := newFixture(t, 1, 64<<10)
	if found, _, _, err := f.check(Options{}); err != nil || len(found) > 0 {
		t.Fatalf("%q, %v", found, err)
	}
	keys, err := f.repo.ListFiles(t.Context(), backend.KeyFile)
	if err != nil {
		t.Fatal(err)
	}
	for id := range keys {
		h := backend.Handle{Type: backend.KeyFile, Name: id.String()}
		var data []byte
		err := f.be.Load(t.Context(), h, 0, 0, func(rd io.Reader) (err error) {
			data, err = io.ReadAll(rd)
			return err
		})
		if err == nil {
			err = f.be.Remove(t.Context(), h)
		}
		if err == nil {
			err = f.be.Save(t.Context(), h, bytes.Replace(data, []byte(`"username":"`), []byte(`"username":"x`), 1))
		}
		if err != nil {
			t.Fatal(err)
		}
		found, touched, res, err := f.check(Options{})
		if err != nil || len(touched) > 0 || res.Errors != 1 {
			t.Fatalf("touched are %v, %+v, %v", touched, res, err)
		}
		f.names(found, []string{"key " + id.Str(), "do not match its name"})

		f.be.lose(backend.KeyFile, id, -1, errSector)
		found, _, _, err = f.check(Options{})
		if err != nil {
			t.Fatal(err)
		}
		f.names(found, []string{"key " + id.Str(), "it cannot be read", "input/output error"})
	}
}
