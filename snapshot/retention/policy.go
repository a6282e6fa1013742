// SPDX-License-Identifier: BSD-2-Clause

package retention

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/dsync-backup/dsync-backup/repo"
)

// Unlimited is a Count that keeps all.
const Unlimited Count = -1

// Count is how many snapshots a rule keeps.
type Count int

// Set reads a number or "unlimited".
func (c *Count) Set(s string) error {
	if s == "unlimited" {
		*c = Unlimited
		return nil
	}
	n, err := strconv.Atoi(s)
	if err != nil {
		return fmt.Errorf("%q is neither a number nor unlimited", s)
	}
	if n < 0 {
		return errors.New("negative values are not allowed, use unlimited")
	}
	*c = Count(n)
	return nil
}

func (c *Count) String() string {
	if *c == Unlimited {
		return "unlimited"
	}
	return strconv.Itoa(int(*c))
}

// Type is what help calls it.
func (c *Count) Type() string { return "n" }

// Duration is a span of time by the calendar.
type Duration struct{ Years, Months, Days, Hours int }

// ParseDuration reads a duration such as 1y5m7d2h.
func ParseDuration(s string) (d Duration, err error) {
	for rest := strings.TrimSpace(s); rest != ""; rest = rest[1:] {
		digits := len(rest) - len(strings.TrimLeft(rest, "0123456789"))
		n, err := strconv.Atoi(rest[:digits])
		if err != nil || digits == len(rest) {
			return d, fmt.Errorf("duration %q: want something like 1y5m7d2h", s)
		}
		rest = rest[digits:]
		switch rest[0] {
		case 'y':
			d.Years = n
		case 'm':
			d.Months = n
		case 'd':
			d.Days = n
		case 'h':
			d.Hours = n
		default:
			return d, fmt.Errorf("duration %q: unit %q is none of y, m, d, h", s, rest[:1])
		}
	}
	return d, nil
}

// Set reads a duration.
func (d *Duration) Set(s string) (err error) {
	*d, err = ParseDuration(s)
	return err
}

func (d Duration) String() string {
	var b strings.Builder
	for _, p := range []struct {
		n    int
		unit string
	}{{d.Years, "y"}, {d.Months, "m"}, {d.Days, "d"}, {d.Hours, "h"}} {
		if p.n != 0 {
			fmt.Fprintf(&b, "%d%s", p.n, p.unit)
		}
	}
	return b.String()
}

// Type is what help calls it.
func (d *Duration) Type() string { return "duration" }

// IsZero reports a duration that was not set.
func (d Duration) IsZero() bool { return d == Duration{} }

// before is the time that lies so long before t.
func (d Duration) before(t time.Time) time.Time {
	return t.AddDate(-d.Years, -d.Months, -d.Days).Add(-time.Duration(d.Hours) * time.Hour)
}

// TagList is tags that a snapshot must have all.
type TagList []string

// ParseTags reads tags with commas between them.
func ParseTags(s string) TagList {
	l := strings.Split(s, ",")
	for i := range l {
		l[i] = strings.TrimSpace(l[i])
	}
	return l
}

func (l TagList) String() string { return "[" + strings.Join(l, ", ") + "]" }

// Policy says what to keep. A snapshot is kept if any rule keeps it.
type Policy struct {
	Last, Hourly, Daily, Weekly, Monthly, Yearly Count

	// Within keeps what is not older than so much before the newest; the others
	// one an hour, a day and so on of that.
	Within, WithinHourly, WithinDaily, WithinWeekly, WithinMonthly, WithinYearly Duration

	Tags []TagList // keeps what has all tags of one of the lists
}

// Empty reports a policy without any rule.
func (p *Policy) Empty() bool {
	q := *p
	q.Tags = nil
	return len(p.Tags) == 0 && q.equalsZero()
}

func (p *Policy) equalsZero() bool {
	for _, c := range p.counts() {
		if c.count != 0 {
			return false
		}
	}
	for _, w := range p.within() {
		if !w.within.IsZero() {
			return false
		}
	}
	return p.Within.IsZero()
}

// period is one of the periods of time of which a rule keeps one snapshot each.
type period func(t time.Time, number int) int

func each(_ time.Time, number int) int { return number }

func hour(t time.Time, _ int) int { return day(t, 0)*100 + t.Hour() }

