// SPDX-License-Identifier: BSD-2-Clause

package bpf

import "fmt"

// The flags that the programs raise; keep in step with dsync.bpf.c.
const (
	flagNoBitmap uint64 = 1 << iota
	flagInflightFull
	flagPassthrough
	flagUnknownOp
	flagStranger
	flagLongChain
	flagReplaced
	flagHibernated
	flagSwapsFull
)

// afresh is what to do about any of the reasons.
const afresh = "; run `track stop` and `track start` to begin a new history"

// flagReasons tell the user of a raised flag, the gravest first.
var flagReasons = []struct {
	flag   uint64
	reason string
}{
	{flagReplaced, "the device was replaced by another one with its number"},
	{flagNoBitmap, "a write could not be marked"},
	// A write that was not entered is a stranger when it completes.
	{flagInflightFull, "more writes were in flight than the tracker can hold"},
	{flagStranger, "a write completed whose beginning was not seen"},
	{flagLongChain, "a request held more ranges than can be marked"},
	{flagPassthrough, "a command that may write was sent past the block layer (SCSI or NVMe passthrough)"},
	{flagUnknownOp, "a kind of write was seen that the tracker does not know"},
	{flagHibernated, "the machine was hibernated"},
	{flagSwapsFull, "more device-mapper devices changed their tables than can be counted"},
}

func flagReason(raised uint64) string {
	if raised == 0 {
		return ""
	}
	for _, r := range flagReasons {
		if raised&r.flag != 0 {
			return r.reason + afresh
		}
	}
	return fmt.Sprintf("the kernel side raised the unknown flag %#x", raised) + afresh
}

// differReason says how a device differs from the one that was attached.
func differReason(was, is target) string {
	switch {
	case was.diskSeq != is.diskSeq:
		return fmt.Sprintf("%s is not the device it was: it was detached, or another medium came in", was.path()) + afresh
	case was.diskDev != is.diskDev:
		return fmt.Sprintf("%s is now on another disk", was.path()) + afresh
	case was.start != is.start:
		return fmt.Sprintf("the partition %s moved from sector %d to %d", was.path(), was.start, is.start) + afresh
	case was.sectors != is.sectors:
		return fmt.Sprintf("%s changed its size from %d to %d bytes", was.path(), was.size(), is.size()) + afresh
	case was.loopOffset != is.loopOffset:
		return fmt.Sprintf("the loop device %s was moved in its file from byte %d to %d", was.path(), was.loopOffset, is.loopOffset) + afresh
	}
	return ""
}
