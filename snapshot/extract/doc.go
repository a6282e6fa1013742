// SPDX-License-Identifier: BSD-2-Clause

// Package extract sends a device, or what changed on it, as a stream.
//
// It promises that the stream holds every block that was written since the
// position it starts from, as the device held it at the Instant, that a stream
// with an end was read completely while the device stood still, and that its
// position is durable in the epoch log by then. It knows nothing of what
// becomes of the stream: which position a target is at, its caller says.
package extract
