// SPDX-License-Identifier: BSD-2-Clause

package bpf

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel/devmapper"
)

// A stack is the tables of a device-mapper device and of those beneath it. What
// it comes to is a list of pieces, each a range of something that is not looked
// into: a disk, or a target that computes its content.
type piece struct {
	what           string
	offset, length uint64 // sectors of what
}

// How a target type is looked at. Types that are not here are refused: their
// content may change without a write to the device (snapshot-merge, switch), or
// nothing was tried with them.
type manner int

const (
	unknown manner = iota
	through        // a range of another device
	whole          // computed from its parameters and the devices that they name
	thin           // a volume of a pool, which grows and moves without a change of what it holds
)

var manners = map[string]manner{
	"linear": through, "snapshot-origin": through,
	"striped": whole, "crypt": whole, "delay": whole, "flakey": whole, "error": whole, "zero": whole,
	"thin": thin,
}

const (
	maxStackDepth   = 16
	maxStackDevices = 32
)

// stackRecord is what the stack was at one moment, in the map of that name.
type stackRecord struct {
	Digest  [sha256.Size]byte // of the pieces
	Count   uint64
	Devices [maxStackDevices]stackDevice // all device-mapper devices in it
}

// stackDevice says how often a device's live table had been replaced.
type stackDevice struct{ Seq, Swaps uint64 }

func (r *stackRecord) devices() []stackDevice { return r.Devices[:min(r.Count, maxStackDevices)] }

// stackError says what is wrong with a stack itself.
type stackError string

func (e stackError) Error() string { return string(e) }

// describeStack reads the tables; swap counts are left at zero.
func describeStack(t target) (stackRecord, error) {
	w := stackWalk{}
	size := t.sectors
	pieces, err := w.content(unix.Mkdev(t.dev.major, t.dev.minor), 0, size, 0)
	if err != nil {
		return stackRecord{}, err
	}
	r := stackRecord{Digest: digest(pieces), Count: uint64(len(w.seqs))}
	for i, seq := range w.seqs {
		r.Devices[i].Seq = seq
	}
	return r, nil
}

func digest(pieces []piece) [sha256.Size]byte {
	var b bytes.Buffer
	for _, p := range pieces {
		fmt.Fprintf(&b, "%d %d %q\n", p.length, p.offset, p.what)
	}
	return sha256.Sum256(b.Bytes())
}

// stackWalk collects the diskseq of each device that it comes to.
type stackWalk struct{ seqs []uint64 }

// content lists what n sectors of a device from one on are.
func (w *stackWalk) content(dev, from, n uint64, depth int) ([]piece, error) {
	sysfs := sysfsOf(dev)
	if !exists(sysfs + "/dm") {
		return []piece{{sysfs, from, n}}, nil
	}
	seq, err := readNumber(sysfs + "/diskseq")
	if err != nil {
		return nil, err
	}
	if exists(sysfs+"/mq") && depth > 0 { // multipath: its paths come and go
		return []piece{{fmt.Sprintf("multipath %d", seq), from, n}}, nil
	}
	if err := w.visit(seq, depth); err != nil {
		return nil, err
	}
	table, err := tableOf(dev)
	if err != nil {
		return nil, err
	}
	var out []piece
	for _, t := range table {
		start, end := max(t.Start, from), min(t.Start+t.Length, from+n)
		if start >= end {
			continue
		}
		more, err := w.target(t, start-t.Start, end-start, depth)
		if err != nil {
			return nil, err
		}
		out = join(out, more)
	}
	return out, nil
}

func (w *stackWalk) visit(seq uint64, depth int) error {
	if !slices.Contains(w.seqs, seq) {
		w.seqs = append(w.seqs, seq)
	}
	if depth > maxStackDepth || len(w.seqs) > maxStackDevices {
		return stackError("it is stacked on more device-mapper devices than can be watched")
	}
	return nil
}

