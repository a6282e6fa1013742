// SPDX-License-Identifier: BSD-2-Clause

package fingerprint

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"math/bits"
	"slices"
)

// Features of XFS, format 5 (fs/xfs/libxfs/xfs_format.h), that change nothing in
// how the log begins and ends. The others end in doubt.
const (
	xfsIncompat = 0x1 | 0x2 | 0x4 | 0x8 | 0x20 | 0x40 | 0x80
	xfsROCompat = 0x1 | 0x2 | 0x4 | 0x8

	maxGroups = 2048
)

// xfsSuper is what is needed of a superblock; sizes in bytes.
type xfsSuper struct {
	block, sector, group int64
	size                 int64 // of the file system
	groups               int64
	log                  span // from the start of the file system
	uuid                 []byte
	ok                   string // "" if all is known, else what it is
}

// xfs covers an XFS with its log inside. Its superblock need not change from one
// mount to the next. Its log does: see [walker.xfsLog]. The headers of all
// allocation groups tell of xfs_repair, which leaves the log alone.
func (w *walker) xfs(r span, head []byte) error {
	sb := parseXFS(r, head)
	if sb.ok != "" {
		return w.unknown(r, sb.ok)
	}
	logSpans, err := w.xfsLog(r, sb)
	if err != nil {
		return err
	}
	spans := []span{{r.off, min(bootArea, sb.size)}}
	for g := int64(1); g < sb.groups; g++ {
		spans = append(spans, span{r.off, sb.size}.clip(span{r.off + g*sb.group, 4 * sb.sector}))
	}
	spans = append(spans, logSpans...)
	if err := w.noBootLoader(r, func() ([]span, error) { return w.xfsRoot(r, sb, head) }); err != nil {
		return err
	}
	return w.add(Part{Offset: r.off, Length: r.len, Kind: "xfs", ID: formatUUID(sb.uuid)}, spans, slack(r, sb.size))
}

func parseXFS(r span, head []byte) xfsSuper {
	u32, u64 := binary.BigEndian.Uint32, binary.BigEndian.Uint64
	b := at(head, 0, 512)
	if b == nil {
		return xfsSuper{ok: "a damaged xfs"}
	}
	blocks, agBlocks, agCount, logBlocks := u64(b[8:]), int64(u32(b[84:])), int64(u32(b[88:])), int64(u32(b[96:]))
	sb := xfsSuper{block: int64(u32(b[4:])), sector: int64(binary.BigEndian.Uint16(b[102:])), groups: agCount, uuid: b[32:48]}
	hi, size := bits.Mul64(blocks, uint64(sb.block))
	sb.size, sb.group = int64(size), agBlocks*sb.block
	logStart, agLog := u64(b[48:]), b[124]
	agNo, agBlock := int64(logStart>>(agLog&63)), int64(logStart&(1<<(agLog&63)-1))
	switch {
	case binary.BigEndian.Uint16(b[100:])&0xf != 5:
		sb.ok = "an xfs of an older format than 5"
	case !powerOfTwo(sb.block, 512, 65536), !powerOfTwo(sb.sector, 512, 32768), hi != 0, size == 0, size > uint64(r.len):
		sb.ok = "an xfs that is larger than its place, or damaged"
	case agBlocks == 0, agCount == 0, agLog == 0, agLog > 31, agBlocks > 1<<agLog, (agCount-1)*agBlocks >= int64(blocks), agCount*agBlocks < int64(blocks):
		sb.ok = "a damaged xfs"
	case !goodSum(at(head, 0, int(sb.sector))):
		sb.ok = "an xfs with a damaged superblock"
	case agCount > maxGroups:
		sb.ok = "an xfs with very many allocation groups"
	case b[126] != 0, u32(b[216:])&^uint32(xfsIncompat) != 0, u32(b[212:])&^uint32(xfsROCompat) != 0, u32(b[208:]) != 0:
		sb.ok = "an xfs with features that are not known, or that needs a repair"
	case u64(b[16:]) != 0, u64(b[24:]) != 0:
		sb.ok = "an xfs with a real-time device"
	case logStart == 0:
		sb.ok = "an xfs with its log on another device"
	case agNo >= agCount, agBlock+logBlocks > agBlocks, logBlocks*sb.block < 1<<20:
		sb.ok = "a damaged xfs"
	default:
		sb.log = span{(agNo*agBlocks + agBlock) * sb.block, logBlocks * sb.block}
		if sb.log.end() > sb.size {
			sb.ok = "a damaged xfs"
		}
	}
	return sb
}

func powerOfTwo(n, low, high int64) bool { return n >= low && n <= high && n&(n-1) == 0 }

// goodSum checks a superblock's checksum, which lies in it.
func goodSum(sector []byte) bool {
	if len(sector) < 512 {
		return false
	}
	b := slices.Clone(sector)
	clear(b[224:228])
	return crc32.Checksum(b, castagnoli) == binary.LittleEndian.Uint32(sector[224:])
}

