// SPDX-License-Identifier: BSD-2-Clause

package index

import "sync/atomic"

// recentPages is how many pages of all tables together are kept in memory, 5 MiB: all of those of
// 80,000 blobs. Of larger repositories the pages that name packs are nearly always at hand, and
// those of blobs are if what is looked up was named together.
const recentPages = 1024

// recent keeps pages that were read and found whole. What is in it is never changed, so that many
// may read one page while another takes its place.
var recent [recentPages]atomic.Pointer[recentPage]

type recentPage struct {
	page

	table  uint64
	number int64
}

// tableNumbers gives each table that is opened a number of its own.
var tableNumbers atomic.Uint64

// page reads a page of the table, if it is not at hand.
func (t *Table) page(number int64) (*page, error) {
	const odd = 0x9e3779b97f4a7c15 // spreads the tables' pages
	slot := &recent[(uint64(number)+t.number*odd)%recentPages]
	if p := slot.Load(); p != nil && p.table == t.number && p.number == number {
		return &p.page, nil
	}
	p := &recentPage{table: t.number, number: number}
	if err := readPage(t.r, number, &p.page); err != nil {
		return nil, err
	}
	slot.Store(p)
	return &p.page, nil
}
