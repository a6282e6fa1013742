// SPDX-License-Identifier: BSD-2-Clause

package restore

import (
	"bytes"
	"context"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/snapshot/check"
	"github.com/dsync-backup/dsync-backup/snapshot/layer"
)

// flipIn changes a byte of a blob in each pack that has it.
func (f *fixture) flipIn(h repo.BlobHandle) {
	f.Helper()
	for _, l := range f.repo.Locations(h) {
		name := l.Pack.String()
		path := filepath.Join(f.dir, "data", name[:2], name)
		f.must(os.Chmod(path, 0o600))
		b, err := os.ReadFile(path)
		f.must(err)
		b[int(l.Offset)+f.rnd.IntN(int(l.Length))] ^= 1
		f.must(os.WriteFile(path, b, 0o600))
	}
}

// unlist takes a blob out of the index, as `repair index` does with what is lost.
func (f *fixture) unlist(h repo.BlobHandle) {
	f.Helper()
	packs := map[repo.ID]bool{}
	for _, l := range f.repo.Locations(h) {
		packs[l.Pack] = true
	}
	var without []repo.IndexPack
	files, err := f.repo.ListFiles(f.Context(), backend.IndexFile)
	f.must(err)
	for id := range files {
		list, err := f.repo.LoadIndexFile(f.Context(), id)
		f.must(err)
		for _, p := range list {
			if packs[p.ID] {
				p.Blobs = slices.DeleteFunc(p.Blobs, func(b repo.BlobLocation) bool { return b.Handle == h })
				without = append(without, p)
			}
		}
	}
	_, err = f.repo.RewriteIndex(f.Context(), repo.IndexRewrite{
		Drop: func(id repo.ID) bool { return packs[id] },
		Add: func(_ context.Context, add func(repo.IndexPack) error) error {
			for _, p := range without {
				if err := add(p); err != nil {
					return err
				}
			}
			return nil
		},
	})
	f.must(err)
	f.must(f.repo.LoadIndex(f.Context()))
}

// Of a device of which metadata are lost, all can be had but the ranges that these describe,
// check and restore name the same ones, and without Salvage nothing is touched.
func TestLostMetadataTakeOnlyTheirOwnRanges(t *testing.T) {
	tree := func(id *repo.ID) repo.BlobHandle { return repo.BlobHandle{Type: repo.TreeBlob, ID: *id} }
	content := func(d *damaged, layer, part int, name string) repo.BlobHandle {
		_, files := d.part(layer, part)
		return dataBlob(files.Find(name).Content[0])
	}
	for name, pick := range map[string]func(*damaged) (repo.BlobHandle, []kernel.Extent){
		"newer layer": func(d *damaged) (repo.BlobHandle, []kernel.Extent) {
			return tree(d.layers[1].Subtree), []kernel.Extent{{Length: int64(len(d.image))}}
		},
		"older layer": func(d *damaged) (repo.BlobHandle, []kernel.Extent) {
			return tree(d.layers[0].Subtree), d.older(0, int64(len(d.image)))
		},
		"part of the newer layer": func(d *damaged) (repo.BlobHandle, []kernel.Extent) {
			node, _ := d.part(1, 0)
			return tree(node.Subtree), []kernel.Extent{{Length: int64(len(d.image))}}
		},
		"first part": func(d *damaged) (repo.BlobHandle, []kernel.Extent) {
			node, _ := d.part(0, 0)
			return tree(node.Subtree), d.older(0, d.starts(0)[1])
		},
		"block index in the middle": func(d *damaged) (repo.BlobHandle, []kernel.Extent) {
			i := len(d.starts(0)) / 2
			return content(d, 0, i, "index"), d.older(d.starts(0)[i], append(d.starts(0), int64(len(d.image)))[i+1])
		},
		"last block index": func(d *damaged) (repo.BlobHandle, []kernel.Extent) {
			i := len(d.starts(0)) - 1
			return content(d, 0, i, "index"), d.older(d.starts(0)[i], int64(len(d.image)))
		},
		"sums": func(d *damaged) (repo.BlobHandle, []kernel.Extent) { return content(d, 1, 0, "sums"), nil },
	} {
		ways := map[string]func(*fixture, repo.BlobHandle){"flipped": (*fixture).flipIn, "in no index": (*fixture).unlist}
		for how, lose := range ways { // in no order: any one will do
			if !soak() {
				maps.DeleteFunc(ways, func(other string, _ func(*fixture, repo.BlobHandle)) bool { return other != how && name != "sums" })
			}
			t.Run(name+" "+how, func(t *testing.T) {
				d := newDamaged(t)
				d.cutFirst()
				blob, lost := pick(d)
				lose(d.fixture, blob)
				d.mustGive(lost)
				if name != "sums" {
					return
				}
				_, err := Restore(t.Context(), d.store, Options{Device: d.device, Target: d.newFile(), Verify: true})
				if !errors.Is(err, layer.ErrDamaged) && !errors.Is(err, repo.ErrDamaged) {
					t.Errorf("verified without sums: %v", err)
				}
			})
		}
	}
	t.Run("data in no index", func(t *testing.T) {
		d := newDamaged(t)
		d.unlist(dataBlob(d.blob))
		d.mustGive(d.ranges)
	})
}

