// SPDX-License-Identifier: BSD-2-Clause

package retention

import (
	"slices"
	"testing"
	"time"

	"github.com/dsync-backup/dsync-backup/repo"
)

// That whole policies do what restic's do is proven by systemtest, against
// restic itself.

func TestDurationsAsResticWritesThem(t *testing.T) {
	for s, want := range map[string]Duration{"": {}, "1y5m7d2h": {1, 5, 7, 2}, "36h": {Hours: 36}, " 2d ": {Days: 2}, "2d3d": {Days: 3}} {
		if d, err := ParseDuration(s); err != nil || d != want {
			t.Errorf("%q: %v, %v", s, d, err)
		}
	}
	for _, s := range []string{"5", "d", "3w", "-1d", "1.5h", "99999999999999999999h", "1d 2h"} {
		if d, err := ParseDuration(s); err == nil {
			t.Errorf("%q is accepted: %v", s, d)
		}
	}
	if s := (Duration{1, 0, 7, 2}).String(); s != "1y7d2h" {
		t.Error(s)
	}
}

func TestAnEmptyPolicyIsKnownAsThat(t *testing.T) {
	if !(&Policy{}).Empty() {
		t.Error("no rule at all")
	}
	for _, p := range []Policy{{Last: 1}, {Yearly: Unlimited}, {Within: Duration{Hours: 1}}, {WithinYearly: Duration{Days: 1}}, {Tags: []TagList{{""}}}} {
		if p.Empty() {
			t.Errorf("%+v", p)
		}
	}
}

// TestTheSameInstantIsDecidedByTheID: the order in which a store lists
// snapshots must not decide which of them stays.
func TestTheSameInstantIsDecidedByTheID(t *testing.T) {
	now := time.Now()
	var list []Snapshot
	for i := range 5 {
		list = append(list, New(repo.ID{byte(i)}, &repo.Snapshot{Time: now.Add(-time.Hour)}))
	}
	for range 5 {
		list = append(list[1:], list[0])
		before := slices.Clone(list)
		keep, remove, reasons := (&Policy{Last: 2}).Apply(list, now)
		if len(keep) != 2 || len(remove) != 3 || keep[0].ID != (repo.ID{0}) || keep[1].ID != (repo.ID{1}) || len(reasons) != 2 {
			t.Fatalf("keep %v, remove %v", keep, remove)
		}
		if !slices.Equal(list, before) {
			t.Fatal("the list was changed")
		}
	}
}
