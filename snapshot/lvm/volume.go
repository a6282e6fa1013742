// SPDX-License-Identifier: BSD-2-Clause

package lvm

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Errors on which callers decide. Test with errors.Is.
var (
	// ErrNotVolume says that a device is no logical volume.
	ErrNotVolume = errors.New("it is not a logical volume")
	// ErrMissing says that LVM's commands are not there.
	ErrMissing = errors.New("lvcreate is not there: install lvm2")
	// ErrNoRoom says that the volume group or the pool has no room for a snapshot.
	ErrNoRoom = errors.New("no room for a snapshot")
	// ErrUnsupported says that it is a volume of a kind of which none are made.
	ErrUnsupported = errors.New("snapshots of it are not supported")
)

// volume is a logical volume, as LVM describes it.
type volume struct {
	path     string // by which it was found
	uuid     string
	vg, name string
	size     int64 // in bytes
	thin     bool
	pool     string // of a thin volume
	free     int64  // of the volume group, in bytes
	extent   int64  // in bytes
}

// uuidPrefix is that of the device-mapper UUIDs of logical volumes: the volume
// group's UUID and the volume's follow, each of 32 letters, and a suffix if it is
// an inner part of one.
const (
	uuidPrefix = "LVM-"
	uuidLength = 32
)

// uuidOf is the UUID of the logical volume at a path, without its dashes; "" if
// there is none.
func uuidOf(path string) string {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return ""
	}
	b, err := os.ReadFile(fmt.Sprintf("/sys/dev/block/%d:%d/dm/uuid", unix.Major(st.Rdev), unix.Minor(st.Rdev)))
	if err != nil {
		return ""
	}
	return parseUUID(strings.TrimSpace(string(b)))
}

func parseUUID(dm string) string {
	ids, ok := strings.CutPrefix(dm, uuidPrefix)
	if !ok || len(ids) != 2*uuidLength {
		return ""
	}
	return ids[uuidLength:]
}

// IsVolume reports whether the device at a path is a logical volume.
func IsVolume(path string) bool { return uuidOf(path) != "" }

const volumeFields = "vg_name,lv_name,lv_uuid,lv_size,origin,pool_lv,segtype,vg_free,vg_extent_size"

// find asks LVM for the volume at a path.
func find(ctx context.Context, path, uuid string, lock *os.File) (*volume, error) {
	rows, err := report(ctx, lock, volumeFields, "-S", fmt.Sprintf("lv_uuid=%q", dashed(uuid)))
	if err != nil {
		return nil, err
	}
	if len(rows) == 0 {
		return nil, fmt.Errorf("LVM does not know a logical volume with the UUID %s", dashed(uuid))
	}
	return newVolume(path, uuid, rows)
}

// dashed writes a UUID as LVM does: 6-4-4-4-4-4-6.
func dashed(uuid string) string {
	if len(uuid) != uuidLength {
		return uuid
	}
	parts := []string{uuid[:6]}
	for i := 6; i < 26; i += 4 {
		parts = append(parts, uuid[i:i+4])
	}
	return strings.Join(append(parts, uuid[26:]), "-")
}

// newVolume reads what lvs says of a volume, a row for each of its segments.
func newVolume(path, uuid string, rows []row) (*volume, error) {
	r := rows[0]
	v := &volume{path: path, uuid: uuid, vg: r["vg_name"], name: r["lv_name"], pool: r["pool_lv"]}
	for field, to := range map[string]*int64{"lv_size": &v.size, "vg_free": &v.free, "vg_extent_size": &v.extent} {
		n, err := strconv.ParseInt(r[field], 10, 64)
		if err != nil || n < 0 {
			return nil, fmt.Errorf("lvs says that %s of %s is %q", field, path, r[field])
		}
		*to = n
	}
	if v.vg == "" || v.name == "" || v.extent == 0 {
		return nil, fmt.Errorf("lvs does not describe %s: %v", path, r)
	}
	for _, r := range rows {
		switch kind := r["segtype"]; {
		case kind == "thin":
			v.thin = true
		case (kind == "linear" || kind == "striped") && r["origin"] == "":
		case kind == "linear" || kind == "striped":
			return nil, fmt.Errorf("%w: %s/%s is a snapshot itself", ErrUnsupported, v.vg, v.name)
		default:
			return nil, fmt.Errorf("%w: %s/%s is of the type %s, not linear, striped or thin", ErrUnsupported, v.vg, v.name, kind)
		}
	}
	return v, nil
}

// minSpace is the least that is asked for if nobody says how much.
const minSpace = 64 << 20

// space is how many bytes a snapshot gets: what was asked for, or a tenth of the
// volume, or at least a quarter of that if the volume group has no more.
func (v *volume) space(asked int64) (int64, error) {
	want := asked
	if asked == 0 {
		want = min(max(v.size/10, minSpace), v.size+v.size/100+v.extent)
	}
	if want > math.MaxInt64-v.extent {
		want = math.MaxInt64 - v.extent
	}
	want = (want + v.extent - 1) / v.extent * v.extent
	switch {
	case want <= v.free:
		return want, nil
	case asked == 0 && v.free >= max(want/4, v.extent):
		return v.free / v.extent * v.extent, nil
	}
	return 0, fmt.Errorf("%w: the volume group %s has %d MiB free, and %d MiB are wanted: say --cow SIZE for less, extend it, or say --snapshot precopy",
		ErrNoRoom, v.vg, v.free>>20, want>>20)
}

// maxPoolPercent is how full a thin pool may be.
const maxPoolPercent = 90

// poolRoom refuses a pool that is nearly full: what is written to a volume with a
// snapshot needs room in it, and without any its writers wait or fail.
func (v *volume) poolRoom(ctx context.Context, lock *os.File) error {
	rows, err := report(ctx, lock, "data_percent,metadata_percent", v.vg+"/"+v.pool)
	if err != nil {
		return err
	}
	for _, r := range rows {
		for _, field := range []string{"data_percent", "metadata_percent"} {
			n, err := strconv.ParseFloat(r[field], 64)
			if err != nil {
				return fmt.Errorf("lvs says that %s of the pool %s/%s is %q", field, v.vg, v.pool, r[field])
			}
			if n > maxPoolPercent {
				return fmt.Errorf("%w: the thin pool %s/%s is full to %.0f %% (%s): extend it, or say --snapshot precopy", ErrNoRoom, v.vg, v.pool, n, field)
			}
		}
	}
	return nil
}
