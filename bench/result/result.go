// SPDX-License-Identifier: BSD-2-Clause

// Package result holds what the benchmark measured: rows in a CSV file, and
// their medians.
package result

import (
	"cmp"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
)

// Row is one measurement. A number that was not measured is negative.
type Row struct {
	Experiment string // which part of the benchmark
	Case       string // which input, such as "random 1 %"
	Tool       string
	Round      int
	Size       int64   // of the device, bytes
	Dirty      int64   // written since the last time, bytes
	Seconds    float64 // from start until the result is durable
	SourceCPU  float64 // seconds of user and system time where the device is
	OtherCPU   float64 // seconds at the receiving end, of a tool that has one
	Read       int64   // bytes read of the device
	Sent       int64   // bytes that left the source
	Stored     int64   // bytes that the store grew by
	Memory     int64   // peak resident bytes of the source's process
	Rate       float64 // of what is measured as a rate; Unit says what
	Unit       string
	Stolen     float64 // seconds of all cores together that went to other virtual machines meanwhile
}

// Parts ends the experiment's name in rows that say what single parts of the work took around it.
const Parts = ", parts"

// Unknown is a row of which nothing was measured yet.
func Unknown() Row {
	return Row{Size: -1, Dirty: -1, Seconds: -1, SourceCPU: -1, OtherCPU: -1, Read: -1, Sent: -1, Stored: -1, Memory: -1, Rate: -1, Stolen: -1}
}

var header = []string{
	"experiment", "case", "tool", "round", "size_bytes", "dirty_bytes", "seconds", "source_cpu_seconds",
	"other_cpu_seconds", "read_bytes", "sent_bytes", "stored_bytes", "peak_memory_bytes", "rate", "unit", "stolen_seconds",
}

func (r Row) record() []string {
	n := func(v int64) string {
		if v < 0 {
			return ""
		}
		return strconv.FormatInt(v, 10)
	}
	f := func(v float64) string {
		if v < 0 {
			return ""
		}
		return strconv.FormatFloat(v, 'f', 4, 64)
	}
	return []string{
		r.Experiment, r.Case, r.Tool, strconv.Itoa(r.Round), n(r.Size), n(r.Dirty), f(r.Seconds), f(r.SourceCPU),
		f(r.OtherCPU), n(r.Read), n(r.Sent), n(r.Stored), n(r.Memory), f(r.Rate), r.Unit, f(r.Stolen),
	}
}

func parse(rec []string) (r Row, err error) {
	n := func(s string) int64 {
		if s == "" {
			return -1
		}
		v, e := strconv.ParseInt(s, 10, 64)
		err = errors.Join(err, e)
		return v
	}
	f := func(s string) float64 {
		if s == "" {
			return -1
		}
		v, e := strconv.ParseFloat(s, 64)
		err = errors.Join(err, e)
		return v
	}
	r = Row{
		Experiment: rec[0], Case: rec[1], Tool: rec[2], Round: int(n(rec[3])), Size: n(rec[4]), Dirty: n(rec[5]),
		Seconds: f(rec[6]), SourceCPU: f(rec[7]), OtherCPU: f(rec[8]), Read: n(rec[9]), Sent: n(rec[10]),
		Stored: n(rec[11]), Memory: n(rec[12]), Rate: f(rec[13]), Unit: rec[14], Stolen: f(rec[15]),
	}
	return r, err
}

// Write writes rows as CSV, with a header.
func Write(w io.Writer, rows []Row) error {
	c := csv.NewWriter(w)
	if err := c.Write(header); err != nil {
		return err
	}
	for _, r := range rows {
		if err := c.Write(r.record()); err != nil {
			return err
		}
	}
	c.Flush()
	return c.Error()
}

// Read reads what Write wrote.
func Read(r io.Reader) ([]Row, error) {
	c := csv.NewReader(r)
	c.FieldsPerRecord = len(header)
	first, err := c.Read()
	if err != nil {
		return nil, fmt.Errorf("read results: %w", err)
	}
	if !slices.Equal(first, header) {
		return nil, fmt.Errorf("read results: columns %v, want %v", first, header)
	}
	var rows []Row
	for {
		rec, err := c.Read()
		if errors.Is(err, io.EOF) {
			return rows, nil
		}
		if err != nil {
			return nil, fmt.Errorf("read results: %w", err)
		}
		row, err := parse(rec)
		if err != nil {
			line, _ := c.FieldPos(0)
			return nil, fmt.Errorf("read results, line %d: %w", line, err)
		}
		rows = append(rows, row)
	}
}

// Load reads a file of results; one that does not exist has none.
func Load(path string) ([]Row, error) {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return Read(f)
}

// Save replaces a file of results.
func Save(path string, rows []Row) error {
	f, err := os.Create(path + ".new")
	if err != nil {
		return err
	}
	err = Write(f, rows)
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err != nil {
		return fmt.Errorf("save results: %w", err)
	}
	return os.Rename(path+".new", path)
}

// Key says what of rows that are rounds of the same thing is the same.
type Key struct {
	Experiment, Case, Tool string
	Size                   int64
}

// Key is what the row is a round of.
func (r Row) Key() Key { return Key{r.Experiment, r.Case, r.Tool, r.Size} }

// Set is rows, to be asked for medians.
type Set []Row

// Select gives the rows for which keep is true.
func (s Set) Select(keep func(Row) bool) Set {
	var out Set
	for _, r := range s {
		if keep(r) {
			out = append(out, r)
		}
	}
	return out
}

// Spread is a median, with the least and the greatest of N measurements.
type Spread struct {
	Median, Min, Max float64
	N                int
}

// Of gives the spread of one number of the rows, leaving out rows where it was
// not measured. Of none, N is 0.
func (s Set) Of(number func(Row) float64) Spread {
	var v []float64
	for _, r := range s {
		if x := number(r); x >= 0 {
			v = append(v, x)
		}
	}
	return SpreadOf(v)
}

// SpreadOf gives the spread of numbers, which it sorts.
func SpreadOf(v []float64) Spread {
	if len(v) == 0 {
		return Spread{Median: -1, Min: -1, Max: -1}
	}
	slices.Sort(v)
	m := v[len(v)/2]
	if len(v)%2 == 0 {
		m = (v[len(v)/2-1] + m) / 2
	}
	return Spread{m, v[0], v[len(v)-1], len(v)}
}

// Distinct lists what of gives for the rows, once each, in their order.
func Distinct[T cmp.Ordered](s Set, of func(Row) T) []T {
	var out []T
	for _, r := range s {
		if x := of(r); !slices.Contains(out, x) {
			out = append(out, x)
		}
	}
	return out
}

// The numbers of a row that are asked for most.
var (
	Seconds   = func(r Row) float64 { return r.Seconds }
	SourceCPU = func(r Row) float64 { return r.SourceCPU }
	Stolen    = func(r Row) float64 { return r.Stolen }
	OtherCPU  = func(r Row) float64 { return r.OtherCPU }
	BytesRead = func(r Row) float64 { return float64(r.Read) }
	Sent      = func(r Row) float64 { return float64(r.Sent) }
	Stored    = func(r Row) float64 { return float64(r.Stored) }
	Memory    = func(r Row) float64 { return float64(r.Memory) }
	Rate      = func(r Row) float64 { return r.Rate }
)
