// SPDX-License-Identifier: BSD-2-Clause

package retention

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
)

// GroupBy says which snapshots a policy is applied to together.
type GroupBy struct{ Host, Paths, Tags bool }

// Set reads "host,paths,tags", or some of them, or nothing.
func (g *GroupBy) Set(s string) error {
	var n GroupBy
	for _, part := range strings.Split(s, ",") {
		switch part {
		case "host", "hosts":
			n.Host = true
		case "path", "paths":
			n.Paths = true
		case "tag", "tags":
			n.Tags = true
		case "":
		default:
			return fmt.Errorf("%q is none of host, paths, tags", part)
		}
	}
	*g = n
	return nil
}

func (g *GroupBy) String() string {
	var parts []string
	if g.Host {
		parts = append(parts, "host")
	}
	if g.Paths {
		parts = append(parts, "paths")
	}
	if g.Tags {
		parts = append(parts, "tags")
	}
	return strings.Join(parts, ",")
}

// Type is what help calls it.
func (g *GroupBy) Type() string { return "group" }

// Group is snapshots that belong together, and what becomes of them. Its JSON is
// that of restic's forget: what a group is not made by is null or empty.
type Group struct {
	Tags    []string   `json:"tags"`
	Host    string     `json:"host"`
	Paths   []string   `json:"paths"`
	Keep    []Snapshot `json:"keep"`
	Remove  []Snapshot `json:"remove"`
	Reasons []Reason   `json:"reasons"`

	Snapshots []Snapshot `json:"-"` // all of them
}

// Split makes groups of snapshots, in an order that depends on nothing else.
// Paths, and tags if they make groups, are put in order, also in the snapshots.
func (g GroupBy) Split(list []Snapshot) []*Group {
	groups := map[string]*Group{}
	var keys []string
	for _, s := range list {
		sn := *s.Snapshot
		s.Snapshot = &sn
		sn.Paths = slices.Sorted(slices.Values(sn.Paths))
		var n Group
		if g.Tags && sn.Tags != nil {
			sn.Tags = slices.Sorted(slices.Values(sn.Tags))
			n.Tags = sn.Tags
		}
		if g.Host {
			n.Host = sn.Hostname
		}
		if g.Paths {
			n.Paths = sn.Paths
		}
		raw, _ := json.Marshal([]any{n.Host, n.Paths, n.Tags}) // strings cannot fail
		key := string(raw)
		if groups[key] == nil {
			groups[key] = &n
			keys = append(keys, key)
		}
		groups[key].Snapshots = append(groups[key].Snapshots, s)
	}
	slices.Sort(keys)
	out := make([]*Group, len(keys))
	for i, k := range keys {
		out[i] = groups[k]
	}
	return out
}

// Name says in words what a group is.
func (g *Group) Name() string {
	var parts []string
	if g.Host != "" {
		parts = append(parts, "host "+g.Host)
	}
	if len(g.Paths) > 0 {
		parts = append(parts, "paths "+strings.Join(g.Paths, ", "))
	}
	if len(g.Tags) > 0 {
		parts = append(parts, "tags "+strings.Join(g.Tags, ", "))
	}
	if len(parts) == 0 {
		return "all snapshots"
	}
	return strings.Join(parts, "; ")
}
