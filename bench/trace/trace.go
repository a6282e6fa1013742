// SPDX-License-Identifier: BSD-2-Clause

// Package trace reads block traces in the CSV format of Microsoft Research
// Cambridge (SNIA IOTTA repository, "MSR Cambridge Traces"), generates traces
// of the same characteristics for when the files are not there, and says which
// blocks each hour of one writes.
package trace

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Event is one request.
type Event struct {
	Time     time.Duration // since the first request of the trace
	Host     string
	Disk     int
	Write    bool
	Offset   int64 // bytes
	Length   int64 // bytes
	Response time.Duration
}

// A timestamp is a Windows file time, in units of 100 ns, as is a response.
const tick = 100 * time.Nanosecond

// Reader reads events. The files are sorted by time, mostly: an event before
// the first counts as at its time.
type Reader struct {
	in    *bufio.Scanner
	line  int
	start uint64
	begun bool
}

// NewReader reads a trace.
func NewReader(r io.Reader) *Reader { return &Reader{in: bufio.NewScanner(r)} }

// Next gives the next event, or io.EOF.
func (r *Reader) Next() (Event, error) {
	for r.in.Scan() {
		r.line++
		text := strings.TrimSpace(r.in.Text())
		if text == "" || r.line == 1 && strings.HasPrefix(text, "Timestamp") {
			continue
		}
		e, err := r.parse(text)
		if err != nil {
			return Event{}, fmt.Errorf("trace, line %d: %w", r.line, err)
		}
		return e, nil
	}
	if err := r.in.Err(); err != nil {
		return Event{}, fmt.Errorf("trace, line %d: %w", r.line+1, err)
	}
	return Event{}, io.EOF
}

// parse reads "Timestamp,Hostname,DiskNumber,Type,Offset,Size,ResponseTime".
func (r *Reader) parse(text string) (e Event, err error) {
	f := strings.Split(text, ",")
	if len(f) != 7 {
		return e, fmt.Errorf("%d fields, want 7", len(f))
	}
	stamp, err1 := strconv.ParseUint(f[0], 10, 63)
	disk, err2 := strconv.Atoi(f[2])
	offset, err3 := strconv.ParseInt(f[4], 10, 64)
	length, err4 := strconv.ParseInt(f[5], 10, 64)
	response, err5 := strconv.ParseUint(f[6], 10, 56)
	if err := errors.Join(err1, err2, err3, err4, err5); err != nil {
		return e, err
	}
	if disk < 0 || offset < 0 || length < 0 || offset+length < 0 {
		return e, fmt.Errorf("disk %d, offset %d, size %d: out of range", disk, offset, length)
	}
	switch strings.ToLower(f[3]) {
	case "read":
	case "write":
		e.Write = true
	default:
		return e, fmt.Errorf("type %q is neither Read nor Write", f[3])
	}
	if !r.begun {
		r.begun, r.start = true, stamp
	}
	if stamp > r.start {
		if stamp-r.start > uint64(1<<62)/uint64(tick) {
			return e, fmt.Errorf("timestamp %d is centuries after the first", stamp)
		}
		e.Time = time.Duration(stamp-r.start) * tick
	}
	e.Host, e.Disk, e.Offset, e.Length = f[1], disk, offset, length
	e.Response = time.Duration(response) * tick
	return e, nil
}

// BlockSize is the unit in which writes count, in bytes.
const BlockSize = 4096

// Hours gives, for each hour of a trace, the blocks that are written in it,
// once each and sorted, on a device of size bytes: an offset beyond it is
// folded back, block by block, so that a trace of a larger disk keeps its
// locality. It stops after so many hours.
func Hours(next func() (Event, error), size int64, hours int) ([][]int64, error) {
	sets := make([]map[int64]struct{}, hours)
	for i := range sets {
		sets[i] = map[int64]struct{}{}
	}
	blocks := size / BlockSize
	for {
		e, err := next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, err
		}
		h := int(e.Time / time.Hour)
		if h >= hours {
			break
		}
		if !e.Write || e.Length == 0 {
			continue
		}
		for b := e.Offset / BlockSize; b <= (e.Offset+e.Length-1)/BlockSize; b++ {
			sets[h][b%blocks] = struct{}{}
		}
	}
	out := make([][]int64, hours)
	for i, s := range sets {
		for b := range s {
			out[i] = append(out[i], b)
		}
		slices.Sort(out[i])
	}
	return out, nil
}