func day(t time.Time, _ int) int { return month(t, 0)*100 + t.Day() }

func week(t time.Time, _ int) int {
	y, w := t.ISOWeek()
	return y*100 + w
}

func month(t time.Time, _ int) int { return t.Year()*100 + int(t.Month()) }

func year(t time.Time, _ int) int { return t.Year() }

// rule keeps the newest snapshot of each period, as long as it has some left to
// keep or within a span of time.
type rule struct {
	count  Count
	within Duration
	period period
	last   int
	reason string
}

func (p *Policy) counts() []*rule {
	return []*rule{
		{count: p.Last, period: each, last: -1, reason: "last snapshot"},
		{count: p.Hourly, period: hour, last: -1, reason: "hourly snapshot"},
		{count: p.Daily, period: day, last: -1, reason: "daily snapshot"},
		{count: p.Weekly, period: week, last: -1, reason: "weekly snapshot"},
		{count: p.Monthly, period: month, last: -1, reason: "monthly snapshot"},
		{count: p.Yearly, period: year, last: -1, reason: "yearly snapshot"},
	}
}

func (p *Policy) within() []*rule {
	return []*rule{
		{count: Unlimited, within: p.WithinHourly, period: hour, last: -1, reason: "hourly within"},
		{count: Unlimited, within: p.WithinDaily, period: day, last: -1, reason: "daily within"},
		{count: Unlimited, within: p.WithinWeekly, period: week, last: -1, reason: "weekly within"},
		{count: Unlimited, within: p.WithinMonthly, period: month, last: -1, reason: "monthly within"},
		{count: Unlimited, within: p.WithinYearly, period: year, last: -1, reason: "yearly within"},
	}
}

// keeps reports whether the rule keeps a snapshot, and why. The oldest one of
// all is kept as long as the rule could keep more.
func (r *rule) keeps(t time.Time, number int, oldest bool) (string, bool) {
	if r.count == 0 {
		return "", false
	}
	now := r.period(t, number)
	if now == r.last && !oldest {
		return "", false
	}
	reason := r.reason
	if now == r.last {
		reason = "oldest " + reason
	}
	r.last = now
	if r.count > 0 {
		r.count--
	}
	return reason, true
}

// Snapshot is a snapshot with its ID.
type Snapshot struct {
	*repo.Snapshot
	ID      repo.ID `json:"id"`
	ShortID string  `json:"short_id"`
}

// New names a snapshot.
func New(id repo.ID, s *repo.Snapshot) Snapshot { return Snapshot{s, id, id.Str()} }

// Reason says why a snapshot is kept.
type Reason struct {
	Snapshot Snapshot `json:"snapshot"`
	Matches  []string `json:"matches"`
}

// Apply says which snapshots of one group are kept, and why each, and which are
// not, newest first. now is the time: what claims to be newer does not count as
// the newest that Within is measured from.
func (p *Policy) Apply(list []Snapshot, now time.Time) (keep, remove []Snapshot, reasons []Reason) {
	list = slices.Clone(list)
	slices.SortFunc(list, func(a, b Snapshot) int {
		if c := b.Time.Compare(a.Time); c != 0 {
			return c
		}
		return a.ID.Compare(b.ID)
	})
	var newest time.Time
	for _, s := range list {
		if s.Time.After(newest) && s.Time.Before(now) {
			newest = s.Time
		}
	}
	counts, within := p.counts(), p.within()
	for i, s := range list {
		var why []string
		for _, l := range p.Tags {
			if s.HasTags(l) {
				why = append(why, "has tags "+l.String())
			}
		}
		if !p.Within.IsZero() && s.Time.After(p.Within.before(newest)) {
			why = append(why, "within "+p.Within.String())
		}
		oldest := i == len(list)-1
		for _, r := range counts {
			if reason, ok := r.keeps(s.Time, i, oldest); ok {
				why = append(why, reason)
			}
		}
		for _, r := range within {
			if r.within.IsZero() || !s.Time.After(r.within.before(newest)) {
				continue
			}
			if reason, ok := r.keeps(s.Time, i, oldest); ok {
				why = append(why, reason+" "+r.within.String())
			}
		}
		if len(why) == 0 {
			remove = append(remove, s)
			continue
		}
		keep = append(keep, s)
		reasons = append(reasons, Reason{s, why})
	}
	return keep, remove, reasons
}
