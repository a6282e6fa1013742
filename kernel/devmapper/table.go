// SPDX-License-Identifier: BSD-2-Clause

package devmapper

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// Target is one line of a table: Length sectors of 512 bytes of the mapped
// device, from sector Start on, are served by a target of a type.
type Target struct {
	Start, Length uint64 // in sectors of 512 bytes
	Type          string // "linear", "snapshot", …
	Params        string // with Table: the parameters; with Status: what the target says
}

func (t Target) String() string {
	return fmt.Sprintf("%d %d %s %s", t.Start, t.Length, t.Type, t.Params)
}

const specSize = unix.SizeofDmTargetSpec

// LoadOptions say how a table is loaded.
type LoadOptions struct {
	ReadOnly bool
}

// Load puts a table in the inactive place, where the next [Resume] finds it;
// one that was there is thrown away. The targets' constructors run now: what
// they refuse is mostly unix.EINVAL, and the kernel log says why.
func Load(name string, o LoadOptions, targets ...Target) error {
	payload, err := encodeTable(targets)
	if err != nil {
		return fmt.Errorf("load a table for device-mapper device %s: %w", name, err)
	}
	r := request{cmd: unix.DM_TABLE_LOAD, what: "load a table for", name: name, targets: uint32(len(targets)), payload: payload}
	if o.ReadOnly {
		r.flags = unix.DM_READONLY_FLAG
	}
	_, err = r.do()
	return err
}

// encodeTable writes struct dm_target_spec with the parameters behind it, for
// each target; next counts from the start of its own one here.
func encodeTable(targets []Target) ([]byte, error) {
	var out []byte
	for _, t := range targets {
		if len(t.Type) >= unix.DM_MAX_TYPE_NAME || bytes.IndexByte([]byte(t.Type+t.Params), 0) >= 0 {
			return nil, fmt.Errorf("target %q: its type is too long, or it holds a zero byte", t)
		}
		spec := make([]byte, align8(specSize+len(t.Params)+1))
		binary.NativeEndian.PutUint64(spec[0:], t.Start)
		binary.NativeEndian.PutUint64(spec[8:], t.Length)
		binary.NativeEndian.PutUint32(spec[20:], uint32(len(spec)))
		copy(spec[24:24+unix.DM_MAX_TYPE_NAME], t.Type)
		copy(spec[specSize:], t.Params)
		out = append(out, spec...)
	}
	return out, nil
}

// Clear throws the inactive table away.
func Clear(name string) error {
	_, err := request{cmd: unix.DM_TABLE_CLEAR, what: "clear the inactive table of", name: name}.do()
	return err
}

// Query says which table is asked for, and how.
type Query struct {
	// Inactive asks for the table that was loaded and is not live yet.
	Inactive bool
	// NoFlush does not let targets write anything out for the answer.
	NoFlush bool
}

// Table is the table of a device, as it could be loaded again. It is empty if
// there is none.
func Table(name string, q Query) ([]Target, error) {
	return tableStatus(name, "read the table of", q.flags()|unix.DM_STATUS_TABLE_FLAG)
}

// Status is what the targets of a device say of themselves.
func Status(name string, q Query) ([]Target, error) {
	return tableStatus(name, "read the status of", q.flags())
}

func (q Query) flags() (f uint32) {
	if q.Inactive {
		f |= unix.DM_QUERY_INACTIVE_TABLE_FLAG
	}
	if q.NoFlush {
		f |= unix.DM_NOFLUSH_FLAG
	}
	return f
}

func tableStatus(name, what string, flags uint32) ([]Target, error) {
	r := request{cmd: unix.DM_TABLE_STATUS, what: what, name: name, flags: flags, answer: minAnswer}
	a, err := r.do()
	if err != nil {
		return nil, err
	}
	out, err := decodeTable(a.data, int(a.Target_count))
	if err != nil {
		return nil, r.wrap(err)
	}
	return out, nil
}

