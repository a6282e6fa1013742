// SPDX-License-Identifier: BSD-2-Clause

package bpf

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// Names of pinned objects; links are pinned as link_<program>.
const (
	pinState  = objectMapState
	pinPrefix = "link_"
)

// mapNames lists the pinned maps, the state first: what is pinned without a
// state is the rest of a start that crashed.
var mapNames = [mapCount]string{
	objectMapState, objectMapVerdict, objectMapActive, objectMapBits0, objectMapBits1,
	objectMapRaised, objectMapSettled, objectMapInflight, objectMapSwaps, objectMapStack,
}

// programNames lists the programs in the order of their attachment: completion
// first, then issue, then submission, so that no write which is seen to begin
// can end unseen. A tracker has those that [target.wants].
var programNames = [linkCount]string{
	objectProgTableSwap,
	objectProgBioComplete0, objectProgBioComplete1, objectProgBioComplete2,
	objectProgRqComplete0, objectProgRqComplete1, objectProgRqComplete2,
	objectProgRqIssue0, objectProgRqIssue1, objectProgRqIssue2,
	objectProgBioQueue0, objectProgBioQueue1, objectProgBioQueue2,
	objectProgHibernate,
}

// ErrUnsupported says that this machine cannot track with eBPF; the text names
// what is missing.
var ErrUnsupported = errors.New("the bpf tracker is not supported here")

func unsupported(format string, args ...any) error {
	return fmt.Errorf("%w: %w", ErrUnsupported, fmt.Errorf(format, args...))
}

// Supported reports whether this kernel and this process can track, by loading
// the programs without attaching them. Its error names the missing feature.
func Supported() error {
	if err := available(); err != nil {
		return err
	}
	coll, err := load(target{dev: devno{1, 1}, diskDev: devno{1, 1}, sectors: 8})
	if err != nil {
		return err
	}
	coll.Close()
	return nil
}

// available looks for what can be seen missing without loading anything.
func available() error {
	if os.Geteuid() != 0 {
		return unsupported("it needs root (CAP_SYS_ADMIN, or CAP_BPF and CAP_PERFMON)")
	}
	// A real-time kernel preempts the programs, so that any number of them
	// can be half done on one CPU, and three copies are not enough.
	if readText("/sys/kernel/realtime") == "1" {
		return unsupported("the kernel is a real-time one (PREEMPT_RT)")
	}
	if !exists("/sys/kernel/btf/vmlinux") {
		return unsupported("the kernel has no BTF (CONFIG_DEBUG_INFO_BTF)")
	}
	kernelTypes, err := btf.LoadKernelSpec()
	if err != nil {
		return unsupported("read the kernel's BTF: %w", err)
	}
	for _, tp := range []string{"block_bio_queue", "block_bio_complete", "block_rq_issue", "block_rq_complete"} {
		if _, err := kernelTypes.AnyTypeByName("btf_trace_" + tp); err != nil {
			return unsupported("the kernel has no tracepoint %s", tp)
		}
	}
	if readText("/proc/filesystems") == "" || !exists(bpffs) {
		return unsupported("there is no %s to mount bpffs at", bpffs)
	}
	return nil
}

