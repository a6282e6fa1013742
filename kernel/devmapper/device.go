// SPDX-License-Identifier: BSD-2-Clause

package devmapper

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Info is what the kernel says of a device.
type Info struct {
	Name  string
	UUID  string
	Dev   uint64 // the device number, as stat returns it in st_rdev
	Opens int    // how often it is open, mounts and devices above it among them
	Event uint32 // number of the last event

	Suspended         bool
	InternalSuspended bool // by the kernel itself
	ReadOnly          bool
	Live              bool // it has a live table
	Inactive          bool // a table is loaded that a resume would make live
	DeferredRemove    bool // it goes away with its last user
	Targets           int  // in the live table
}

// Major and Minor are the parts of the device number.
func (i Info) Major() uint32 { return unix.Major(i.Dev) }

// Minor is the second part of the device number.
func (i Info) Minor() uint32 { return unix.Minor(i.Dev) }

func (a answer) info() Info {
	return Info{
		Name: cString(a.Name[:]), UUID: cString(a.Uuid[:]), Dev: decodeDev(a.Dev),
		Opens: int(a.Open_count), Event: a.Event_nr, Targets: int(a.Target_count),
		Suspended:         a.Flags&unix.DM_SUSPEND_FLAG != 0,
		InternalSuspended: a.Flags&unix.DM_INTERNAL_SUSPEND_FLAG != 0,
		ReadOnly:          a.Flags&unix.DM_READONLY_FLAG != 0,
		Live:              a.Flags&unix.DM_ACTIVE_PRESENT_FLAG != 0,
		Inactive:          a.Flags&unix.DM_INACTIVE_PRESENT_FLAG != 0,
		DeferredRemove:    a.Flags&unix.DM_DEFERRED_REMOVE != 0,
	}
}

// unmangled are the characters beside letters and digits that udev and
// libdevmapper leave as they are in /dev/mapper.
const unmangled = "#+-.:=@_"

// CheckName refuses a name that the kernel would not take, or that has another
// form in /dev/mapper than in the kernel: udev and libdevmapper write what is
// not a letter, a digit or one of #+-.:=@_ as \xNN there.
func CheckName(name string) error {
	bad := func(why string) error { return fmt.Errorf("name %q of a device-mapper device: %s", name, why) }
	switch {
	case name == "" || name == "." || name == ".." || name == unix.DM_CONTROL_NODE:
		return bad("it cannot be used")
	case len(name) >= unix.DM_NAME_LEN:
		return bad(fmt.Sprintf("it is longer than %d bytes", unix.DM_NAME_LEN-1))
	}
	for _, c := range name {
		letter := 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9'
		if !letter && !strings.ContainsRune(unmangled, c) {
			return bad("use letters, digits and " + unmangled)
		}
	}
	return nil
}

// Version is the version of the kernel's ioctl interface. An error says that
// there is no device-mapper, or one that this package cannot talk to.
func Version() (major, minor, patch uint32, err error) {
	a, err := request{cmd: unix.DM_VERSION, what: "ask for the version of device-mapper"}.do()
	return a.Version[0], a.Version[1], a.Version[2], err
}

// Create makes a suspended device without a table. The uuid may be empty;
// unix.EBUSY says that the name or the uuid is taken.
func Create(name, uuid string) (Info, error) {
	if err := CheckName(name); err != nil {
		return Info{}, err
	}
	if len(uuid) >= unix.DM_UUID_LEN {
		return Info{}, fmt.Errorf("create device-mapper device %s: the uuid %q is longer than %d bytes", name, uuid, unix.DM_UUID_LEN-1)
	}
	r := request{cmd: unix.DM_DEV_CREATE, what: "create", name: name, uuid: uuid}
	a, err := r.do()
	if err != nil {
		return Info{}, err
	}
	return a.info(), nil
}

// Stat asks for a device by its name. unix.ENXIO: there is none.
func Stat(name string) (Info, error) {
	a, err := request{cmd: unix.DM_DEV_STATUS, what: "look at", name: name}.do()
	if err != nil {
		return Info{}, err
	}
	return a.info(), nil
}

// Find asks for a device by its number, as stat returns it in st_rdev.
// unix.ENXIO: there is none.
func Find(dev uint64) (Info, error) {
	a, err := request{cmd: unix.DM_DEV_STATUS, what: "look at", dev: encodeDev(dev)}.do()
	if err != nil {
		return Info{}, err
	}
	return a.info(), nil
}

// SuspendOptions say how a device is suspended; the zero value freezes the
// file system on it and waits until all I/O is done.
type SuspendOptions struct {
	// NoFlush leaves I/O that waits in the device where it is. Only some
	// targets can; the others wait all the same.
	NoFlush bool
	// SkipLockFS does not freeze the file system that is mounted on the device.
	// Without a file system, freezing writes out the device's page cache.
	SkipLockFS bool
}

