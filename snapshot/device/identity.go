// SPDX-License-Identifier: BSD-2-Clause

package device

import (
	"bufio"
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Identity is what tells a device from another one that took its name. Fields
// that the device does not have are empty.
type Identity struct {
	Kind           Kind   `json:"kind"`
	DMUUID         string `json:"dm_uuid,omitempty"`
	DMName         string `json:"dm_name,omitempty"`
	PartUUID       string `json:"partuuid,omitempty"`        // of the partition
	PTUUID         string `json:"ptuuid,omitempty"`          // of the table on the disk, or that the partition is in
	PartitionStart int64  `json:"partition_start,omitempty"` // in sectors of 512 bytes
	Serial         string `json:"serial,omitempty"`          // of the disk
	WWID           string `json:"wwid,omitempty"`            // of the disk
	Model          string `json:"model,omitempty"`           // of the disk
	FSType         string `json:"fs_type,omitempty"`         // as libblkid names it
	FSUUID         string `json:"fs_uuid,omitempty"`
	DiskSeq        uint64 `json:"diskseq,omitempty"`   // counts what was ever bound to a disk since boot; Linux 5.15
	LoopFile       string `json:"loop_file,omitempty"` // as the kernel shows its path
}

// Identity collects the identity from sysfs, from udev's database where there
// is one, and from the device's own first bytes. What cannot be found out is
// left empty; only a device that cannot be read is an error.
func (d *Device) Identity(ctx context.Context) (Identity, error) {
	id := Identity{Kind: d.kind}
	head, err := d.head(ctx)
	if err != nil {
		return id, fmt.Errorf("identify %s: %w", d.path, err)
	}
	if sig, ok := probe(head); ok {
		id.FSType, id.FSUUID = sig.Type, sig.UUID
	}
	if table, ok := parseTable(head, d.sector); ok {
		id.PTUUID = table.uuid
	}
	if d.kind == Block {
		err = host().identify(ctx, d.num, &id)
	}
	if err != nil {
		return id, fmt.Errorf("identify %s: %w", d.path, err)
	}
	return id, nil
}

func (s system) identify(ctx context.Context, num Number, id *Identity) error {
	dir, err := s.dir(num)
	if err != nil {
		return err
	}
	id.DMUUID, id.DMName = attr(dir, "dm/uuid"), attr(dir, "dm/name")
	disk := dir
	if isPartition(dir) {
		disk = filepath.Dir(dir)
		s.identifyPartition(ctx, dir, num, id)
	}
	udev := s.udev(disk)
	id.Model = first(attr(disk, "device/model"), udev["ID_MODEL"])
	id.Serial = first(attr(disk, "serial"), attr(disk, "device/serial"), page80(disk), udev["ID_SERIAL_SHORT"])
	id.WWID = first(attr(disk, "wwid"), attr(disk, "device/wwid"), udev["ID_WWN_WITH_EXTENSION"])
	id.LoopFile = attr(disk, "loop/backing_file")
	// No diskseq (before Linux 5.15) is 0, the zero value.
	id.DiskSeq, _ = strconv.ParseUint(attr(disk, "diskseq"), 10, 64)
	return nil
}

// identifyPartition asks the kernel, then udev, then the table on the disk.
func (s system) identifyPartition(ctx context.Context, dir string, num Number, id *Identity) {
	id.PartitionStart, _ = strconv.ParseInt(attr(dir, "start"), 10, 64)
	udev := s.udev(dir)
	id.PartUUID = first(s.uevent(dir)["PARTUUID"], udev["ID_PART_ENTRY_UUID"])
	id.PTUUID = udev["ID_PART_TABLE_UUID"]
	if id.PartUUID != "" && id.PTUUID != "" {
		return
	}
	// An unreadable disk leaves the two empty: the partition itself was read.
	disk, err := Open(filepath.Join(s.dev, deviceName(filepath.Dir(dir))), Options{})
	if err != nil {
		return
	}
	defer disk.Close()
	head, err := disk.head(ctx)
	if err != nil {
		return
	}
	table, ok := parseTable(head, disk.sector)
	if !ok {
		return
	}
	number, _ := strconv.Atoi(attr(dir, "partition"))
	id.PTUUID = first(id.PTUUID, table.uuid)
	id.PartUUID = first(id.PartUUID, table.partition(number))
}

func first(values ...string) string {
	for _, v := range values {
		if v != "" {
			return v
		}
	}
	return ""
}

// page80 is the serial number in a SCSI disk's vital product data page 0x80:
// four bytes of header, the last two the length (SPC-4, 7.8.14).
func page80(disk string) string {
	b, err := os.ReadFile(filepath.Join(disk, "device/vpd_pg80"))
	if err != nil || len(b) < 4 {
		return ""
	}
	n := int(binary.BigEndian.Uint16(b[2:]))
	return strings.Trim(string(b[4:min(len(b), 4+n)]), " \x00")
}

func (s system) uevent(dir string) map[string]string {
	return readPairs(filepath.Join(dir, "uevent"), "")
}

func (s system) udev(dir string) map[string]string {
	return readPairs(filepath.Join(s.run, "udev/data/b"+attr(dir, "dev")), "E:")
}

// readPairs reads the KEY=value lines that start with prefix; no file, no pairs.
func readPairs(path, prefix string) map[string]string {
	f, err := os.Open(path)
	if err != nil {
		return nil
	}
	defer f.Close()
	out := make(map[string]string)
	for sc := bufio.NewScanner(f); sc.Scan(); {
		if line, ok := strings.CutPrefix(sc.Text(), prefix); ok {
			k, v, _ := strings.Cut(line, "=")
			out[k] = v
		}
	}
	return out
}