var errAnswer = errors.New("the kernel's answer makes no sense")

// decodeTable reads what encodeTable writes, but that next counts from the
// start of the first one here.
func decodeTable(data []byte, count int) ([]Target, error) {
	var out []Target
	for at := 0; len(out) < count; {
		if at < 0 || at+specSize > len(data) {
			return nil, errAnswer
		}
		spec := data[at:]
		next := int(binary.NativeEndian.Uint32(spec[20:]))
		out = append(out, Target{
			Start: binary.NativeEndian.Uint64(spec[0:]), Length: binary.NativeEndian.Uint64(spec[8:]),
			Type: cString(spec[24 : 24+unix.DM_MAX_TYPE_NAME]), Params: cString(spec[specSize:]),
		})
		if next <= at && len(out) < count {
			return nil, errAnswer
		}
		at = next
	}
	return out, nil
}

// Deps lists the numbers of the devices that the live table is built on, as
// stat returns them in st_rdev.
func Deps(name string) ([]uint64, error) {
	r := request{cmd: unix.DM_TABLE_DEPS, what: "read what is beneath", name: name, answer: minAnswer}
	a, err := r.do()
	if err != nil {
		return nil, err
	}
	if len(a.data) < 8 {
		return nil, nil // no table
	}
	count := int(binary.NativeEndian.Uint32(a.data))
	if count > (len(a.data)-8)/8 {
		return nil, r.wrap(errAnswer)
	}
	out := make([]uint64, count)
	for i := range out {
		out[i] = decodeDev(binary.NativeEndian.Uint64(a.data[8+8*i:]))
	}
	return out, nil
}

// Message sends text to the target that serves a sector of the live table, and
// returns its answer, "" if it gives none. The kernel splits text at spaces; a
// backslash takes the next character as it is. Answers of more than 16 KiB are
// an error, and the message has been carried out.
func Message(name string, sector uint64, text string) (string, error) {
	payload := binary.NativeEndian.AppendUint64(nil, sector)
	payload = append(append(payload, text...), 0)
	verb, _, _ := bytes.Cut([]byte(text), []byte(" "))
	r := request{cmd: unix.DM_TARGET_MSG, what: fmt.Sprintf("send message %q to", verb), name: name, payload: payload, answer: minAnswer}
	if bytes.IndexByte([]byte(text), 0) >= 0 {
		return "", r.wrap(errors.New("it holds a zero byte"))
	}
	a, err := r.do()
	if err != nil || a.Flags&unix.DM_DATA_OUT_FLAG == 0 {
		return "", err
	}
	return cString(a.data), nil
}

// TargetVersion is the version of a target type, whose module the kernel loads
// for the answer if it can. unix.EINVAL: there is no such target.
func TargetVersion(target string) (v [3]uint32, err error) {
	r := request{cmd: unix.DM_GET_TARGET_VERSION, what: "ask for the version of the target type", name: target, answer: minAnswer}
	a, err := r.do()
	if err != nil {
		return v, err
	}
	if len(a.data) < 16 {
		return v, r.wrap(errAnswer)
	}
	for i := range v {
		v[i] = binary.NativeEndian.Uint32(a.data[4+4*i:])
	}
	return v, nil
}

// parseNames reads a chain of struct dm_name_list. A list of nothing is one
// entry with the number 0.
func parseNames(data []byte) ([]NameAndDev, error) {
	var out []NameAndDev
	for at := 0; ; {
		if at < 0 || at+12 > len(data) {
			return nil, fmt.Errorf("list device-mapper devices: %w", errAnswer)
		}
		dev := binary.NativeEndian.Uint64(data[at:])
		next := int(binary.NativeEndian.Uint32(data[at+8:]))
		if dev != 0 {
			out = append(out, NameAndDev{Name: cString(data[at+12:]), Dev: decodeDev(dev)})
		}
		if next == 0 {
			return out, nil
		}
		at += next
	}
}

func align8(n int) int { return (n + 7) / 8 * 8 }
