// SPDX-License-Identifier: BSD-2-Clause

// Package epochlog keeps the ended epochs of a tracker in durable files, one
// an epoch, and answers what was written since a position.
//
// It promises that an epoch is acknowledged to the kernel side only once it is
// durable, that one process at a time rotates a tracker, and that [Session.Since]
// either returns every block written after a position or says why it cannot.
// The files' format is in docs/epoch-log.md. It knows nothing of how blocks
// are tracked, and nothing of repositories.
package epochlog