// target lists what n sectors of a target from one on are.
func (w *stackWalk) target(t devmapper.Target, from, n uint64, depth int) ([]piece, error) {
	fields := strings.Fields(t.Params)
	switch manners[t.Type] {
	case through:
		var offset uint64
		below, ok := parseDev(fields, 0)
		if len(fields) > 1 {
			var err error
			offset, err = strconv.ParseUint(fields[1], 10, 64)
			ok = ok && err == nil
		}
		if !ok {
			return nil, stackError(fmt.Sprintf("its %s target has the parameters %q, which make no sense here", t.Type, t.Params))
		}
		return w.content(below, offset+from, n, depth+1)
	case whole:
		for i := range fields {
			below, ok := parseDev(fields, i)
			if !ok || !exists(sysfsOf(below)+"/dm") {
				continue
			}
			size, err := readNumber(sysfsOf(below) + "/size")
			if err != nil {
				return nil, err
			}
			pieces, err := w.content(below, 0, size, depth+1)
			if err != nil {
				return nil, err
			}
			fields[i] = fmt.Sprintf("%x", digest(pieces))
		}
	case thin:
		if err := w.pool(t, fields, depth); err != nil {
			return nil, err
		}
	case unknown:
		return nil, stackError(fmt.Sprintf("it is made with the device-mapper target %q, of which it is not known what changes its content", t.Type))
	}
	return []piece{{t.Type + " " + strings.Join(fields, " "), from, n}}, nil
}

// pool looks at the pool of a thin volume. What was never written reads as
// zeros, and must do so when something is written beside it: then the pool gives
// room to both at once, with what was there before unless it wipes it.
func (w *stackWalk) pool(t devmapper.Target, fields []string, depth int) error {
	dev, ok := parseDev(fields, 0)
	if !ok || len(fields) != 2 {
		return stackError(fmt.Sprintf("its thin target has the parameters %q: volumes with an external origin are not known", t.Params))
	}
	seq, err := readNumber(sysfsOf(dev) + "/diskseq")
	if err != nil {
		return err
	}
	if err := w.visit(seq, depth+1); err != nil {
		return err
	}
	table, err := tableOf(dev)
	if err != nil {
		return err
	}
	for _, pool := range table {
		if pool.Type != "thin-pool" {
			continue
		}
		if slices.Contains(strings.Fields(pool.Params), "skip_block_zeroing") {
			return stackError("its thin pool does not zero blocks, so that a write changes what lies beside it (lvchange --zero y)")
		}
	}
	return nil
}

func tableOf(dev uint64) ([]devmapper.Target, error) {
	info, err := devmapper.Find(dev)
	if err != nil {
		return nil, err
	}
	return devmapper.Table(info.Name, devmapper.Query{NoFlush: true})
}

// join appends, and makes one piece of two that are one behind the other.
func join(out, more []piece) []piece {
	for _, p := range more {
		if last := len(out) - 1; last >= 0 && out[last].what == p.what && out[last].offset+out[last].length == p.offset {
			out[last].length += p.length
			continue
		}
		out = append(out, p)
	}
	return out
}

func parseDev(fields []string, i int) (dev uint64, ok bool) {
	if i >= len(fields) {
		return 0, false
	}
	major, minor, ok := strings.Cut(fields[i], ":")
	a, err := strconv.ParseUint(major, 10, 32)
	b, err2 := strconv.ParseUint(minor, 10, 32)
	return unix.Mkdev(uint32(a), uint32(b)), ok && err == nil && err2 == nil
}

func sysfsOf(dev uint64) string {
	return fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(dev), unix.Minor(dev))
}

