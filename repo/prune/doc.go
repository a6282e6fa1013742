// SPDX-License-Identifier: BSD-2-Clause

// Package prune frees the space of a repository that no snapshot needs: it
// deletes packs of which nothing is used, and packs anew what is left of others
// as far as its limits say.
//
// It promises that nothing is deleted before everything that any snapshot needs
// was found in the index and in packs of the right size, whoever made the
// snapshot; that what is moved is checked before it is stored, and durable and
// listed before the old copy goes; that whatever kills it leaves a repository
// without damage, on which it can be run again; and that memory is in the order
// of a bit for each blob and some words for each pack. The caller holds an
// exclusive lock. It knows nothing of devices.
//
// Data flows one way:
//
//	snapshots -> trees -> used blobs (bits) -> packs to keep, repack, delete
//	       -> new packs -> new index -> old index goes -> old packs go
//
// Which packs are chosen follows restic's prune, so that both do about the same
// with the same options.
package prune
