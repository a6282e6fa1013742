// SPDX-License-Identifier: BSD-2-Clause

package bpf

import (
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/features"
	"github.com/cilium/ebpf/link"
)

// misses reads how often each program was skipped because it had interrupted
// itself.
func misses(t testing.TB, tr *Tracker) (out [linkCount]uint64) {
	t.Helper()
	s, err := loadState(tr.stateMap())
	if err != nil {
		t.Fatal(err)
	}
	for i, id := range s.Progs {
		if id == 0 {
			continue
		}
		p, err := ebpf.NewProgramFromID(ebpf.ProgramID(id))
		if err != nil {
			t.Fatal(err)
		}
		stats, err := p.Stats()
		_ = p.Close()
		if err != nil {
			t.Fatal(err)
		}
		out[i] = stats.RecursionMisses
	}
	return out
}

func logMisses(t testing.TB, tr *Tracker) {
	for i, n := range misses(t, tr) {
		if n > 0 {
			t.Logf("%s was skipped %d times", programNames[i], n)
		}
	}
}

// TestThreeCopiesSeeWhatInterruptsTwo nests a tracepoint in itself: each copy of
// a program on bpf_trace_printk prints, which is the same event again, as an
// interrupt's write is the same event as the task's. One copy does not see the
// event within its own; three see every event at the three depths that task,
// softirq and hardirq can make. (At a fourth the kernel prints no more.)
//
// Linux 6.1 prints under a lock that it holds during the event, and waits for itself
// for ever.
func TestThreeCopiesSeeWhatInterruptsTwo(t *testing.T) {
	version, err := features.LinuxVersionCode()
	if err != nil {
		t.Fatal(err)
	}
	if version < 6<<16|2<<8 {
		t.Skip("a print within a print stops this kernel")
	}
	for _, c := range []struct {
		name         string
		copies       int
		runs, misses uint64
	}{
		// Events: one at depth 0, and one within it, which is not seen.
		{"One", 1, 1, 1},
		// Events: 1, then 3 within it, then 6 within those. They are seen by
		// three copies, two and one, and missed by none, one and two.
		{"Three", 3, 1*3 + 3*2 + 6*1, 3*1 + 6*2},
	} {
		t.Run(c.name, func(t *testing.T) {
			runs := countNested(t, c.copies)
			if runs.ran != c.runs || runs.missed != c.misses {
				t.Fatalf("copies ran %d times and were skipped %d times, want %d and %d", runs.ran, runs.missed, c.runs, c.misses)
			}
		})
	}
}

type nested struct{ ran, missed uint64 }

// countNested fires the event once with so many copies attached.
func countNested(t *testing.T, copies int) (n nested) {
	t.Helper()
	ran, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer ran.Close()
	var progs []*ebpf.Program
	for range copies {
		p := newProgram(t, &ebpf.ProgramSpec{
			Type: ebpf.Tracing, AttachType: ebpf.AttachTraceRawTp, AttachTo: "bpf_trace_printk", License: "GPL",
			Instructions: append(countIn(ran), printX()...),
		})
		l, err := link.AttachTracing(link.TracingOptions{Program: p, AttachType: ebpf.AttachTraceRawTp})
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		progs = append(progs, p)
	}
	first := newProgram(t, &ebpf.ProgramSpec{Type: ebpf.RawTracepoint, License: "GPL", Instructions: printX()})
	if _, err := first.Run(&ebpf.RunOptions{}); err != nil {
		t.Fatal(err)
	}
	for _, p := range progs {
		stats, err := p.Stats()
		if err != nil {
			t.Fatal(err)
		}
		n.missed += stats.RecursionMisses
	}
	if err := ran.Lookup(uint32(0), &n.ran); err != nil {
		t.Fatal(err)
	}
	return n
}

func newProgram(t *testing.T, spec *ebpf.ProgramSpec) *ebpf.Program {
	t.Helper()
	p, err := ebpf.NewProgram(spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.Close() })
	return p
}

// countIn adds one to the only value of a map.
func countIn(m *ebpf.Map) asm.Instructions {
	return asm.Instructions{
		asm.LoadMapValue(asm.R1, m.FD(), 0),
		asm.Mov.Imm(asm.R2, 1),
		asm.StoreXAdd(asm.R1, asm.R2, asm.DWord),
	}
}

// printX prints "x" by bpf_trace_printk and returns 0.
func printX() asm.Instructions {
	return asm.Instructions{
		asm.Mov.Imm(asm.R1, 'x'),
		asm.StoreMem(asm.RFP, -8, asm.R1, asm.DWord),
		asm.Mov.Reg(asm.R1, asm.RFP),
		asm.Add.Imm(asm.R1, -8),
		asm.Mov.Imm(asm.R2, 2),
		asm.FnTracePrintk.Call(),
		asm.Mov.Imm(asm.R0, 0),
		asm.Return(),
	}
}
