// SPDX-License-Identifier: BSD-2-Clause

// Package layout says where in a store the files of a repository lie, as
// restic's "default" layout has it (its design document, section "Repository
// Layout"):
//
//	config
//	keys/<name>  locks/<name>  snapshots/<name>  index/<name>
//	data/<first two digits of the name>/<name>
//
// Paths are relative and use slashes. It knows nothing of how they are stored.
package layout

import (
	"fmt"
	"strings"

	"github.com/dsync-backup/dsync-backup/repo/backend"
)

// Dir is the folder that holds the files of a type; "" for the config file.
func Dir(t backend.FileType) string {
	switch t {
	case backend.KeyFile:
		return "keys"
	case backend.LockFile:
		return "locks"
	case backend.SnapshotFile:
		return "snapshots"
	case backend.IndexFile:
		return "index"
	case backend.PackFile:
		return "data"
	}
	return ""
}

// Path is where the file h lies. The handle must be valid.
func Path(h backend.Handle) string {
	switch h.Type {
	case backend.ConfigFile:
		return "config"
	case backend.PackFile:
		return "data/" + h.Name[:2] + "/" + h.Name
	}
	return Dir(h.Type) + "/" + h.Name
}

// Parse is the inverse of [Path] for files of type t. It is false for a path
// at which no such file can lie.
func Parse(t backend.FileType, path string) (backend.Handle, bool) {
	h := backend.Handle{Type: t}
	if t != backend.ConfigFile {
		h.Name = path[strings.LastIndexByte(path, '/')+1:]
	}
	return h, h.Validate() == nil && Path(h) == path
}

// Dirs lists all folders of a repository, parents first: those of the types,
// and the 256 of data.
func Dirs() []string {
	dirs := []string{"keys", "locks", "snapshots", "index", "data"}
	for i := range 256 {
		dirs = append(dirs, fmt.Sprintf("data/%02x", i))
	}
	return dirs
}