// lookAtStack reads the tables and how often they were replaced, both as of
// one moment. A replacement is counted just after it took place, so that the
// count belongs to these tables or to earlier ones, never to later ones.
func lookAtStack(swaps *ebpf.Map, t target) (stackRecord, error) {
	for range 100 {
		now, err := describeStack(t)
		if err != nil {
			return stackRecord{}, err
		}
		counted := now
		if err := countSwaps(swaps, &counted); err != nil {
			return stackRecord{}, err
		}
		again, err := describeStack(t)
		if err != nil {
			return stackRecord{}, err
		}
		unchanged := again == now
		if err := countSwaps(swaps, &again); err != nil {
			return stackRecord{}, err
		}
		if unchanged && again == counted {
			return counted, nil
		}
	}
	return stackRecord{}, fmt.Errorf("look at the device-mapper tables of %s: they keep changing", t.path())
}

func countSwaps(swaps *ebpf.Map, r *stackRecord) error {
	for i := range r.devices() {
		n, err := swapsOf(swaps, r.Devices[i].Seq)
		if err != nil {
			return err
		}
		r.Devices[i].Swaps = n
	}
	return nil
}

func swapsOf(swaps *ebpf.Map, seq uint64) (n uint64, err error) {
	if err := swaps.Lookup(seq, &n); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return 0, fmt.Errorf("read how often a device-mapper table was replaced: %w", err)
	}
	return n, nil
}

// noteStack writes down what the stack is when tracking begins.
func noteStack(coll *ebpf.Collection, t target) error {
	r, err := lookAtStack(coll.Maps[objectMapSwaps], t)
	if err != nil {
		return fmt.Errorf("track %s: %w", t.path(), err)
	}
	return storeStack(coll.Maps[objectMapStack], r)
}

func storeStack(m *ebpf.Map, r stackRecord) error {
	var b bytes.Buffer
	if err := binary.Write(&b, binary.LittleEndian, r); err != nil {
		return fmt.Errorf("encode device-mapper tables: %w", err)
	}
	return storeRecord(m, b.Bytes())
}

// inspectStack says why the content may have changed without a write to the
// device, or nothing. Tables may be replaced by ones that come to the same, as
// a snapshot of a logical volume does with its origin; but no table may have
// been live that was not looked at.
func (t *Tracker) inspectStack() (string, error) {
	b, err := loadRecord(t.stackMap())
	if err != nil {
		return "", err
	}
	var was stackRecord
	if err := binary.Read(bytes.NewReader(b), binary.LittleEndian, &was); err != nil {
		return "", fmt.Errorf("decode device-mapper tables: %w", err)
	}
	now, err := lookAtStack(t.swapsMap(), t.target)
	var wrong stackError
	if errors.As(err, &wrong) {
		return "the device-mapper table of " + t.Device() + " was replaced: " + wrong.Error() + afresh, nil
	}
	if err != nil {
		return "", err
	}
	if now.Digest != was.Digest {
		return fmt.Sprintf("the device-mapper table of %s, or of a device beneath it, now leads to something else", t.Device()) + afresh, nil
	}
	replaced, err := t.replacedBetween(was, now)
	if err != nil {
		return "", err
	}
	if replaced > 1 {
		return fmt.Sprintf("the device-mapper tables of %s, and of devices beneath it, were replaced %d times since they were last looked at, so that what was there between is not known", t.Device(), replaced) + afresh, nil
	}
	if now == was {
		return "", nil
	}
	return "", storeStack(t.stackMap(), now)
}

// replacedBetween counts the replacements of tables in devices of either
// stack. With at most one, the first stack was exchanged for the second at once.
func (t *Tracker) replacedBetween(was, now stackRecord) (uint64, error) {
	before := map[uint64]uint64{}
	for _, d := range now.devices() {
		before[d.Seq] = 0 // beneath it only now: what was since the start counts
	}
	for _, d := range was.devices() {
		before[d.Seq] = d.Swaps
	}
	var sum uint64
	for seq, n := range before {
		swaps, err := swapsOf(t.swapsMap(), seq)
		if err != nil {
			return 0, err
		}
		sum += swaps - n
	}
	return sum, nil
}
