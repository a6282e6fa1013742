// SPDX-License-Identifier: BSD-2-Clause

package layer

import (
	"fmt"
	"os"
	"time"

	"github.com/dsync-backup/dsync-backup/repo"
)

// FileNode describes a file of ours, which consists of the given blobs and is
// size bytes long.
func FileNode(name string, content []repo.ID, size int64, at time.Time) *repo.Node {
	return &repo.Node{
		Name: name, Type: repo.NodeFile, Mode: 0o600, ModTime: at, AccessTime: at, ChangeTime: at,
		User: "root", Group: "root", Links: 1, Size: uint64(size), Content: content,
	}
}

// DirNode describes a folder.
func DirNode(name string, tree repo.ID, at time.Time) *repo.Node {
	return &repo.Node{
		Name: name, Type: repo.NodeDir, Mode: os.ModeDir | 0o700, ModTime: at, AccessTime: at, ChangeTime: at,
		User: "root", Group: "root", Subtree: &tree,
	}
}

// NextName is the name of a layer that is newer than all those in the folder
// `layers`.
func NextName(layers *repo.Tree) (string, error) {
	var newest uint64
	for _, n := range layers.Nodes {
		number, err := parseName(n.Name)
		if err != nil {
			return "", fmt.Errorf("%w: %q is not a layer", ErrDamaged, n.Name)
		}
		newest = max(newest, number)
	}
	return formatName(newest + 1), nil
}
