// SPDX-License-Identifier: BSD-2-Clause

//go:build !cgo

package repo

// Encoder says what compresses.
const Encoder = "zstd in Go"

func newEncoder(l level) (encoder, error) { return newGoEncoder(l) }