// specify is the object for one target, not loaded yet.
func specify(t target) (*ebpf.CollectionSpec, error) {
	spec, err := loadObject()
	if err != nil {
		return nil, fmt.Errorf("read the eBPF object: %w", err)
	}
	var chainEndio uint64
	var tracedFlag uint32
	if t.mapped {
		if chainEndio, err = kernelSymbol("bio_chain_endio"); err != nil {
			return nil, err
		}
		if tracedFlag, err = bioFlag("BIO_TRACE_COMPLETION"); err != nil {
			return nil, err
		}
		spec.Maps[objectMapSwaps].MaxEntries = maxSwaps
	}
	for name := range spec.Programs {
		if !t.wants(name) {
			delete(spec.Programs, name)
		}
	}
	for name, value := range map[string]any{
		objectVarDiskMajor:   t.diskDev.major,
		objectVarDiskMinor:   t.diskDev.minor,
		objectVarDiskSeq:     t.diskSeq,
		objectVarStartSector: t.start,
		objectVarEndSector:   t.start + t.sectors,
		objectVarTakesBios:   t.mapped,
		objectVarChainEndio:  chainEndio,
		objectVarTracedFlag:  tracedFlag,
	} {
		if err := spec.Variables[name].Set(value); err != nil {
			return nil, fmt.Errorf("set %s in the eBPF object: %w", name, err)
		}
	}
	spec.Maps[objectMapBits0].MaxEntries = t.words()
	spec.Maps[objectMapBits1].MaxEntries = t.words()
	spec.Maps[objectMapActive].InnerMap.MaxEntries = t.words()
	spec.Maps[objectMapInflight].MaxEntries = t.requests()
	// A kernel that cannot sleep has no such tracepoint, and no hibernation.
	if kernelTypes, err := btf.LoadKernelSpec(); err == nil {
		if _, err := kernelTypes.AnyTypeByName("btf_trace_suspend_resume"); err != nil {
			delete(spec.Programs, objectProgHibernate)
		}
	}
	return spec, nil
}

func load(t target) (*ebpf.Collection, error) {
	spec, err := specify(t)
	if err != nil {
		return nil, err
	}
	coll, err := ebpf.NewCollection(spec)
	switch {
	case err == nil:
	case errors.Is(err, unix.EPERM):
		return nil, unsupported("the kernel does not permit it (CAP_BPF, lockdown, or a container): %w", err)
	case errors.Is(err, unix.ENOMEM), errors.Is(err, unix.E2BIG):
		return nil, fmt.Errorf("allocate two bitmaps of %d MiB: %w", t.words()>>17, err)
	default:
		return nil, unsupported("load the programs (Linux 5.17 or newer is needed): %w", err)
	}
	bits := coll.Maps[objectMapBits0]
	if err := coll.Maps[objectMapActive].Put(uint32(0), bits); err != nil {
		coll.Close()
		return nil, fmt.Errorf("set the first bitmap: %w", err)
	}
	return coll, nil
}

// pinMaps pins the maps of a start and notes their IDs.
func pinMaps(coll *ebpf.Collection, dir string, s *state) error {
	for i, name := range mapNames {
		m := coll.Maps[name]
		id, err := mapID(m)
		if err != nil {
			return err
		}
		s.Maps[i] = uint32(id)
		if err := m.Pin(filepath.Join(dir, name)); err != nil {
			return fmt.Errorf("pin map: %w", err)
		}
	}
	return nil
}

// attach attaches and pins the programs in their order, and notes their IDs.
func attach(t target, coll *ebpf.Collection, dir string, s *state, o Options) error {
	for i, name := range programNames {
		prog := coll.Programs[name]
		if !t.wants(name) || prog == nil && name == objectProgHibernate || o.skip(name) {
			continue
		}
		kind := ebpf.AttachTraceRawTp
		if name == objectProgTableSwap {
			kind = ebpf.AttachTraceFExit
		}
		if err := attachOne(prog, kind, filepath.Join(dir, pinPrefix+name), &s.Links[i], &s.Progs[i]); err != nil {
			return fmt.Errorf("attach %s: %w", name, err)
		}
		o.hook("attached " + name)
	}
	return nil
}

func attachOne(prog *ebpf.Program, kind ebpf.AttachType, pin string, linkID, progID *uint32) error {
	l, err := link.AttachTracing(link.TracingOptions{Program: prog, AttachType: kind})
	if err != nil {
		return err
	}
	defer l.Close()
	info, err := l.Info()
	if err != nil {
		return err
	}
	*linkID, *progID = uint32(info.ID), uint32(info.Program)
	return l.Pin(pin)
}

func mapID(m *ebpf.Map) (ebpf.MapID, error) {
	info, err := m.Info()
	if err != nil {
		return 0, fmt.Errorf("read map ID: %w", err)
	}
	id, ok := info.ID()
	if !ok {
		return 0, errors.New("read map ID: the kernel has none")
	}
	return id, nil
}
