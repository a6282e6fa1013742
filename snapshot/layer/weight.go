// SPDX-License-Identifier: BSD-2-Clause

package layer

import "github.com/dsync-backup/dsync-backup/repo"

// blobWeight is about what the name of a blob takes in a compressed tree.
const blobWeight = 40

// Weight is about how many bytes of metadata a part has, by its tree alone: what
// it takes to write it again.
func Weight(part *repo.Tree) (n int64) {
	for _, f := range part.Nodes {
		switch f.Name {
		case indexFile, sumsFile:
			n += int64(f.Size)
		case dataFile:
			n += blobWeight * int64(len(f.Content))
		}
	}
	return n
}
