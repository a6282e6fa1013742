// SPDX-License-Identifier: BSD-2-Clause

package devmapper

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	controlNode  = "/dev/mapper/control"
	headerSize   = unix.SizeofDmIoctl
	minAnswer    = 16 << 10
	maxAnswer    = 16 << 20
	bufferFull   = unix.DM_BUFFER_FULL_FLAG
	versionMajor = unix.DM_VERSION_MAJOR

	// primarySource marks the uevent of a change that was meant, in the upper
	// half of the cookie. Without it udev's rules for device-mapper
	// (10-dm.rules) take the event for a spurious one and may not make nodes
	// (DM_UDEV_PRIMARY_SOURCE_FLAG in libdevmapper.h).
	primarySource = 0x0040 << 16
)

// request is one ioctl: what goes into the header, and what follows it.
type request struct {
	cmd     uint
	what    string // for errors: "create", "load a table for"
	name    string
	uuid    string
	dev     uint64 // as the kernel's huge_encode_dev, only without name and uuid
	flags   uint32
	cookie  uint32
	targets uint32 // count of target specs in payload
	payload []byte
	answer  int // room for the answer to begin with, 0 if there is none
}

// answer is what the kernel returned.
type answer struct {
	unix.DmIoctl
	data []byte // behind the header, where the kernel said that it begins
}

// do carries out a request. An answer that does not fit is asked for again
// with more room: only requests that change nothing have one, but for messages,
// whose answer is then lost (see [Message]).
func (r request) do() (answer, error) {
	f, err := openControl()
	if err != nil {
		return answer{}, err
	}
	defer f.Close()
	size := max(r.answer, len(r.payload))
	for {
		a, err := r.once(f, headerSize+size)
		switch {
		case err != nil:
			return answer{}, r.wrap(err)
		case a.Flags&bufferFull == 0:
			return a, nil
		case r.cmd == unix.DM_TARGET_MSG:
			return answer{}, r.wrap(errors.New("the answer is too long"))
		case size >= maxAnswer:
			return answer{}, r.wrap(fmt.Errorf("the answer is longer than %d bytes", maxAnswer))
		}
		size = max(4*size, minAnswer)
	}
}

func (r request) once(f *os.File, size int) (answer, error) {
	// Eight-byte words, so that the structures lie as the kernel wants them.
	words := make([]uint64, (size+7)/8)
	buf := unsafe.Slice((*byte)(unsafe.Pointer(&words[0])), len(words)*8)
	h := (*unix.DmIoctl)(unsafe.Pointer(&words[0]))
	h.Version = [3]uint32{versionMajor, 0, 0}
	h.Data_size, h.Data_start = uint32(len(buf)), headerSize
	h.Target_count, h.Flags, h.Event_nr, h.Dev = r.targets, r.flags, r.cookie, r.dev
	copy(h.Name[:len(h.Name)-1], r.name)
	copy(h.Uuid[:len(h.Uuid)-1], r.uuid)
	copy(buf[headerSize:], r.payload)
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), uintptr(r.cmd), uintptr(unsafe.Pointer(&words[0])))
	runtime.KeepAlive(words)
	if errno != 0 {
		return answer{}, errno
	}
	a := answer{DmIoctl: *h}
	// An answer without data ends before the place where data would begin.
	if start, end := int(h.Data_start), int(h.Data_size); start <= end && end <= len(buf) {
		a.data = buf[start:end]
	}
	return a, nil
}

func (r request) wrap(err error) error {
	if r.name == "" && r.uuid == "" && r.dev == 0 {
		return fmt.Errorf("%s: %w", r.what, err)
	}
	subject := r.name
	switch {
	case subject != "":
	case r.uuid != "":
		subject = "with the uuid " + r.uuid
	default:
		subject = fmt.Sprintf("%d:%d", unix.Major(decodeDev(r.dev)), unix.Minor(decodeDev(r.dev)))
	}
	return fmt.Errorf("%s device-mapper device %s: %w", r.what, subject, err)
}

var makeControl sync.Mutex

// openControl opens the control node, which loads the kernel's device-mapper
// where the node is there beforehand. Without udev and devtmpfs it may not be.
func openControl() (*os.File, error) {
	f, err := os.OpenFile(controlNode, os.O_RDWR|unix.O_CLOEXEC, 0)
	if err == nil {
		return f, nil
	}
	if !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("open the control of device-mapper: %w", err)
	}
	makeControl.Lock()
	defer makeControl.Unlock()
	b, readErr := os.ReadFile("/sys/class/misc/device-mapper/dev")
	if readErr != nil {
		return nil, fmt.Errorf("open the control of device-mapper: %w: the kernel has no device-mapper, or it is not loaded (modprobe dm-mod)", err)
	}
	var major, minor uint32
	if _, err := fmt.Sscanf(string(b), "%d:%d", &major, &minor); err != nil {
		return nil, fmt.Errorf("parse the number of device-mapper's control %q: %w", bytes.TrimSpace(b), err)
	}
	if err := makeNode(controlNode, 0o600|unix.S_IFCHR, unix.Mkdev(major, minor)); err != nil {
		return nil, err
	}
	if f, err = os.OpenFile(controlNode, os.O_RDWR|unix.O_CLOEXEC, 0); err != nil {
		return nil, fmt.Errorf("open the control of device-mapper: %w", err)
	}
	return f, nil
}

// encodeDev and decodeDev translate device numbers as stat returns them to and
// from the kernel's huge_encode_dev.
func encodeDev(dev uint64) uint64 {
	major, minor := uint64(unix.Major(dev)), uint64(unix.Minor(dev))
	return minor&0xff | major<<8 | minor&^0xff<<12
}

func decodeDev(dev uint64) uint64 {
	major, minor := dev>>8&0xfff, dev&0xff|dev>>12&0xfff00
	return unix.Mkdev(uint32(major), uint32(minor))
}

func cString(b []byte) string {
	s, _, _ := bytes.Cut(b, []byte{0})
	return string(s)
}
