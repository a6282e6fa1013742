// SPDX-License-Identifier: BSD-2-Clause

// Package restore writes a device snapshot onto a block device or file, writes
// it to a stream, and compares a device with it (docs/restore.md).
//
// It promises that no target is touched before everything that metadata can
// tell has been checked; that no byte is written whose blob was not checked
// against its name; that what could not be restored is named, range by range;
// and that memory does not grow with the device. On return without error the
// target is durable. It knows nothing of the command line, and it takes no
// lock: the caller holds one and has loaded the index since.
//
// Data flows one way:
//
//	merger (newest layer first) -> windows (blobs wanted, zeros) -> packs
//	       -> checked blobs -> batches of whole blocks -> target
//
// Where the target is compared first, a scan of it in device order lets only
// those ranges into the windows that differ.
package restore
