// SPDX-License-Identifier: BSD-2-Clause

package prune

import (
	"encoding/binary"
	"testing"
	"time"

	"github.com/dsync-backup/dsync-backup/repo"
)

// BenchmarkPlan finds what is used, and decides what to do, in a repository of
// many small blobs, half of them unused.
func BenchmarkPlan(b *testing.B) {
	const trees, perTree = 32, 16384
	f := newFixture(b, newRand(b))
	w := f.repo.NewWriter(b.Context(), repo.WriterOptions{})
	for i := range trees {
		n := &repo.Node{Name: "data", Type: repo.NodeFile}
		for j := range perTree {
			blob := binary.LittleEndian.AppendUint64(nil, uint64(i*perTree+j))
			s, err := w.SaveBlob(b.Context(), repo.KindData, blob)
			f.must(err)
			n.Content = append(n.Content, s.ID)
			n.Size += uint64(len(blob))
		}
		s, err := w.SaveTree(b.Context(), &repo.Tree{Nodes: []*repo.Node{n}})
		f.must(err)
		f.must(w.Flush(b.Context()))
		if i%2 == 0 {
			_, _, err = f.repo.SaveSnapshot(b.Context(), &repo.Snapshot{Time: time.Now(), Tree: &s.ID, Paths: []string{"/x"}})
			f.must(err)
		}
	}
	f.reopen(b.TempDir())
	for b.Loop() {
		p := &pruner{Options: Options{DryRun: true}, repo: f.repo, sum: &Summary{}}
		var err error
		p.snapshots, err = p.loadSnapshots(b.Context())
		f.must(err)
		c, err := f.repo.Catalog()
		f.must(err)
		_, err = p.plan(b.Context(), c)
		f.must(err)
		if p.sum.Used.Count != trees/2*(perTree+1) || p.sum.Unused.Count != trees/2*(perTree+1) {
			b.Fatalf("%+v", p.sum)
		}
		f.must(c.Close())
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/(trees*(perTree+1)), "ns/blob")
}
