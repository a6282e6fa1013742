// SPDX-License-Identifier: BSD-2-Clause

package vm

import (
	"regexp"
	"time"
)

// Config says what a guest has. The zero value is a guest with busybox and
// nothing else.
type Config struct {
	// Memory in MiB (512), which also holds the root file system; CPUs (2).
	Memory, CPUs int

	// Modules are loaded at boot, in this order, with all that they need: names as
	// modprobe knows them, or paths of .ko files on the host (see BuildModule). A name
	// may be followed by parameters: "loop max_part=8". What is built in is accepted.
	Modules []string
	// Loadable are there for modprobe in the guest, but not loaded.
	Loadable []string

	// Tools are commands of the host, taken with the libraries that they need; those of
	// lvm2, device-mapper and file systems work without udev. busybox has the rest.
	Tools []string
	// Backup puts the command dsync-backup, built from the sources, into the PATH.
	Backup bool
	// Files are further files: path in the guest, path on the host.
	Files map[string]string

	// Disks are virtio disks, in the order of /dev/vda, /dev/vdb, …
	Disks []Disk
	// Scratch, in MiB, is a disk of its own with an ext4 that is mounted on /tmp, for what
	// memory file systems cannot do (O_DIRECT) or hold. It is made new at each boot.
	Scratch int

	// Monitor lets the scenario save the guest's memory and revert to it.
	Monitor bool

	// Counted makes the guest's clock go by the instructions that it has run, one a
	// nanosecond, on one processor: what takes it so long takes as long on any host.
	Counted bool

	// Cmdline is added to the kernel's command line.
	Cmdline string
	// Timeout is how long one command may take (3 minutes).
	Timeout time.Duration
	// Allow names lines of the kernel's log that are no fault in this scenario.
	Allow []Allow
}

// Disk is a disk of a guest, empty at first and kept from boot to boot.
type Disk struct {
	Name  string // also its serial number; up to 20 letters
	Size  int64  // bytes, a multiple of 512
	Cache string // QEMU's cache mode: "writeback" (the default), "none", "writethrough", "unsafe"
	// From is a file of the host with the first contents. It is copied.
	From string
	// BlockSize is the logical and physical block size (512).
	BlockSize int
	// NoDiscard makes the disk refuse discards.
	NoDiscard bool
	ReadOnly  bool
}

// Allow is a line of the kernel's log that is known and harmless, and why.
type Allow struct {
	Line   *regexp.Regexp
	Reason string
}

func (c *Config) defaults() {
	if c.Memory == 0 {
		c.Memory = 512
	}
	if c.CPUs == 0 {
		c.CPUs = 2
	}
	if c.Counted {
		c.CPUs = 1
	}
	if c.Timeout == 0 {
		c.Timeout = 3 * time.Minute
	}
	if c.Scratch != 0 {
		c.Tools = append([]string{"mkfs.ext4"}, c.Tools...)
		c.Disks = append(append([]Disk(nil), c.Disks...), Disk{Name: scratch, Size: int64(c.Scratch) << 20, Cache: "unsafe"})
	}
}

const scratch = "scratch"
