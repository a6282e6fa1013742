// SPDX-License-Identifier: BSD-2-Clause

package repo

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Tree is a directory.
type Tree struct {
	Nodes []*Node `json:"nodes"`
}

// Find is the node of that name, or nil.
func (t *Tree) Find(name string) *Node {
	// Trees are sorted, but those of very old programs need not be.
	for _, n := range t.Nodes {
		if n.Name == name {
			return n
		}
	}
	return nil
}

// Encode is the tree's JSON, byte for byte as restic would write it. The nodes
// are sorted by name. A tree that restic would not write is an error: a name
// that is empty, no single path component or there twice, a directory without a
// subtree or with content, a file with a subtree.
func (t *Tree) Encode() ([]byte, error) {
	nodes := make([]*Node, len(t.Nodes))
	for i, n := range t.Nodes {
		if err := n.check(); err != nil {
			return nil, fmt.Errorf("encode tree: node %q: %w", n.Name, err)
		}
		nodes[i] = n
		if n.Type == NodeFile && n.Content == nil {
			file := *n // an empty file's content is [], never null
			file.Content = []ID{}
			nodes[i] = &file
		}
	}
	slices.SortFunc(nodes, func(a, b *Node) int { return cmp.Compare(a.Name, b.Name) })
	for i := 1; i < len(nodes); i++ {
		if nodes[i].Name == nodes[i-1].Name {
			return nil, fmt.Errorf("encode tree: node %q is there twice", nodes[i].Name)
		}
	}
	data, err := json.Marshal(Tree{nodes})
	if err != nil {
		return nil, fmt.Errorf("encode tree: %w", err)
	}
	return append(data, '\n'), nil
}

func (n *Node) check() error {
	switch {
	case n.Name == "" || n.Name == "." || n.Name == ".." || strings.ContainsAny(n.Name, "/\x00"):
		return errors.New("not a name of a file")
	case n.Type == NodeDir && n.Subtree == nil:
		return errors.New("a directory without a subtree")
	case n.Type != NodeDir && n.Subtree != nil:
		return errors.New("a subtree below what is not a directory")
	case n.Type != NodeFile && n.Content != nil:
		return errors.New("content in what is not a file")
	}
	return nil
}

// DecodeTree reads a tree's JSON.
func DecodeTree(data []byte) (*Tree, error) {
	var t Tree
	if err := json.Unmarshal(data, &t); err != nil {
		return nil, fmt.Errorf("decode tree: %w", err)
	}
	if slices.Contains(t.Nodes, nil) {
		return nil, errors.New("decode tree: a node is null")
	}
	return &t, nil
}

// SaveTree encodes and saves a tree. Every blob and subtree that it names must
// be in the repository or saved by this writer, and a file's size must be the
// sum of its blobs': a tree that restic's check would complain about is an
// error.
func (w *Writer) SaveTree(ctx context.Context, t *Tree) (Saved, error) {
	data, err := t.Encode()
	if err != nil {
		return Saved{}, err
	}
	for _, n := range t.Nodes {
		if err := w.checkNode(n); err != nil {
			return Saved{}, fmt.Errorf("save tree: node %q: %w", n.Name, err)
		}
	}
	return w.SaveBlob(ctx, KindTree, data)
}

func (w *Writer) checkNode(n *Node) error {
	if n.Subtree != nil {
		if h := (BlobHandle{Type: TreeBlob, ID: *n.Subtree}); !w.has(h) {
			return fmt.Errorf("%s: %w", h, ErrBlobNotFound)
		}
	}
	if n.Type != NodeFile {
		return nil
	}
	var sum uint64
	for _, id := range n.Content {
		h := BlobHandle{Type: DataBlob, ID: id}
		size, ok := w.BlobSize(h)
		if !ok {
			return fmt.Errorf("%s: %w", h, ErrBlobNotFound)
		}
		sum += uint64(size)
	}
	if sum != n.Size {
		return fmt.Errorf("its size is %d bytes, but its blobs have %d", n.Size, sum)
	}
	return nil
}

func (w *Writer) has(h BlobHandle) bool {
	_, ok := w.BlobSize(h)
	return ok
}

// LoadTree loads a directory, through the cache.
func (r *Repository) LoadTree(ctx context.Context, id ID) (*Tree, error) {
	data, err := r.LoadBlob(ctx, BlobHandle{Type: TreeBlob, ID: id}, KindTree)
	if err != nil {
		return nil, err
	}
	t, err := DecodeTree(data)
	if err != nil {
		return nil, fmt.Errorf("load tree %s: %w: %w", id.Str(), ErrDamaged, err)
	}
	return t, nil
}