// Suspend returns when no I/O is under way in the device. What is submitted
// from then on waits until Resume, and so does whoever waits for it: nothing
// that the caller needs may lie on the device. Suspending a device that is
// suspended is no error. A signal to this process may end the wait in the
// kernel; it is begun again unless ctx is done.
func Suspend(ctx context.Context, name string, o SuspendOptions) error {
	r := request{cmd: unix.DM_DEV_SUSPEND, what: "suspend", name: name, flags: unix.DM_SUSPEND_FLAG | o.flags()}
	for {
		_, err := r.do()
		if errors.Is(err, unix.EINTR) && ctx.Err() == nil {
			continue
		}
		if errors.Is(err, unix.EINVAL) { // some kernels say so of a suspended device
			if info, statErr := Stat(name); statErr == nil && info.Suspended {
				return nil
			}
		}
		return err
	}
}

func (o SuspendOptions) flags() (f uint32) {
	if o.NoFlush {
		f |= unix.DM_NOFLUSH_FLAG
	}
	if o.SkipLockFS {
		f |= unix.DM_SKIP_LOCKFS_FLAG
	}
	return f
}

// ResumeOptions say how a device is resumed; the zero value is right for a new
// device.
type ResumeOptions struct {
	// SuspendOptions are for the suspension by which the kernel puts a new
	// table into a device that is not suspended.
	SuspendOptions
	// NoNode does not look at the node: for a device that has one already,
	// when there is no time to wait for udev.
	NoNode bool
}

// Resume makes the table that was loaded the live one, if there is one, and
// lets I/O go on. On return the node /dev/mapper/NAME is there and leads to
// the device; if it cannot be had, that is an error, and the device is resumed.
func Resume(ctx context.Context, name string, o ResumeOptions) error {
	r := request{cmd: unix.DM_DEV_SUSPEND, what: "resume", name: name, flags: o.flags(), cookie: primarySource}
	for {
		a, err := r.do()
		switch {
		case errors.Is(err, unix.EINTR) && ctx.Err() == nil:
		case err != nil:
			return err
		case o.NoNode:
			return nil
		default:
			return EnsureNode(ctx, a.info())
		}
	}
}

// RemoveOptions say what happens to a device that is in use.
type RemoveOptions struct {
	// Deferred removes it when its last user goes.
	Deferred bool
}

// busyWait is how long Remove waits for programs that open any new device for a
// moment, as udev's do.
const busyWait = 3 * time.Second

// Remove removes a device with its tables and its node. A device that is in use
// stays for now (Deferred) or is unix.EBUSY, after a few seconds in which
// whoever looked at it for a moment can close it.
func Remove(ctx context.Context, name string, o RemoveOptions) error {
	info, err := Stat(name)
	if err != nil {
		return fmt.Errorf("remove: %w", err)
	}
	flags := uint32(0)
	if o.Deferred {
		flags = unix.DM_DEFERRED_REMOVE
	}
	r := request{cmd: unix.DM_DEV_REMOVE, what: "remove", name: name, flags: flags, cookie: primarySource}
	for end := time.Now().Add(busyWait); ; {
		a, err := r.do()
		if err == nil {
			if a.Flags&unix.DM_DEFERRED_REMOVE != 0 && stillThere(name, info.Dev) {
				return nil
			}
			return removeNode(ctx, info)
		}
		if !errors.Is(err, unix.EBUSY) || time.Now().After(end) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func stillThere(name string, dev uint64) bool {
	info, err := Stat(name)
	return err == nil && info.Dev == dev
}

// NameAndDev is an entry of [List].
type NameAndDev struct {
	Name string
	Dev  uint64 // as stat returns it in st_rdev
}

// List lists all devices.
func List() ([]NameAndDev, error) {
	a, err := request{cmd: unix.DM_LIST_DEVICES, what: "list device-mapper devices", answer: minAnswer}.do()
	if err != nil {
		return nil, err
	}
	return parseNames(a.data)
}

// Rename gives a device another name, with its node. unix.EBUSY: it is taken.
func Rename(ctx context.Context, name, to string) error {
	if err := CheckName(to); err != nil {
		return err
	}
	old, err := Stat(name)
	if err != nil {
		return fmt.Errorf("rename: %w", err)
	}
	r := request{cmd: unix.DM_DEV_RENAME, what: "rename", name: name, cookie: primarySource, payload: append([]byte(to), 0)}
	if _, err := r.do(); err != nil {
		return err
	}
	info := old
	info.Name = to
	return errors.Join(EnsureNode(ctx, info), removeNode(ctx, old))
}
