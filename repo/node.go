// SPDX-License-Identifier: BSD-2-Clause

package repo

import (
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"time"
	"unicode/utf8"
)

// NodeType is what an entry of a directory is.
type NodeType string

// The types of nodes that we write. restic writes others, which survive being
// decoded and encoded.
const (
	NodeFile NodeType = "file"
	NodeDir  NodeType = "dir"
)

// Attribute is an extended attribute of a node.
type Attribute struct {
	Name  string `json:"name"`
	Value []byte `json:"value"`
}

// Node is an entry of a directory. The order of the fields is restic's, since
// a tree's ID is the hash of its JSON.
type Node struct {
	Name               string                     `json:"name"`
	Type               NodeType                   `json:"type"`
	Mode               os.FileMode                `json:"mode,omitempty"`
	ModTime            time.Time                  `json:"mtime"`
	AccessTime         time.Time                  `json:"atime"`
	ChangeTime         time.Time                  `json:"ctime"`
	UID                uint32                     `json:"uid"`
	GID                uint32                     `json:"gid"`
	User               string                     `json:"user,omitempty"`
	Group              string                     `json:"group,omitempty"`
	Inode              uint64                     `json:"inode,omitempty"`
	DeviceID           uint64                     `json:"device_id,omitempty"` // stat.st_dev, for hard links
	Size               uint64                     `json:"size,omitempty"`      // in bytes: the sum of the blobs' plaintexts
	Links              uint64                     `json:"links,omitempty"`
	LinkTarget         string                     `json:"linktarget,omitempty"`
	LinkTargetRaw      []byte                     `json:"linktarget_raw,omitempty"` // only inside the JSON, where LinkTarget is not UTF-8
	ExtendedAttributes []Attribute                `json:"extended_attributes,omitempty"`
	GenericAttributes  map[string]json.RawMessage `json:"generic_attributes,omitempty"`
	Device             uint64                     `json:"device,omitempty"` // stat.st_rdev of a device node
	Content            []ID                       `json:"content"`          // the file's data blobs; nil unless it is a file
	Subtree            *ID                        `json:"subtree,omitempty"`
	Error              string                     `json:"error,omitempty"`
}

// MarshalJSON writes the node as restic writes it: the name quoted as in Go
// source, since JSON cannot hold every file name, and times brought into the
// years that JSON can hold.
func (n Node) MarshalJSON() ([]byte, error) {
	type plain Node // without this method
	p := plain(n)
	quoted := strconv.Quote(n.Name)
	p.Name = quoted[1 : len(quoted)-1]
	p.ModTime, p.AccessTime, p.ChangeTime = jsonTime(n.ModTime), jsonTime(n.AccessTime), jsonTime(n.ChangeTime)
	p.LinkTargetRaw = nil
	if !utf8.ValidString(n.LinkTarget) {
		p.LinkTargetRaw = []byte(n.LinkTarget)
	}
	return json.Marshal(p)
}

// UnmarshalJSON reads a node as restic writes it.
func (n *Node) UnmarshalJSON(data []byte) error {
	type plain Node // without this method
	var p plain
	if err := json.Unmarshal(data, &p); err != nil {
		return fmt.Errorf("decode node: %w", err)
	}
	name, err := strconv.Unquote(`"` + p.Name + `"`)
	if err != nil {
		return fmt.Errorf("decode node %.80q: its name is not quoted as it should be: %w", p.Name, err)
	}
	p.Name = name
	if p.LinkTargetRaw != nil {
		p.LinkTarget, p.LinkTargetRaw = string(p.LinkTargetRaw), nil
	}
	*n = Node(p)
	return nil
}

// jsonTime moves a time to year 0 or 9999 if it lies outside of them.
func jsonTime(t time.Time) time.Time {
	if y := t.Year(); y < 0 {
		return t.AddDate(-y, 0, 0)
	} else if y > 9999 {
		return t.AddDate(9999-y, 0, 0)
	}
	return t
}