// cutFirst cuts the older layer into parts, and makes a snapshot of that.
func (d *damaged) cutFirst() {
	d.Helper()
	cut := d.resplit(*d.layers[0].Subtree, 8)
	d.layers[0] = layer.DirNode(d.layers[0].Name, cut, d.layers[0].ModTime)
	d.device = d.name(d.layers)
	if len(d.starts(0)) < 4 {
		d.Fatalf("the layer was cut at %v", d.starts(0))
	}
}

// part is a part of a layer, and its files.
func (d *damaged) part(layer, i int) (*repo.Node, *repo.Tree) {
	d.Helper()
	l, err := d.repo.LoadTree(d.Context(), *d.layers[layer].Subtree)
	d.must(err)
	files, err := d.repo.LoadTree(d.Context(), *l.Nodes[i].Subtree)
	d.must(err)
	return l.Nodes[i], files
}

// starts is where a layer's parts begin.
func (d *damaged) starts(layer int) (out []int64) {
	d.Helper()
	l, err := d.repo.LoadTree(d.Context(), *d.layers[layer].Subtree)
	d.must(err)
	for _, n := range l.Nodes {
		at, err := strconv.ParseInt(n.Name, 16, 64)
		d.must(err)
		out = append(out, at)
	}
	return out
}

// older is what the newer layer, which has the bytes from 3 to 5 MiB, leaves of a range.
func (d *damaged) older(from, to int64) (out []kernel.Extent) {
	for _, e := range []kernel.Extent{{Offset: from, Length: min(to, 3<<20) - from}, {Offset: max(from, 5<<20), Length: to - max(from, 5<<20)}} {
		if e.Length > 0 {
			out = append(out, e)
		}
	}
	return out
}

// mustGive makes sure that everything can be had but the given ranges, in each way there is.
func (d *damaged) mustGive(lost []kernel.Extent) {
	d.Helper()
	if len(lost) > 0 {
		d.mustName(d.refused(d.device), lost)
	}
	_, sn, err := d.repo.FindSnapshot(d.Context(), d.device.Snapshot.String(), repo.SnapshotFilter{})
	d.must(err)
	var found check.Finding
	_, err = check.Devices(d.Context(), d.store, check.Options{
		Snapshots: map[repo.ID]*repo.Snapshot{d.device.Snapshot: sn},
		Touched:   map[repo.ID]error{d.device.Snapshot: errors.New("harmed")},
		Blob: func(h repo.BlobHandle) error {
			_, err := d.repo.LoadBlob(d.Context(), h, repo.KindData)
			return err
		},
		Report: func(f check.Finding) { found = f },
	})
	d.must(err)
	if len(found.Causes) == 0 || !slices.Equal(found.Ranges, append([]kernel.Extent{}, lost...)) {
		d.Errorf("check finds %v, lost are %v", found, lost)
	}
	told := func(err error) {
		d.Helper()
		if len(lost) > 0 {
			d.mustName(err, lost)
		} else {
			d.must(err)
		}
	}
	for _, how := range []Changes{ChangesAll, ChangesCompare} {
		loop := d.loop(9 << 20)
		want := append(slices.Clone(d.image), d.content(loop)[len(d.image):]...)
		for _, e := range lost {
			copy(want[e.Offset:e.End()], d.content(loop)[e.Offset:e.End()])
		}
		_, err := Restore(d.Context(), d.store, Options{Device: d.device, Target: loop, Changes: how, Force: true, Salvage: true})
		told(err)
		d.same(string(how), d.content(loop), want)
	}
	want := slices.Clone(d.image)
	var out bytes.Buffer
	_, err = Dump(d.Context(), d.store, &out, DumpOptions{Device: d.device, Salvage: true})
	told(err)
	for _, e := range lost { // zeros, or what a blob has of a block that it shares with a lost one
		for i := e.Offset; i < min(e.End(), int64(out.Len())); i++ {
			if out.Bytes()[i] == 0 {
				want[i] = 0
			}
		}
	}
	d.same("the dump", out.Bytes(), want)
}
