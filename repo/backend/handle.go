// SPDX-License-Identifier: BSD-2-Clause

package backend

import "fmt"

// FileType says which folder of the repository a file lives in.
type FileType uint8

// The types of files in a repository.
const (
	ConfigFile FileType = iota + 1 // a single file, its name is empty
	KeyFile
	LockFile
	SnapshotFile
	IndexFile
	PackFile
)

var typeNames = map[FileType]string{
	ConfigFile: "config", KeyFile: "key", LockFile: "lock",
	SnapshotFile: "snapshot", IndexFile: "index", PackFile: "data",
}

func (t FileType) String() string { return typeNames[t] }

// Handle names a file.
type Handle struct {
	Type FileType
	Name string // hex of the SHA-256 for all but the config file
}

func (h Handle) String() string {
	if h.Type == ConfigFile {
		return "config"
	}
	return fmt.Sprintf("%s/%.10s", h.Type, h.Name)
}

// Validate reports a handle that can be no file's: an unknown type, or a name
// that is not 64 lower-case hex digits (the config file's is empty). Stores
// refuse such a handle for good, and do not list such a file.
func (h Handle) Validate() error {
	switch {
	case typeNames[h.Type] == "":
		return Permanent(fmt.Errorf("check handle: there is no file type %d", h.Type))
	case h.Type == ConfigFile && h.Name != "":
		return Permanent(fmt.Errorf("check handle: the config file has no name, got %q", h.Name))
	case h.Type != ConfigFile && !isHash(h.Name):
		return Permanent(fmt.Errorf("check handle: name %q of a %s file is not 64 hex digits", h.Name, h.Type))
	}
	return nil
}

func isHash(name string) bool {
	if len(name) != 64 {
		return false
	}
	for _, c := range []byte(name) {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}
