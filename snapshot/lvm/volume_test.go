// SPDX-License-Identifier: BSD-2-Clause

package lvm

import (
	"errors"
	"strings"
	"testing"
)

// What lvs 2.03.16 says of a volume with two segments.
const twoSegments = `
  {
      "report": [
          {
              "seg": [
                  {"vg_name":"vg-a", "lv_name":"lv", "lv_uuid":"FGGwYl-9cCa-sAv5-sdeZ-8bN0-Xrua-9mLJmt", "lv_size":"134217728", "origin":"", "pool_lv":"", "segtype":"linear", "vg_free":"46137344", "vg_extent_size":"4194304"},
                  {"vg_name":"vg-a", "lv_name":"lv", "lv_uuid":"FGGwYl-9cCa-sAv5-sdeZ-8bN0-Xrua-9mLJmt", "lv_size":"134217728", "origin":"", "pool_lv":"", "segtype":"striped", "vg_free":"46137344", "vg_extent_size":"4194304"}
              ]
          }
      ]
  }
`

func sample(t *testing.T, change ...string) (*volume, error) {
	t.Helper()
	rows, err := parseReport([]byte(strings.NewReplacer(change...).Replace(twoSegments)))
	if err != nil || len(rows) != 2 {
		t.Fatal(rows, err)
	}
	return newVolume("/dev/vg-a/lv", "FGGwYl9cCasAv5sdeZ8bN0Xrua9mLJmt", rows)
}

func TestVolumesAreRead(t *testing.T) {
	v, err := sample(t)
	if err != nil || v.vg != "vg-a" || v.name != "lv" || v.size != 128<<20 || v.free != 44<<20 || v.extent != 4<<20 || v.thin {
		t.Errorf("%+v %v", v, err)
	}
	if v, err := sample(t, `"linear"`, `"thin"`, `"striped"`, `"thin"`, `"pool_lv":""`, `"pool_lv":"p"`); err != nil || !v.thin || v.pool != "p" {
		t.Errorf("thin: %+v %v", v, err)
	}
	for _, change := range [][]string{{`"striped"`, `"raid1"`}, {`"linear"`, `"cache"`}, {`"origin":""`, `"origin":"other"`}} {
		if _, err := sample(t, change...); !errors.Is(err, ErrUnsupported) {
			t.Errorf("%v: %v", change, err)
		}
	}
	for _, change := range [][]string{{`"46137344"`, `"44m"`}, {`"4194304"`, `"0"`}, {`"vg-a"`, `""`}, {`"134217728"`, `"-1"`}} {
		if _, err := sample(t, change...); err == nil || errors.Is(err, ErrUnsupported) {
			t.Errorf("%v: %v", change, err)
		}
	}
}

func TestUUIDs(t *testing.T) {
	const vg, lv = "0123456789abcdefABCDEF0123456789", "FGGwYl9cCasAv5sdeZ8bN0Xrua9mLJmt"
	for dm, want := range map[string]string{
		"LVM-" + vg + lv: lv, "LVM-" + vg + lv + "-real": "", "LVM-" + vg: "", "DSYNC-" + vg + lv: "", "": "",
	} {
		if got := parseUUID(dm); got != want {
			t.Errorf("%q: %q", dm, got)
		}
	}
	if got := dashed(lv); got != "FGGwYl-9cCa-sAv5-sdeZ-8bN0-Xrua-9mLJmt" {
		t.Error(got)
	}
	if got := mapperName("a-b", "c-d"); got != "a--b-c--d" {
		t.Error(got)
	}
}

func TestSpaceOfASnapshot(t *testing.T) {
	const mib = 1 << 20
	for _, c := range []struct{ size, free, asked, want int64 }{
		{10000 * mib, 5000 * mib, 0, 1000 * mib},
		{10000 * mib, 999 * mib, 0, 996 * mib}, // what is free, in extents
		{10000 * mib, 249 * mib, 0, -1},
		{128 * mib, 500 * mib, 0, 64 * mib},
		{8 * mib, 500 * mib, 0, 16 * mib}, // never much more than the volume
		{128 * mib, 100 * mib, 5 * mib, 8 * mib},
		{128 * mib, 7 * mib, 5 * mib, -1},
		{128 * mib, 0, 0, -1},
		{128 * mib, 100 * mib, 1<<63 - 1, -1},
	} {
		v := &volume{vg: "vg", size: c.size, free: c.free, extent: 4 * mib}
		got, err := v.space(c.asked)
		if c.want < 0 {
			if !errors.Is(err, ErrNoRoom) {
				t.Errorf("%+v: %d, %v", c, got, err)
			}
		} else if err != nil || got != c.want {
			t.Errorf("%+v: %d MiB, %v", c, got/mib, err)
		}
	}
}

func TestWhatLVMSaysIsOneLine(t *testing.T) {
	said := "  WARNING: Sum of all thin volume sizes exceeds\n  Volume group \"vg\" has insufficient free space (0 extents): 1 required.\n\n"
	if got := oneLine([]byte(said)); got != `Volume group "vg" has insufficient free space (0 extents): 1 required.` {
		t.Error(got)
	}
}

// A device that is none of LVM's is told apart without LVM.
func TestNotAVolume(t *testing.T) {
	for _, path := range []string{"/dev/null", t.TempDir(), "/nowhere"} {
		if IsVolume(path) {
			t.Error(path)
		}
		if _, err := New(t.Context(), path, Options{}); !errors.Is(err, ErrNotVolume) {
			t.Errorf("%s: %v", path, err)
		}
	}
}
