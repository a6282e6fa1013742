// SPDX-License-Identifier: BSD-2-Clause

package trace

import (
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"slices"
	"time"
)

// Profile is what a generated trace is like. Requests, their mix and their
// lengths are those published of the servers' volumes: D. Narayanan, A.
// Donnelly and A. Rowstron, "Write Off-Loading: Practical Power Management for
// Enterprise Storage", FAST 2008, and the summaries that come with the traces.
// WorkingSet, HotShare, HotBlocks, Sequential and PeakToMedian are assumptions
// in keeping with what is said there in words: few blocks take most of the
// writes, and load comes in bursts.
type Profile struct {
	Name         string
	Requests     int     // in a day
	WriteShare   float64 // of requests
	WriteBytes   int64   // mean length of a write, a multiple of 512
	ReadBytes    int64   // mean length of a read
	Span         int64   // bytes of the volume
	WorkingSet   float64 // share of the volume that is written to in a day
	HotShare     float64 // share of the writes that go to HotBlocks of the working set
	HotBlocks    float64
	Sequential   float64 // share of the writes that go on where the last one ended
	PeakToMedian float64 // requests of the busiest hour, to those of the middle one
}

// Profiles are three of the volumes, of a web proxy (prxy_0), a print server
// (prn_0) and a source control server (src2_0); requests are a seventh of those
// of the published week, to a round number.
var Profiles = []Profile{
	{Name: "prxy", Requests: 1_800_000, WriteShare: 0.97, WriteBytes: 4608, ReadBytes: 8192, Span: 20 << 30, WorkingSet: 0.03, HotShare: 0.9, HotBlocks: 0.1, Sequential: 0.1, PeakToMedian: 2},
	{Name: "prn", Requests: 800_000, WriteShare: 0.89, WriteBytes: 9728, ReadBytes: 22528, Span: 66 << 30, WorkingSet: 0.06, HotShare: 0.8, HotBlocks: 0.2, Sequential: 0.3, PeakToMedian: 4},
	{Name: "src", Requests: 220_000, WriteShare: 0.89, WriteBytes: 7168, ReadBytes: 7168, Span: 16 << 30, WorkingSet: 0.04, HotShare: 0.8, HotBlocks: 0.2, Sequential: 0.4, PeakToMedian: 8},
}

// Generator makes the events of a day, sorted by time.
type Generator struct {
	p       Profile
	r       *rand.Rand
	times   []time.Duration
	hot     []int64 // first block of each extent of the working set, hottest first
	next    int64   // where the last write ended
	emitted int
}

// workExtent is the extent in which the working set is made of neighbours.
const workExtent = 16 // blocks

// NewGenerator makes a generator of the same events for the same seed.
func NewGenerator(p Profile, seed uint64) *Generator {
	g := &Generator{p: p, r: rand.New(rand.NewPCG(seed, 0x6d7372))}
	// Hours differ as the profile says: the busiest by PeakToMedian from the
	// middle one, the quiet ones by as much to the other side.
	weight := make([]float64, 24)
	total := 0.0
	for i := range weight {
		x := float64(i)/23*2 - 1 // -1 to 1
		weight[i] = math.Pow(p.PeakToMedian, x*math.Abs(x))
		total += weight[i]
	}
	g.r.Shuffle(len(weight), func(i, j int) { weight[i], weight[j] = weight[j], weight[i] })
	for h, w := range weight {
		for range int(float64(p.Requests) * w / total) {
			g.times = append(g.times, time.Duration(h)*time.Hour+time.Duration(g.r.Int64N(int64(time.Hour))))
		}
	}
	slices.Sort(g.times)
	n := max(1, int(float64(p.Span/BlockSize)*p.WorkingSet)/workExtent)
	for range n {
		g.hot = append(g.hot, g.r.Int64N(max(1, p.Span/BlockSize-workExtent)))
	}
	return g
}

// Next gives the next event, or io.EOF.
func (g *Generator) Next() (Event, error) {
	if g.emitted == len(g.times) {
		return Event{}, io.EOF
	}
	e := Event{Time: g.times[g.emitted], Host: g.p.Name, Write: g.r.Float64() < g.p.WriteShare}
	g.emitted++
	mean := g.p.ReadBytes
	if e.Write {
		mean = g.p.WriteBytes
	}
	e.Length = g.length(mean)
	e.Response = time.Duration(g.r.ExpFloat64() * float64(5*time.Millisecond))
	switch {
	case !e.Write:
		e.Offset = g.r.Int64N(g.p.Span/BlockSize) * BlockSize
	case g.r.Float64() < g.p.Sequential:
		e.Offset = g.next
	default:
		k := len(g.hot)
		i := g.r.IntN(k)
		if hot := max(1, int(float64(k)*g.p.HotBlocks)); g.r.Float64() < g.p.HotShare {
			i = g.r.IntN(hot)
		}
		e.Offset = (g.hot[i] + g.r.Int64N(workExtent)) * BlockSize
	}
	e.Offset = min(e.Offset, g.p.Span-e.Length)
	if e.Write {
		if g.next = e.Offset + e.Length; g.next >= g.p.Span {
			g.next = 0
		}
	}
	return e, nil
}

// length draws a multiple of 512 with about that mean: most requests are of a
// block, few are long.
func (g *Generator) length(mean int64) int64 {
	if mean <= BlockSize {
		return mean / 512 * 512
	}
	extra := g.r.ExpFloat64() * float64(mean-BlockSize)
	return BlockSize + int64(extra/512+0.5)*512
}

// epoch is the file time at which generated traces begin.
const epoch = 128166372000000000

// WriteCSV writes events in the format that Reader reads.
func WriteCSV(w io.Writer, next func() (Event, error)) error {
	for {
		e, err := next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		kind := "Read"
		if e.Write {
			kind = "Write"
		}
		if _, err := fmt.Fprintf(w, "%d,%s,%d,%s,%d,%d,%d\n", epoch+uint64(e.Time/tick), e.Host, e.Disk, kind, e.Offset, e.Length, e.Response/tick); err != nil {
			return err
		}
	}
}
