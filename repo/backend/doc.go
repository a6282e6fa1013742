// SPDX-License-Identifier: BSD-2-Clause

// Package backend stores whole, immutable files under a type and a name: all
// that a restic repository asks of a store.
//
// It promises that a file is either there as a whole or not at all, and that
// it survives a crash once Save has returned. It knows nothing of encryption,
// packs or snapshots.
//
// The stores are in the packages local and s3, which share the paths of
// package layout. Packages retry, limit and faulty are decorators; package
// location opens a store by the name that the user gives it, decorated.
// Package backendtest is the suite that all of them pass.
package backend
