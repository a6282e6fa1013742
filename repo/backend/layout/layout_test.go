// SPDX-License-Identifier: BSD-2-Clause

package layout_test

import (
	"strings"
	"testing"

	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/repo/backend/layout"
)

func TestPathsAreThoseOfTheDesignDocument(t *testing.T) {
	name := "21" + strings.Repeat("a", 62)
	for ft, want := range map[backend.FileType]string{
		backend.ConfigFile: "config", backend.KeyFile: "keys/" + name, backend.LockFile: "locks/" + name,
		backend.SnapshotFile: "snapshots/" + name, backend.IndexFile: "index/" + name, backend.PackFile: "data/21/" + name,
	} {
		h := backend.Handle{Type: ft, Name: name}
		if ft == backend.ConfigFile {
			h.Name = ""
		}
		if got := layout.Path(h); got != want {
			t.Errorf("path of a %v file is %q, want %q", ft, got, want)
		}
		if got, ok := layout.Parse(ft, want); !ok || got != h {
			t.Errorf("%q is read as %+v, %t", want, got, ok)
		}
		for _, bad := range []string{"x/" + want, want + "0", want + "/", "", "/", "data/22/" + name} {
			if h, ok := layout.Parse(ft, bad); ok {
				t.Errorf("%q is read as %+v", bad, h)
			}
		}
	}
	if n := len(layout.Dirs()); n != 5+256 {
		t.Errorf("there are %d folders", n)
	}
}
