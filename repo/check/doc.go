// SPDX-License-Identifier: BSD-2-Clause

// Package check looks for damage in a repository: its index, packs, snapshots
// and trees, and if asked the bytes of every pack.
//
// It promises that a repository in which it finds nothing is one of which each
// snapshot's every blob is in the index, in a pack that the store has in the
// right size (and, as far as packs were read, that its bytes are right); and that
// each thing that is damaged, or cannot be read from a store that is there, is
// named once, with the snapshots that need it. It changes nothing, and knows
// nothing of devices: whoever does asks the [Damage].
package check
