// SPDX-License-Identifier: BSD-2-Clause

// Package stream is the format in which a device, or what changed on it, goes
// from `extract` to `merge` (docs/stream.md).
//
// It promises that a stream which was cut short, changed anywhere, or put
// together from two is an error before its end is reached, that every block of
// the device is accounted for in every round, and that a reader needs no more
// memory than a record's, whatever it reads. It knows nothing of where the
// blocks come from and where they go.
package stream
