// SPDX-License-Identifier: BSD-2-Clause

package main

import (
	"context"
	"strconv"
	"strings"

	"github.com/dsync-backup/dsync-backup/kernel/fingerprint"
	"github.com/dsync-backup/dsync-backup/kernel/resume"
	"github.com/dsync-backup/dsync-backup/snapshot/device"
)

// deviceOpener implements resume.Devices.
type deviceOpener struct{}

// Open implements resume.Devices.
func (deviceOpener) Open(path string, exclusive bool) (resume.Device, error) {
	d, err := device.Open(path, device.Options{Exclusive: exclusive})
	if err != nil {
		return nil, err
	}
	return d, nil
}

// Identify implements resume.Devices. What is drawn anew at each boot, or by us
// for a mapped device, is left out.
func (deviceOpener) Identify(ctx context.Context, path string) (fingerprint.Identity, error) {
	d, err := device.Open(path, device.Options{})
	if err != nil {
		return nil, err
	}
	defer d.Close()
	id, err := d.Identity(ctx)
	if err != nil {
		return nil, err
	}
	out := fingerprint.Identity{
		"partition UUID": id.PartUUID, "partition table UUID": id.PTUUID,
		"serial number": id.Serial, "WWID": id.WWID, "file": id.LoopFile,
	}
	// Device-mapper devices that LVM or cryptsetup made keep theirs.
	if strings.HasPrefix(id.DMUUID, "LVM-") || strings.HasPrefix(id.DMUUID, "CRYPT-") {
		out["device-mapper UUID"] = id.DMUUID
	}
	if id.PartitionStart > 0 {
		out["first sector"] = strconv.FormatInt(id.PartitionStart, 10)
	}
	return out, nil
}
