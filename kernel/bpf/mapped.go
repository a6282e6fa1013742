// SPDX-License-Identifier: BSD-2-Clause

package bpf

import (
	"bufio"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/cilium/ebpf/btf"
)

// refuseMapped says why a device-mapper device cannot be tracked. Its error is
// made by no.
func (t target) refuseMapped(no func(why string) error) error {
	if exists(t.sysfs("mq")) {
		return no("it is a device-mapper device that takes requests (multipath), and its completions are not proven to be seen")
	}
	holders, err := os.ReadDir(t.sysfs("holders"))
	if err != nil {
		return no("its holders cannot be read: " + err.Error())
	}
	for _, h := range holders {
		// Those that turn their own bios to it are not seen to submit them.
		if !exists("/sys/class/block/" + h.Name() + "/dm") {
			return no("it is part of " + h.Name() + ": track that one's users, or track it with the dm tracker")
		}
	}
	if _, err := describeStack(t); err != nil {
		return no(err.Error())
	}
	if err := canCountSwaps(); err != nil {
		return no(err.Error())
	}
	return nil
}

// canCountSwaps looks for the kernel function that exchanges tables.
func canCountSwaps() error {
	var f *btf.Func
	spec, err := btf.LoadKernelSpec()
	if err == nil {
		err = spec.TypeByName(swapFunction, &f)
	}
	if err == nil {
		return nil
	}
	module, err := btf.LoadKernelModuleSpec("dm_mod")
	if err == nil {
		err = module.TypeByName(swapFunction, &f)
	}
	if err != nil {
		return fmt.Errorf("the kernel does not tell where device-mapper exchanges tables (BTF of %s in dm_mod): %w", swapFunction, err)
	}
	return nil
}

const (
	swapFunction = "dm_swap_table"

	// maxSwaps is how many devices may have their tables replaced.
	maxSwaps = 1 << 16
)

// kernelSymbol is the address of a kernel function that is in no BTF.
func kernelSymbol(name string) (uint64, error) {
	f, err := os.Open("/proc/kallsyms")
	if err != nil {
		return 0, unsupported("look for the address of %s: %w", name, err)
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		fields := strings.Fields(lines.Text())
		if len(fields) < 3 || fields[2] != name && !strings.HasPrefix(fields[2], name+".llvm.") {
			continue
		}
		address, err := strconv.ParseUint(fields[0], 16, 64)
		if err != nil || address == 0 {
			break
		}
		return address, nil
	}
	return 0, unsupported("the kernel does not tell the address of %s, which device-mapper needs (write 1 or 0 to /proc/sys/kernel/kptr_restrict)", name)
}

// bioFlag is the mask of a flag of bios, whose number is in an enumeration
// without a name.
func bioFlag(name string) (uint32, error) {
	spec, err := btf.LoadKernelSpec()
	if err != nil {
		return 0, unsupported("read the kernel's BTF: %w", err)
	}
	for typ, err := range spec.All() {
		if err != nil {
			return 0, unsupported("read the kernel's BTF: %w", err)
		}
		enum, ok := typ.(*btf.Enum)
		if !ok {
			continue
		}
		for _, v := range enum.Values {
			if v.Name == name && v.Value < 16 {
				return 1 << v.Value, nil
			}
		}
	}
	return 0, unsupported("the kernel's BTF has no %s", name)
}
