// SPDX-License-Identifier: BSD-2-Clause

// Package check looks for damage that only shows to whoever knows what a device
// snapshot is: block indexes that do not decode, parts that overlap, files whose
// lengths do not agree, layers that are not those that were written, ranges that
// no layer has.
//
// It promises that a device snapshot in which it finds nothing can be restored
// whole as far as repo/check found the blobs to be good; and of one that is
// damaged it names every range of the device that cannot be given for certain.
// Parts that many snapshots share are looked at once. It changes nothing.
package check
