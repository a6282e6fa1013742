// SPDX-License-Identifier: BSD-2-Clause

// Package index says in which pack, and where in it, each blob lies: the JSON
// of restic's index files, and sorted tables made from them that are looked up
// on disk, so that no process has to hold a large repository's index.
//
// It promises that a table answers as the index files that it was made from
// would, or says [ErrDamaged]: each page of a table carries a checksum. It
// knows nothing of where tables are kept or when they are still good.
//
// The JSON is restic's design document, section "Indexing"; the table's bytes
// are in docs/repository.md.
package index
