// SPDX-License-Identifier: BSD-2-Clause

package systemtest

import (
	"encoding/binary"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/repo"
)

// BenchmarkMillionBlobs measures what an incremental backup of 1,000 blocks takes
// in a repository of a million other blobs, and in one of none (I6), with a warm
// cache: the median of several, in turns. More than half as much again of time or memory
// fails it. Run it with -benchtime 1x.
func BenchmarkMillionBlobs(b *testing.B) {
	const size = 256 << 20
	r := rand.New(rand.NewPCG(2, 0))
	c := newContent(r, true)
	img := filepath.Join(b.TempDir(), "disk.img")
	if err := os.WriteFile(img, nil, 0o644); err != nil {
		b.Fatal(err)
	}
	if err := os.Truncate(img, size); err != nil {
		b.Fatal(err)
	}
	f := direct(b, img)
	fillRange(b, f, c, 0, size)
	empty, full := lightEnv(b), lightEnv(b)
	full.fillWithBlobs(1_000_000)
	costs := map[*env][]cost{}
	for round := range 7 {
		var list strings.Builder
		blocks := someBlocks(r, size, 1000)
		writeBlocks(b, f, c, blocks)
		for _, i := range blocks {
			list.WriteString(`{"offset":` + strconv.FormatInt(i*kernel.BlockSize, 10) + `,"length":4096}` + "\n")
		}
		ranges := writeFile(b, list.String())
		for _, e := range []*env{empty, full} {
			args := []string{"-q", "backup", img}
			if round > 0 {
				args = append(args, "--changes", ranges)
			}
			t := e.cost(args...)
			b.Logf("round %d, full %v: %+v", round, e == full, t)
			if round >= 2 { // the cache is warm
				costs[e] = append(costs[e], t)
			}
		}
	}
	x, y := medianCost(costs[empty]), medianCost(costs[full])
	b.ReportMetric(y.wall/x.wall, "time-ratio")
	b.ReportMetric(y.cpu/x.cpu, "CPU-ratio")
	b.ReportMetric(y.rss/x.rss, "RSS-ratio")
	if y.wall > 1.5*x.wall || y.rss > 1.5*x.rss {
		b.Errorf("%.2f times the time and %.2f times the memory of an empty repository, at most 1.5 is allowed", y.wall/x.wall, y.rss/x.rss)
	}
	b.ReportMetric(y.wall, "s")
	b.ReportMetric(y.rss, "MiB-RSS")
}

// medianCost is the median of each part.
func medianCost(costs []cost) cost {
	median := func(of func(cost) float64) float64 {
		var all []float64
		for _, c := range costs {
			all = append(all, of(c))
		}
		slices.Sort(all)
		return all[len(all)/2]
	}
	return cost{median(func(c cost) float64 { return c.wall }), median(func(c cost) float64 { return c.cpu }), median(func(c cost) float64 { return c.rss })}
}

// fillWithBlobs stores n small blobs that a snapshot needs.
func (e *env) fillWithBlobs(n int) {
	e.t.Helper()
	ctx, to := e.t.Context(), e.opened()
	w := to.NewWriter(ctx, repo.WriterOptions{})
	tree := &repo.Tree{}
	var ids []repo.ID
	var b [16]byte
	for i := range n {
		binary.LittleEndian.PutUint64(b[:], uint64(i))
		s, err := w.SaveBlob(ctx, repo.KindData, b[:])
		if err != nil {
			e.t.Fatal(err)
		}
		ids = append(ids, s.ID)
	}
	for i, some := range slices.Collect(slices.Chunk(ids, 10_000)) {
		tree.Nodes = append(tree.Nodes, &repo.Node{
			Name: "file" + strconv.Itoa(100_000+i), Type: repo.NodeFile, Size: uint64(16 * len(some)), Content: some,
		})
	}
	saved, err := w.SaveTree(ctx, tree)
	if err == nil {
		err = w.Flush(ctx)
	}
	if err != nil {
		e.t.Fatal(err)
	}
	if _, _, err := to.SaveSnapshot(ctx, &repo.Snapshot{Time: time.Now(), Tree: &saved.ID, Paths: []string{"/blobs"}, Hostname: "other"}); err != nil {
		e.t.Fatal(err)
	}
}