const (
	logBlock     = 512 // a basic block
	recordMagic  = 0xfeedbabe
	headerCycles = 32 << 10 // bytes of a record for each block of its header
	maxRecord    = 256 << 10
	logStale     = 2 << 20  // bytes behind the head that a mount writes
	logMargin    = 64 << 10 // hashed beyond what is needed
	unmountOp    = 0x20
	opFlags      = 9 // offset of the flags in an operation's header
)

// xfsLog finds the head of a log that was unmounted cleanly, and gives the spans
// around it. What counts here (fs/xfs/xfs_log_recover.c):
//
//   - Each block of the log says in its first word, or in the second of a record's
//     header, in which cycle it was written. The head is where that falls.
//   - The last record before the head of a clean log is an unmount record. A
//     mount ends with another one behind it, so that the head moves.
//   - A mount starts by writing stale headers to the 2 MiB behind the head (also a
//     read-only one, if the device is writable), which bear the tail that the
//     last record gives. That is how a mount is seen that ended in a power cut.
//     Where these headers are there already, the next mount would write the
//     same again, and nothing could be proved.
func (w *walker) xfsLog(r span, sb xfsSuper) ([]span, error) {
	blocks := sb.log.len / logBlock
	start := r.off + sb.log.off
	head, err := w.logHead(start, blocks)
	if err != nil {
		return nil, err
	}
	record, err := w.lastRecord(start, head)
	if err != nil {
		return nil, err
	}
	if !isUnmount(record, sb.uuid) {
		return nil, doubtf("the xfs at byte %d is mounted, or was not unmounted cleanly", r.off)
	}
	next, err := w.read(span{start + head%blocks*logBlock, logBlock})
	if err != nil {
		return nil, err
	}
	if binary.BigEndian.Uint32(next) == recordMagic && bytes.Equal(next[24:32], record[24:32]) {
		return nil, doubtf("the xfs at byte %d is mounted, or was when the power was cut, so that another mount could leave no trace", r.off)
	}
	// The window wraps at the end of the log.
	log := span{start, sb.log.len}
	first := head*logBlock - maxRecord - logMargin
	length := min(int64(maxRecord+logStale+2*logMargin), log.len)
	if first < 0 {
		first += log.len
	}
	spans := []span{log.clip(span{start + first, length})}
	if over := first + length - log.len; over > 0 {
		spans = append(spans, span{start, over})
	}
	return spans, nil
}

// logHead is the number of the first block of the older cycle, or that of all
// blocks if they are of the same.
func (w *walker) logHead(start, blocks int64) (int64, error) {
	cycle := func(n int64) (uint32, error) {
		b, err := w.read(span{start + n*logBlock, logBlock})
		if err != nil {
			return 0, err
		}
		if c := binary.BigEndian.Uint32(b); c != recordMagic {
			return c, nil
		}
		return binary.BigEndian.Uint32(b[4:]), nil
	}
	first, err := cycle(0)
	if err != nil {
		return 0, err
	}
	low, high := int64(0), blocks // low is of the first cycle, high is not
	if last, err := cycle(blocks - 1); err != nil || last == first {
		return blocks, err
	}
	for high-low > 1 {
		middle := (low + high) / 2
		c, err := cycle(middle)
		if err != nil {
			return 0, err
		}
		if c == first {
			low = middle
		} else {
			high = middle
		}
	}
	return high, nil
}

// lastRecord reads from the last record's header up to the head. Only a header
// begins with the magic, since every other block begins with its cycle. It is
// nil if there is none within the length of a record.
func (w *walker) lastRecord(start, head int64) ([]byte, error) {
	n := min(head*logBlock, maxRecord+2*logBlock)
	b, err := w.read(span{start + head*logBlock - n, n})
	if err != nil {
		return nil, err
	}
	for off := len(b) - logBlock; off >= 0; off -= logBlock {
		if binary.BigEndian.Uint32(b[off:]) == recordMagic {
			return b[off:], nil
		}
	}
	return nil, nil
}

// isUnmount reports whether a record that goes up to the head says that the file
// system was unmounted.
func isUnmount(record, uuid []byte) bool {
	if len(record) < 2*logBlock || !bytes.Equal(record[304:320], uuid) {
		return false
	}
	u32 := binary.BigEndian.Uint32
	header := int64(logBlock)
	if size := int64(u32(record[320:])); u32(record[8:])&2 != 0 && size > headerCycles {
		header = (size + headerCycles - 1) / headerCycles * logBlock
	}
	body := (int64(u32(record[12:])) + logBlock - 1) / logBlock * logBlock
	if body == 0 || header+body != int64(len(record)) || u32(record[40:]) != 1 {
		return false
	}
	return record[header+opFlags]&unmountOp != 0
}
