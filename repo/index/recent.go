// SPDX-License-Identifier: BSD-2-Clause

package index

import "sync/atomic"

// recentPages is how many pages of a table are kept in memory, 1 MiB: all of a table of 20,000
// blobs, and of a larger one those that name the packs, which each lookup needs.
const recentPages = 256

// recent keeps pages that were read and found whole, by their number modulo its size. What is in
// it is never changed, so that many may read one page while another takes its place.
type recent [recentPages]atomic.Pointer[recentPage]

type recentPage struct {
	page

	number int64
}

// page reads a page of the table, if it is not at hand.
func (t *Table) page(number int64) (*page, error) {
	slot := &t.recent[number%recentPages]
	if p := slot.Load(); p != nil && p.number == number {
		return &p.page, nil
	}
	p := &recentPage{number: number}
	if err := readPage(t.r, number, &p.page); err != nil {
		return nil, err
	}
	slot.Store(p)
	return &p.page, nil
}
