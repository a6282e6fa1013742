// SPDX-License-Identifier: GPL-2.0-only
/*
 * dm-dsync: a linear target that remembers which blocks were written.
 *
 * One bit per 4 KiB block, in memory. User space ends an epoch with a message
 * and finds the bitmap of the ended epoch in /proc/dsync/<name>/frozen, until
 * it acknowledges that epoch. See dm-dsync.rst for the interface.
 *
 * What is promised: a block whose content may have changed in an epoch is set
 * in that epoch's bitmap. A block too many is a cost, one too few is data
 * loss. Whatever endangers the promise makes the history invalid, and no I/O
 * is ever failed or delayed for it.
 *
 * Why no mark is lost over a rotation
 * ===================================
 * A write is marked twice: in map, before it goes to the device beneath, and
 * in end_io, before its submitter learns that it ended. Each mark is made
 * inside rcu_read_lock() in the bitmap that h->active points to. A rotation
 *
 *	1. points h->active at the other, empty bitmap,
 *	2. waits for a grace period,
 *	3. and only then hands the old bitmap out.
 *
 * A mark whose read side began before 1 may still go to the old bitmap; 2 waits
 * for it, so that it is complete, and visible, at 3. A mark that begins after
 * 2 goes to the new bitmap. In between it goes to either. So, for a write and a
 * reader who copies the blocks of the old bitmap after 3:
 *
 *	- If end_io made its mark in the old bitmap, the write had ended before
 *	  3: the copy has its data.
 *	- Otherwise end_io marks the new bitmap: the block is copied again in the
 *	  next epoch, whatever the copy saw of the write.
 *
 * The mark in map is for writes that have not ended: those may have reached
 * the medium in part, and a crash of the backup must not hide them. It also
 * makes the running epoch's bitmap a superset at any moment.
 *
 * Why testing before setting is sound: bits of a bitmap are cleared only while
 * it is not h->active and after a grace period has passed since it was
 * (dsync_bitmap_clear), so a bit that a mark saw set stays set until the reader
 * of that bitmap had its chance. That the mark does not see a bit from before
 * such a clearing: rcu_assign_pointer() orders the clearing before the pointer,
 * rcu_dereference() the pointer before the test.
 *
 * Locks
 * =====
 * dsync_lock	the list of histories, their directories in /proc and the number
 *		of instances of each. Taken in ctr, dtr, a work item and the notifier
 *		of hibernations; never in preresume, resume, messages, status or the
 *		files in /proc, since it is held while /proc entries are removed,
 *		which waits for readers.
 * h->lock	everything else in a history but the bits. Taken inside dsync_lock
 *		or alone. Never held over an allocation or an access to user
 *		memory, both of which may wait for I/O to this very device, and
 *		never taken where a bio waits.
 * dm's own:	ctr and dtr are called with md->type_lock or nothing, preresume
 *		with md->suspend_lock, messages and status in an SRCU read side.
 *		dm_copy_name_and_uuid() takes dm's innermost mutex.
 */

#include <linux/atomic.h>
#include <linux/bio.h>
#include <linux/blkdev.h>
#include <linux/capability.h>
#include <linux/ctype.h>
#include <linux/device-mapper.h>
#include <linux/dm-ioctl.h>
#include <linux/kernel.h>
#include <linux/list.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/notifier.h>
#include <linux/proc_fs.h>
#include <linux/random.h>
#include <linux/rcupdate.h>
#include <linux/sched.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>
#include <linux/seq_file.h>
#include <linux/slab.h>
#include <linux/suspend.h>
#include <linux/uaccess.h>
#include <linux/uio.h>
#include <linux/version.h>
#include <linux/vmalloc.h>
#include <linux/workqueue.h>

#define DM_MSG_PREFIX "dsync"

#define DSYNC_VERSION		"1.0.0"
#define DSYNC_BLOCK_SIZE	4096
#define DSYNC_BLOCK_SHIFT	3	/* a block is 8 sectors */
#define DSYNC_PAGE_SIZE		4096	/* bytes of bitmap for a bit of summary */
#define DSYNC_PAGE_SHIFT	12
#define DSYNC_PAGE_WORDS	(DSYNC_PAGE_SIZE / sizeof(long))
#define DSYNC_PAGE_BLOCKS	(DSYNC_PAGE_SIZE * 8UL)
#define DSYNC_READ_SIZE		(32 * 1024)	/* bytes that are copied under the lock */
#define DSYNC_ID_SIZE		16		/* of a UUID and of a nonce */
#define DSYNC_REASON_SIZE	128

#if LINUX_VERSION_CODE < KERNEL_VERSION(5, 17, 0) && !defined(pde_data)
#define pde_data(inode) PDE_DATA(inode)
#endif
/* Large pages where there are some: fewer TLB misses in the I/O path. */
#if LINUX_VERSION_CODE >= KERNEL_VERSION(5, 18, 0)
#define dsync_vmalloc(size, gfp) vmalloc_huge(size, gfp)
#else
#define dsync_vmalloc(size, gfp) __vmalloc(size, gfp)
#endif

/*
 * Bit i % BITS_PER_LONG of word i / BITS_PER_LONG is block i. Bits at and after
 * the number of blocks that the bitmap's user speaks of are never set. A page
 * without its bit in summary has no bit set.
 */
struct dsync_bitmap {
	unsigned long blocks;	/* room for that many */
	unsigned long pages;
	atomic_long_t *words;
	unsigned long *summary;
};

struct dsync;
struct dsync_history;

/* What a bitmap file in /proc shows. */
struct dsync_view {
	struct dsync_history *h;
	bool frozen;
};

/*
 * What is known of one mapped device; shared by the target instances of all
 * its tables, gone with the last of them.
 */
struct dsync_history {
	/* guarded by dsync_lock */
	struct list_head list;
	unsigned int instances;
	struct proc_dir_entry *dir;
	char dir_name[DM_NAME_LEN];

	/* never changes */
	struct mapped_device *md;	/* outlives its tables, so all instances */
	struct dsync_view views[2];

	unsigned long flags;		/* atomic bit operations */
#define DSYNC_MISSED 0			/* a mark could not be made */

	/*
	 * The pointer changes under lock; the bits are set under RCU. The one
	 * that is not active is all clear unless an epoch is pending.
	 */
	struct dsync_bitmap __rcu *active;

	struct mutex lock;		/* guards what follows */
	struct dsync_bitmap *spare;	/* the pending epoch's, or empty */
	struct dsync *live;		/* resumed last; may be gone: then NULL */
	bool seen;			/* one was resumed */
	u64 state;			/* counts what changes a bitmap but marks */
	dev_t below;			/* of the live instance, or the first */
	sector_t offset;
	sector_t sectors;
	unsigned long blocks;
	u8 uuid[DSYNC_ID_SIZE];
	u64 epoch;
	bool pending;
	u64 pending_epoch;
	unsigned long pending_blocks;
	u8 nonce[DSYNC_ID_SIZE];
	bool rebase;			/* announced for the next new instance: */
	dev_t rebase_below;
	sector_t rebase_offset;
	bool invalid;
	char reason[DSYNC_REASON_SIZE];
};

/* A target instance. */
struct dsync {
	struct dm_dev *dev;
	sector_t offset;
	sector_t sectors;
	struct dsync_history *history;

	/* guarded by history->lock */
	struct dsync_bitmap *larger[2];	/* to be put in place at resume, or NULL */
	bool was_live;
	struct task_struct *successor;	/* who resumed the next one; compared only */
};

/* Per bio: what end_io has to mark again. */
struct dsync_io {
	sector_t sector;		/* of the mapped device */
	unsigned int sectors;		/* 0: nothing */
};

static LIST_HEAD(dsync_histories);
static DEFINE_MUTEX(dsync_lock);
static struct proc_dir_entry *dsync_root;

static unsigned long dsync_blocks(sector_t sectors)
{
	return (sectors + (1 << DSYNC_BLOCK_SHIFT) - 1) >> DSYNC_BLOCK_SHIFT;
}

/*----------------------------------------------------------------
 * Bitmaps
 *----------------------------------------------------------------
 */

static void dsync_bitmap_free(struct dsync_bitmap *bm)
{
	if (!bm)
		return;
	vfree(bm->words);
	kvfree(bm->summary);
	kfree(bm);
}

/* All clear. NULL if there is not the memory; that is not worth a warning. */
static struct dsync_bitmap *dsync_bitmap_alloc(unsigned long blocks)
{
	const gfp_t gfp = GFP_KERNEL | __GFP_ZERO | __GFP_NOWARN;
	struct dsync_bitmap *bm;

	bm = kzalloc(sizeof(*bm), GFP_KERNEL);
	if (!bm)
		return NULL;
	bm->blocks = blocks;
	bm->pages = DIV_ROUND_UP(blocks, DSYNC_PAGE_BLOCKS);
	bm->words = dsync_vmalloc(bm->pages << DSYNC_PAGE_SHIFT, gfp);
	bm->summary = kvcalloc(BITS_TO_LONGS(bm->pages), sizeof(long), GFP_KERNEL);
	if (!bm->words || !bm->summary) {
		dsync_bitmap_free(bm);
		return NULL;
	}
	return bm;
}

static int dsync_bitmap_pair(struct dsync_bitmap *pair[2], unsigned long blocks)
{
	pair[0] = dsync_bitmap_alloc(blocks);
	pair[1] = dsync_bitmap_alloc(blocks);
	if (pair[0] && pair[1])
		return 0;
	dsync_bitmap_free(pair[0]);
	dsync_bitmap_free(pair[1]);
	pair[0] = NULL;
	pair[1] = NULL;
	return -ENOMEM;
}

static inline void dsync_word_or(atomic_long_t *word, unsigned long mask)
{
	if (mask & ~(unsigned long)atomic_long_read(word))
		atomic_long_or(mask, word);
}

/*
 * Mark blocks first to last, both within the bitmap. Any context.
 *
 * A whole word is stored, not or'ed: with other marks of the word in flight it
 * ends as all ones in any order. (atomic_long_set() because on machines that
 * make their atomics of spinlocks a plain store could be overwritten.)
 *
 * The summary comes first, so that whoever sees a bit sees its page in the
 * summary too, in the running epoch as well.
 */
static void dsync_bitmap_mark(struct dsync_bitmap *bm, unsigned long first, unsigned long last)
{
	unsigned long page, word = first / BITS_PER_LONG, end = last / BITS_PER_LONG;
	unsigned long head = ~0UL << (first % BITS_PER_LONG);
	unsigned long tail = ~0UL >> (BITS_PER_LONG - 1 - last % BITS_PER_LONG);

	for (page = first / DSYNC_PAGE_BLOCKS; page <= last / DSYNC_PAGE_BLOCKS; page++) {
		if (!test_bit(page, bm->summary)) {
			set_bit(page, bm->summary);
			smp_mb__after_atomic();	/* before the bits */
		}
	}

	if (word == end) {
		dsync_word_or(&bm->words[word], head & tail);
		return;
	}
	dsync_word_or(&bm->words[word], head);
	while (++word < end) {
		if (atomic_long_read(&bm->words[word]) != -1L)
			atomic_long_set(&bm->words[word], -1L);
	}
	dsync_word_or(&bm->words[end], tail);
}

/* Only for a bitmap that nobody marks: see the head of this file. */
static void dsync_bitmap_clear(struct dsync_bitmap *bm)
{
	unsigned long page;

	for_each_set_bit(page, bm->summary, bm->pages) {
		memset(&bm->words[page * DSYNC_PAGE_WORDS], 0, DSYNC_PAGE_SIZE);
		cond_resched();
	}
	memset(bm->summary, 0, BITS_TO_LONGS(bm->pages) * sizeof(long));
}

/* Clear block first and all after it; nobody marks. */
static void dsync_bitmap_truncate(struct dsync_bitmap *bm, unsigned long first)
{
	unsigned long page = first / DSYNC_PAGE_BLOCKS, word = first / BITS_PER_LONG;
	unsigned long bit = first % BITS_PER_LONG;

	if (first >= bm->blocks)
		return;
	if (bit) {
		atomic_long_and(~(~0UL << bit), &bm->words[word]);
		word++;
	}
	for (; word % DSYNC_PAGE_WORDS; word++)
		atomic_long_set(&bm->words[word], 0);
	if (first % DSYNC_PAGE_BLOCKS)
		page++;
	for (; page < bm->pages; page++) {
		if (!test_bit(page, bm->summary))
			continue;
		memset(&bm->words[page * DSYNC_PAGE_WORDS], 0, DSYNC_PAGE_SIZE);
		clear_bit(page, bm->summary);
		cond_resched();
	}
}

/* to is as large as from, or larger, and empty; nobody marks. */
static void dsync_bitmap_copy(struct dsync_bitmap *to, const struct dsync_bitmap *from)
{
	unsigned long page;

	for_each_set_bit(page, from->summary, from->pages) {
		memcpy(&to->words[page * DSYNC_PAGE_WORDS],
		       &from->words[page * DSYNC_PAGE_WORDS], DSYNC_PAGE_SIZE);
		set_bit(page, to->summary);
		cond_resched();
	}
}

static bool dsync_bitmap_empty(const struct dsync_bitmap *bm)
{
	return find_first_bit(bm->summary, bm->pages) >= bm->pages;
}

static unsigned long dsync_bitmap_weight(const struct dsync_bitmap *bm)
{
	unsigned long page, i, n = 0;

	for_each_set_bit(page, bm->summary, bm->pages) {
		const atomic_long_t *words = &bm->words[page * DSYNC_PAGE_WORDS];

		for (i = 0; i < DSYNC_PAGE_WORDS; i++)
			n += hweight_long(atomic_long_read(&words[i]));
		cond_resched();
	}
	return n;
}

/* The first block from that one on that is set, or end. */
static unsigned long dsync_bitmap_next(const struct dsync_bitmap *bm, unsigned long from,
				       unsigned long end)
{
	const unsigned long *bits = (const unsigned long *)bm->words;
	unsigned long page, stop, found;

	while (from < end) {
		page = find_next_bit(bm->summary, bm->pages, from / DSYNC_PAGE_BLOCKS);
		if (page >= bm->pages)
			break;
		from = max(from, page * DSYNC_PAGE_BLOCKS);
		stop = min(end, (page + 1) * DSYNC_PAGE_BLOCKS);
		if (from >= stop)
			break;
		found = find_next_bit(bits, stop, from);
		if (found < stop)
			return found;
		from = stop;
		cond_resched();
	}
	return end;
}

static inline unsigned long dsync_le_word(unsigned long word)
{
#if BITS_PER_LONG == 64
	return (__force unsigned long)cpu_to_le64(word);
#else
	return (__force unsigned long)cpu_to_le32(word);
#endif
}

/* Copy n words in the byte order of the files in /proc. */
static void dsync_bitmap_read(const struct dsync_bitmap *bm, unsigned long word, size_t n,
			      unsigned long *to)
{
	while (n) {
		size_t i, part = min_t(size_t, n, DSYNC_PAGE_WORDS - word % DSYNC_PAGE_WORDS);

		if (test_bit(word / DSYNC_PAGE_WORDS, bm->summary))
			for (i = 0; i < part; i++)
				to[i] = dsync_le_word(atomic_long_read(&bm->words[word + i]));
		else
			memset(to, 0, part * sizeof(long));
		to += part;
		word += part;
		n -= part;
	}
}

/*----------------------------------------------------------------
 * Histories
 *----------------------------------------------------------------
 */

static struct dsync_bitmap *dsync_active(struct dsync_history *h)
{
	return rcu_dereference_protected(h->active, lockdep_is_held(&h->lock));
}

static void dsync_invalidate(struct dsync_history *h, const char *reason)
{
	lockdep_assert_held(&h->lock);
	if (h->invalid)
		return;		/* the first reason stays */
	strscpy(h->reason, reason, sizeof(h->reason));
	h->invalid = true;
	DMINFO("%s: history is invalid: %s", dm_device_name(h->md), h->reason);
}

/* Every look at h->invalid comes after this. */
static void dsync_settle(struct dsync_history *h)
{
	if (test_bit(DSYNC_MISSED, &h->flags))
		dsync_invalidate(h, "a write outside of the bitmap");
}

/* In the I/O path, in any context. */
static void dsync_mark(struct dsync_history *h, sector_t sector, unsigned int sectors)
{
	sector_t first = sector >> DSYNC_BLOCK_SHIFT;
	sector_t last = (sector + sectors - 1) >> DSYNC_BLOCK_SHIFT;
	struct dsync_bitmap *bm;

	rcu_read_lock();
	bm = rcu_dereference(h->active);
	if (likely(last < bm->blocks))
		dsync_bitmap_mark(bm, first, last);
	else
		set_bit(DSYNC_MISSED, &h->flags);
	rcu_read_unlock();
}

/*
 * The same for user space and for grown devices: of any length, which is why it
 * stays out of RCU. That no rotation can happen meanwhile is due to h->lock.
 */
static void dsync_mark_blocks(struct dsync_history *h, unsigned long first, unsigned long last)
{
	struct dsync_bitmap *bm = dsync_active(h);

	while (first <= last) {
		unsigned long end = min(last, first | (DSYNC_PAGE_BLOCKS - 1));

		dsync_bitmap_mark(bm, first, end);
		first = end + 1;
		cond_resched();
	}
}

/*
 * Make the spare bitmap, which is empty, the active one. On return nobody marks
 * the one that was, all marks in it are visible, and it is h->spare.
 */
static void dsync_swap(struct dsync_history *h)
{
	struct dsync_bitmap *old = dsync_active(h);

	rcu_assign_pointer(h->active, h->spare);
	synchronize_rcu_expedited();
	h->spare = old;
	h->state++;
}

/* Forget all marks. Those of writes in flight are made after, by end_io. */
static void dsync_forget(struct dsync_history *h)
{
	dsync_bitmap_clear(h->spare);
	h->pending = false;
	h->pending_blocks = 0;
	dsync_swap(h);
	dsync_bitmap_clear(h->spare);
}

/* An instance is resumed for the first time; no I/O runs. */
static void dsync_go_live(struct dsync_history *h, struct dsync *d)
{
	struct dsync_bitmap *active = dsync_active(h), *spare = h->spare;
	unsigned long blocks = dsync_blocks(d->sectors);

	if (d->larger[0] && d->larger[0]->blocks > active->blocks) {
		dsync_bitmap_copy(d->larger[0], active);
		dsync_bitmap_copy(d->larger[1], spare);
		rcu_assign_pointer(h->active, d->larger[0]);
		h->spare = d->larger[1];
		synchronize_rcu_expedited();
		d->larger[0] = active;	/* freed with the instance */
		d->larger[1] = spare;
		active = dsync_active(h);
	}
	if (blocks > active->blocks) {
		/* ctr has seen to it that this cannot be */
		dsync_invalidate(h, "the bitmap is too small");
		blocks = active->blocks;
	}

	if (h->seen) {
		bool same = d->dev->bdev->bd_dev == h->below && d->offset == h->offset;
		bool announced = h->rebase && d->dev->bdev->bd_dev == h->rebase_below &&
				 d->offset == h->rebase_offset;

		if (!same && !announced)
			dsync_invalidate(h, "the device beneath was replaced");
		if (d->sectors > h->sectors)
			dsync_mark_blocks(h, h->sectors >> DSYNC_BLOCK_SHIFT, blocks - 1);
		else
			dsync_bitmap_truncate(active, blocks);
	}
	h->state++;
	h->rebase = false;
	h->below = d->dev->bdev->bd_dev;
	h->offset = d->offset;
	h->sectors = d->sectors;
	h->blocks = blocks;
	h->seen = true;

	if (h->live)
		h->live->successor = current;
	h->live = d;
	d->was_live = true;
}

/*
 * An instance goes, others stay. dm destroys a table that was live in the task
 * that put the next one in its place, before that task does anything else. So if
 * the task that resumed the next instance of ours is not this one, it was another
 * table that took this one's place, and writes have passed it untracked.
 */
static void dsync_go_dead(struct dsync_history *h, struct dsync *d)
{
	mutex_lock(&h->lock);
	if (h->live == d) {
		h->live = NULL;
		dsync_invalidate(h, "a table without dsync was in use");
	} else if (d->was_live && d->successor != current) {
		dsync_invalidate(h, "a table without dsync was in use");
	}
	mutex_unlock(&h->lock);
}

/*----------------------------------------------------------------
 * /proc/dsync/<name>/
 *
 * The entries of a history are removed before it is freed, and removal waits
 * for calls in progress: no file operation sees a history that is gone.
 *----------------------------------------------------------------
 */

/* Memory for a reader must not come from writing to a suspended device. */
static ssize_t dsync_seq_read_iter(struct kiocb *iocb, struct iov_iter *to)
{
	unsigned int noio = memalloc_noio_save();
	ssize_t r = seq_read_iter(iocb, to);

	memalloc_noio_restore(noio);
	return r;
}

static int dsync_status_show(struct seq_file *m, void *v)
{
	struct dsync_history *h = m->private;
	char name[DM_NAME_LEN];

	if (dm_copy_name_and_uuid(h->md, name, NULL))
		strscpy(name, "-", sizeof(name));	/* being removed */

	mutex_lock(&h->lock);
	dsync_settle(h);
	seq_puts(m, "version " DSYNC_VERSION "\n");
	seq_printf(m, "device %s\n", dm_device_name(h->md));
	seq_printf(m, "name %s\n", name);
	seq_printf(m, "uuid %*phN\n", DSYNC_ID_SIZE, h->uuid);
	seq_printf(m, "below %u:%u %llu\n", MAJOR(h->below), MINOR(h->below),
		   (unsigned long long)h->offset);
	seq_printf(m, "epoch %llu\n", h->epoch);
	if (h->pending)
		seq_printf(m, "pending %llu %*phN\n", h->pending_epoch, DSYNC_ID_SIZE, h->nonce);
	else
		seq_puts(m, "pending -\n");
	seq_printf(m, "pending_blocks %lu\n", h->pending_blocks);
	seq_printf(m, "block_size %d\n", DSYNC_BLOCK_SIZE);
	seq_printf(m, "sectors %llu\n", (unsigned long long)h->sectors);
	seq_printf(m, "blocks %lu\n", h->blocks);
	seq_printf(m, "dirty %lu\n", dsync_bitmap_weight(dsync_active(h)));
	seq_printf(m, "pending_dirty %lu\n", dsync_bitmap_weight(h->spare));
	if (h->invalid)
		seq_printf(m, "state invalid %s\n", h->reason);
	else
		seq_puts(m, "state valid\n");
	seq_printf(m, "live %d\n", h->live ? 1 : 0);
	mutex_unlock(&h->lock);
	return 0;
}

static int dsync_status_open(struct inode *inode, struct file *file)
{
	if (!capable(CAP_SYS_ADMIN))
		return -EPERM;
	return single_open(file, dsync_status_show, pde_data(inode));
}

static const struct proc_ops dsync_status_ops = {
	.proc_open	= dsync_status_open,
	.proc_read_iter	= dsync_seq_read_iter,
	.proc_lseek	= seq_lseek,
	.proc_release	= single_release,
};

/* active and frozen */

static int dsync_view_open(struct inode *inode, struct file *file)
{
	if (!capable(CAP_SYS_ADMIN))
		return -EPERM;
	file->private_data = pde_data(inode);
	return 0;
}

/* The bitmap, and its length in bytes; NULL and 0 if there is none. h->lock is held. */
static struct dsync_bitmap *dsync_view_get(struct dsync_view *view, loff_t *size)
{
	struct dsync_history *h = view->h;
	unsigned long blocks = view->frozen ? h->pending_blocks : h->blocks;

	*size = DIV_ROUND_UP_ULL((u64)blocks, 8);
	if (view->frozen)
		return h->pending ? h->spare : NULL;
	return dsync_active(h);
}

/*
 * A read is of one state of the history: it ends early where an epoch ended or
 * was acknowledged, or the device was resized, since it began.
 */
static ssize_t dsync_view_read_iter(struct kiocb *iocb, struct iov_iter *to)
{
	struct dsync_view *view = iocb->ki_filp->private_data;
	struct dsync_history *h = view->h;
	u64 state = 0;
	ssize_t done = 0;
	char *buf;

	/* a copy, so that the lock is not held over a page fault */
	buf = kmalloc(DSYNC_READ_SIZE, GFP_NOIO);
	if (!buf)
		return -ENOMEM;

	while (iov_iter_count(to)) {
		loff_t size, pos = iocb->ki_pos;
		size_t skip = pos % sizeof(long), copied;
		size_t n = min_t(size_t, iov_iter_count(to), DSYNC_READ_SIZE - skip);
		struct dsync_bitmap *bm;

		mutex_lock(&h->lock);
		bm = dsync_view_get(view, &size);
		if (pos >= size || (done && state != h->state)) {
			mutex_unlock(&h->lock);
			break;
		}
		state = h->state;
		n = min_t(u64, n, size - pos);
		dsync_bitmap_read(bm, pos / sizeof(long), DIV_ROUND_UP(skip + n, sizeof(long)),
				  (unsigned long *)buf);
		mutex_unlock(&h->lock);

		copied = copy_to_iter(buf + skip, n, to);
		iocb->ki_pos += copied;
		done += copied;
		if (copied < n) {
			done = done ? done : -EFAULT;
			break;
		}
		if (fatal_signal_pending(current))
			break;
		cond_resched();
	}
	kfree(buf);
	return done;
}

static loff_t dsync_view_lseek(struct file *file, loff_t offset, int whence)
{
	struct dsync_view *view = file->private_data;
	struct dsync_bitmap *bm;
	unsigned long page;
	loff_t size;

	mutex_lock(&view->h->lock);
	bm = dsync_view_get(view, &size);
	if (whence != SEEK_DATA && whence != SEEK_HOLE) {
		offset = fixed_size_llseek(file, offset, whence, size);
		goto out;
	}
	if (offset < 0 || offset >= size) {
		offset = -ENXIO;
		goto out;
	}
	page = offset >> DSYNC_PAGE_SHIFT;
	if (whence == SEEK_DATA) {
		page = find_next_bit(bm->summary, bm->pages, page);
		offset = max_t(loff_t, offset, (loff_t)page << DSYNC_PAGE_SHIFT);
		if (offset >= size) {
			offset = -ENXIO;
			goto out;
		}
	} else {
		page = find_next_zero_bit(bm->summary, bm->pages, page);
		offset = max_t(loff_t, offset, (loff_t)page << DSYNC_PAGE_SHIFT);
		offset = min(offset, size);
	}
	offset = vfs_setpos(file, offset, size);
out:
	mutex_unlock(&view->h->lock);
	return offset;
}

static const struct proc_ops dsync_view_ops = {
	.proc_open	= dsync_view_open,
	.proc_read_iter	= dsync_view_read_iter,
	.proc_lseek	= dsync_view_lseek,
};

/* blocks: numbers in text, of both bitmaps */

static void *dsync_blocks_find(struct dsync_history *h, loff_t *pos)
{
	unsigned long from, found;

	if (*pos >= h->blocks)
		return NULL;
	from = *pos;
	found = dsync_bitmap_next(dsync_active(h), from, h->blocks);
	if (h->pending && from < h->pending_blocks) {
		unsigned long end = min(found, h->pending_blocks);
		unsigned long frozen = dsync_bitmap_next(h->spare, from, end);

		if (frozen < end)
			found = frozen;
	}
	*pos = found;
	return found < h->blocks ? pos : NULL;
}

static void *dsync_blocks_start(struct seq_file *m, loff_t *pos)
{
	struct dsync_history *h = m->private;

	mutex_lock(&h->lock);
	return dsync_blocks_find(h, pos);
}

static void *dsync_blocks_next(struct seq_file *m, void *v, loff_t *pos)
{
	++*pos;
	return dsync_blocks_find(m->private, pos);
}

static void dsync_blocks_stop(struct seq_file *m, void *v)
{
	struct dsync_history *h = m->private;

	mutex_unlock(&h->lock);
}

static int dsync_blocks_show(struct seq_file *m, void *v)
{
	seq_printf(m, "%lld\n", *(loff_t *)v);
	return 0;
}

static const struct seq_operations dsync_blocks_seq = {
	.start	= dsync_blocks_start,
	.next	= dsync_blocks_next,
	.stop	= dsync_blocks_stop,
	.show	= dsync_blocks_show,
};

static int dsync_blocks_open(struct inode *inode, struct file *file)
{
	int r;

	if (!capable(CAP_SYS_ADMIN))
		return -EPERM;
	r = seq_open(file, &dsync_blocks_seq);
	if (!r)
		((struct seq_file *)file->private_data)->private = pde_data(inode);
	return r;
}

static ssize_t dsync_blocks_write(struct file *file, const char __user *data, size_t size,
				  loff_t *pos)
{
	struct dsync_history *h = ((struct seq_file *)file->private_data)->private;
	static const char clear[] = { 'c', 'l', 'e', 'a', 'r', '\n' };
	char word[sizeof(clear)];
	int r = 0;

	/* with the newline, or without */
	if (size != sizeof(clear) && size != sizeof(clear) - 1)
		return -EINVAL;
	if (copy_from_user(word, data, size))
		return -EFAULT;
	if (memcmp(word, clear, size))
		return -EINVAL;

	mutex_lock(&h->lock);
	if (h->live) {
		dsync_forget(h);
		h->epoch++;
	} else {
		r = -EBUSY;
	}
	mutex_unlock(&h->lock);
	return r ? r : size;
}

static const struct proc_ops dsync_blocks_ops = {
	.proc_open	= dsync_blocks_open,
	.proc_read_iter	= dsync_seq_read_iter,
	.proc_write	= dsync_blocks_write,
	.proc_lseek	= seq_lseek,
	.proc_release	= seq_release,
};

static int dsync_version_show(struct seq_file *m, void *v)
{
	seq_puts(m, DSYNC_VERSION "\n");
	return 0;
}

/*
 * Whether a directory may have the device's name: no name that is taken, none that
 * /proc refuses with a warning, and none that looks like the name that stands in
 * for such, so that the latter is always free.
 */
static bool dsync_name_usable(const struct dsync_history *h, const char *name)
{
	const struct dsync_history *other;
	unsigned int i, digits = 0, colons = 0;

	if (!*name || !strcmp(name, ".") || !strcmp(name, "..") || !strcmp(name, "version"))
		return false;
	for (i = 0; name[i]; i++) {
		if (name[i] == '/')
			return false;
		if (isdigit(name[i]))
			digits++;
		else if (name[i] == ':')
			colons++;
	}
	if (colons == 1 && digits + colons == i)
		return false;
	list_for_each_entry(other, &dsync_histories, list)
		if (other != h && !strcmp(other->dir_name, name))
			return false;
	return true;
}

/* Give the history its directory, or the directory its right name. */
static int dsync_proc_update(struct dsync_history *h)
{
	struct proc_dir_entry *dir, *old = h->dir;
	char name[DM_NAME_LEN];

	lockdep_assert_held(&dsync_lock);
	if (dm_copy_name_and_uuid(h->md, name, NULL))
		return -ENXIO;
	if (!dsync_name_usable(h, name))
		strscpy(name, dm_device_name(h->md), sizeof(name));
	if (old && !strcmp(name, h->dir_name))
		return 0;

	dir = proc_mkdir_mode(name, 0500, dsync_root);
	if (!dir)
		return -ENOMEM;
	if (!proc_create_data("status", 0400, dir, &dsync_status_ops, h) ||
	    !proc_create_data("active", 0400, dir, &dsync_view_ops, &h->views[0]) ||
	    !proc_create_data("frozen", 0400, dir, &dsync_view_ops, &h->views[1]) ||
	    !proc_create_data("blocks", 0600, dir, &dsync_blocks_ops, h)) {
		proc_remove(dir);
		return -ENOMEM;
	}
	h->dir = dir;
	strscpy(h->dir_name, name, sizeof(h->dir_name));
	proc_remove(old);
	return 0;
}

/*
 * Renamed devices are looked for after each resume, but not by it: removing the
 * old directory waits for its readers, and one of those may wait for I/O.
 */
static void dsync_names_update(struct work_struct *work)
{
	struct dsync_history *h;

	mutex_lock(&dsync_lock);
	list_for_each_entry(h, &dsync_histories, list)
		if (dsync_proc_update(h) == -ENOMEM)
			DMWARN("%s: not enough memory to rename /proc/dsync/%s",
			       dm_device_name(h->md), h->dir_name);
	mutex_unlock(&dsync_lock);
}

static DECLARE_WORK(dsync_names_work, dsync_names_update);

/*----------------------------------------------------------------
 * Construction and destruction
 *----------------------------------------------------------------
 */

static void dsync_history_free(struct dsync_history *h)
{
	dsync_bitmap_free(rcu_dereference_protected(h->active, true));
	dsync_bitmap_free(h->spare);
	mutex_destroy(&h->lock);
	kfree(h);
}

static struct dsync_history *dsync_history_create(struct dm_target *ti, struct dsync *d)
{
	struct dsync_history *h;
	struct dsync_bitmap *pair[2];

	h = kzalloc(sizeof(*h), GFP_KERNEL);
	if (!h) {
		ti->error = "Cannot allocate history";
		return ERR_PTR(-ENOMEM);
	}
	if (dsync_bitmap_pair(pair, dsync_blocks(d->sectors))) {
		kfree(h);
		ti->error = "Cannot allocate bitmaps";
		return ERR_PTR(-ENOMEM);
	}
	mutex_init(&h->lock);
	RCU_INIT_POINTER(h->active, pair[0]);
	h->spare = pair[1];
	h->md = dm_table_get_md(ti->table);
	h->views[0].h = h;
	h->views[1].h = h;
	h->views[1].frozen = true;
	h->below = d->dev->bdev->bd_dev;
	h->offset = d->offset;
	h->sectors = d->sectors;
	h->blocks = dsync_blocks(d->sectors);
	h->epoch = 1;
	get_random_bytes(h->uuid, sizeof(h->uuid));
	if (dsync_proc_update(h)) {
		dsync_history_free(h);
		ti->error = "Cannot create entries in /proc/dsync";
		return ERR_PTR(-ENOMEM);
	}
	list_add(&h->list, &dsync_histories);
	return h;
}

static struct dsync_history *dsync_history_find(struct mapped_device *md)
{
	struct dsync_history *h;

	list_for_each_entry(h, &dsync_histories, list)
		if (h->md == md)
			return h;
	return NULL;
}

/* Join the history of the device, or begin it. */
static int dsync_attach(struct dm_target *ti, struct dsync *d)
{
	struct dsync_history *h;
	unsigned long room;
	int r = 0;

	mutex_lock(&dsync_lock);
	h = dsync_history_find(dm_table_get_md(ti->table));
	if (!h) {
		h = dsync_history_create(ti, d);
		if (IS_ERR(h)) {
			r = PTR_ERR(h);
			goto out;
		}
	} else {
		mutex_lock(&h->lock);
		room = dsync_active(h)->blocks;	/* never less later */
		mutex_unlock(&h->lock);
		if (dsync_blocks(d->sectors) > room) {
			r = dsync_bitmap_pair(d->larger, dsync_blocks(d->sectors));
			if (r) {
				ti->error = "Cannot allocate larger bitmaps";
				goto out;
			}
		}
	}
	h->instances++;
	d->history = h;
out:
	mutex_unlock(&dsync_lock);
	return r;
}

static void dsync_detach(struct dsync *d)
{
	struct dsync_history *h = d->history;

	mutex_lock(&dsync_lock);
	if (--h->instances) {
		dsync_go_dead(h, d);
	} else {
		/*
		 * No I/O is left: its end_io was called before the bio that
		 * somebody waited for ended. Readers of /proc are waited for.
		 */
		proc_remove(h->dir);
		list_del(&h->list);
		dsync_history_free(h);
	}
	mutex_unlock(&dsync_lock);
}

/* NULL-tolerant, and of anything half made. */
static void dsync_destroy(struct dm_target *ti, struct dsync *d)
{
	if (!d)
		return;
	if (d->history)
		dsync_detach(d);
	dsync_bitmap_free(d->larger[0]);
	dsync_bitmap_free(d->larger[1]);
	if (d->dev)
		dm_put_device(ti, d->dev);
	kfree(d);
}

/*
 * Construct a linear mapping with a history: <device> <offset>
 *	<device>	path or major:minor
 *	<offset>	first sector of it
 */
static int dsync_ctr(struct dm_target *ti, unsigned int argc, char **argv)
{
	unsigned long long offset;
	struct dsync *d;
	char dummy;
	int r;

	if (argc != 2) {
		ti->error = "Two arguments are needed: device, offset";
		return -EINVAL;
	}
	if (ti->begin) {
		ti->error = "The target must be at the beginning of the device";
		return -EINVAL;
	}
	if (sscanf(argv[1], "%llu%c", &offset, &dummy) != 1 || offset != (sector_t)offset ||
	    offset + ti->len < offset) {
		ti->error = "Invalid offset";
		return -EINVAL;
	}
	/* two bitmaps, a bit per block each, in at most half of the memory */
	if (ti->len >> DSYNC_BLOCK_SHIFT >= ULONG_MAX / 2 ||
	    dsync_blocks(ti->len) / 8 >> PAGE_SHIFT > totalram_pages() / 4) {
		ti->error = "The device is too large for the memory of this machine";
		return -ENOMEM;
	}

	d = kzalloc(sizeof(*d), GFP_KERNEL);
	if (!d) {
		ti->error = "Cannot allocate target";
		return -ENOMEM;
	}
	d->offset = offset;
	d->sectors = ti->len;

	r = dm_get_device(ti, argv[0], dm_table_get_mode(ti->table), &d->dev);
	if (r) {
		d->dev = NULL;
		ti->error = "Device lookup failed";
		goto bad;
	}
	if (bdev_is_zoned(d->dev->bdev)) {
		ti->error = "Zoned devices are not supported";
		r = -EINVAL;
		goto bad;
	}
	r = dsync_attach(ti, d);
	if (r)
		goto bad;

	ti->num_flush_bios = 1;
	ti->num_discard_bios = 1;
	ti->num_secure_erase_bios = 1;
	ti->num_write_zeroes_bios = 1;
	ti->per_io_data_size = sizeof(struct dsync_io);
	ti->private = d;
	return 0;

bad:
	dsync_destroy(ti, d);
	return r;
}

static void dsync_dtr(struct dm_target *ti)
{
	dsync_destroy(ti, ti->private);
}

/*----------------------------------------------------------------
 * I/O
 *----------------------------------------------------------------
 */

static int dsync_map(struct dm_target *ti, struct bio *bio)
{
	struct dsync_io *io = dm_per_bio_data(bio, sizeof(*io));
	struct dsync *d = ti->private;

	/* a flush without data is a write of no sectors */
	io->sectors = op_is_write(bio_op(bio)) ? bio_sectors(bio) : 0;
	if (io->sectors) {
		io->sector = dm_target_offset(ti, bio->bi_iter.bi_sector);
		dsync_mark(d->history, io->sector, io->sectors);
	}

	bio_set_dev(bio, d->dev->bdev);
	bio->bi_iter.bi_sector = d->offset + dm_target_offset(ti, bio->bi_iter.bi_sector);
	return DM_MAPIO_REMAPPED;
}

/* Also of a write that failed: part of it may be on the device. */
static int dsync_end_io(struct dm_target *ti, struct bio *bio, blk_status_t *error)
{
	const struct dsync_io *io = dm_per_bio_data(bio, sizeof(*io));
	struct dsync *d = ti->private;

	if (io->sectors)
		dsync_mark(d->history, io->sector, io->sectors);
	return DM_ENDIO_DONE;
}

static int dsync_preresume(struct dm_target *ti)
{
	struct dsync *d = ti->private;
	struct dsync_history *h = d->history;

	mutex_lock(&h->lock);
	if (h->live != d)
		dsync_go_live(h, d);
	mutex_unlock(&h->lock);
	return 0;
}

static void dsync_resume(struct dm_target *ti)
{
	schedule_work(&dsync_names_work);
}

static int dsync_iterate_devices(struct dm_target *ti, iterate_devices_callout_fn fn, void *data)
{
	struct dsync *d = ti->private;

	return fn(ti, d->dev, d->offset, ti->len, data);
}

/*----------------------------------------------------------------
 * Status and messages
 *----------------------------------------------------------------
 */

static void dsync_status(struct dm_target *ti, status_type_t type, unsigned int status_flags,
			 char *result, unsigned int maxlen)
{
	struct dsync *d = ti->private;
	struct dsync_history *h = d->history;
	char pending[24] = "-";
	size_t sz = 0;

	switch (type) {
	case STATUSTYPE_INFO:
		mutex_lock(&h->lock);
		dsync_settle(h);
		if (h->pending)
			snprintf(pending, sizeof(pending), "%llu", h->pending_epoch);
		DMEMIT("%*phN %llu %s %lu %lu %s", DSYNC_ID_SIZE, h->uuid, h->epoch, pending,
		       dsync_bitmap_weight(dsync_active(h)), h->blocks,
		       h->invalid ? "invalid " : "valid");
		if (h->invalid)
			DMEMIT("%s", h->reason);
		mutex_unlock(&h->lock);
		break;

	case STATUSTYPE_TABLE:
		DMEMIT("%s %llu", d->dev->name, (unsigned long long)d->offset);
		break;

	case STATUSTYPE_IMA:
		DMEMIT_TARGET_NAME_VERSION(ti->type);
		DMEMIT(",device_name=%s,start=%llu;", d->dev->name,
		       (unsigned long long)d->offset);
		break;
	}
}

static int dsync_parse_id(const char *arg, u8 id[DSYNC_ID_SIZE])
{
	if (strlen(arg) != 2 * DSYNC_ID_SIZE || hex2bin(id, arg, DSYNC_ID_SIZE))
		return -EINVAL;
	return 0;
}

static int dsync_msg_rotate(struct dsync *d, unsigned int argc, char **argv)
{
	struct dsync_history *h = d->history;
	u8 nonce[DSYNC_ID_SIZE];

	if (dsync_parse_id(argv[1], nonce))
		return -EINVAL;
	if (h->pending)
		return -EBUSY;
	dsync_swap(h);
	memcpy(h->nonce, nonce, sizeof(nonce));
	h->pending = true;
	h->pending_epoch = h->epoch++;
	h->pending_blocks = h->blocks;
	return 0;
}

static int dsync_msg_ack(struct dsync *d, unsigned int argc, char **argv)
{
	struct dsync_history *h = d->history;
	u64 epoch;

	if (kstrtou64(argv[1], 10, &epoch))
		return -EINVAL;
	if (!h->pending || epoch != h->pending_epoch)
		return -ENODATA;
	dsync_bitmap_clear(h->spare);
	h->pending = false;
	h->pending_blocks = 0;
	h->state++;
	return 0;
}

static int dsync_msg_mark(struct dsync *d, unsigned int argc, char **argv)
{
	struct dsync_history *h = d->history;
	u64 start, length;

	if (kstrtou64(argv[1], 10, &start) || kstrtou64(argv[2], 10, &length) || !length)
		return -EINVAL;
	if (start >= h->sectors || length > h->sectors - start)
		return -ERANGE;
	dsync_mark_blocks(h, start >> DSYNC_BLOCK_SHIFT,
			  (start + length - 1) >> DSYNC_BLOCK_SHIFT);
	return 0;
}

static int dsync_msg_invalidate(struct dsync *d, unsigned int argc, char **argv)
{
	char reason[DSYNC_REASON_SIZE];
	unsigned int i;
	size_t sz = 0;

	for (i = 1; i < argc; i++)
		sz += scnprintf(reason + sz, sizeof(reason) - sz, i > 1 ? " %s" : "%s", argv[i]);
	for (i = 0; i < sz; i++)
		if (iscntrl(reason[i]))
			reason[i] = '?';
	dsync_invalidate(d->history, reason);
	return 0;
}

static int dsync_msg_rebase(struct dsync *d, unsigned int argc, char **argv)
{
	struct dsync_history *h = d->history;
	unsigned int major, minor;
	u64 offset;
	char dummy;

	if (sscanf(argv[1], "%u:%u%c", &major, &minor, &dummy) != 2 ||
	    major != MAJOR(MKDEV(major, minor)) || minor != MINOR(MKDEV(major, minor)) ||
	    kstrtou64(argv[2], 10, &offset) || offset != (sector_t)offset)
		return -EINVAL;
	h->rebase = true;
	h->rebase_below = MKDEV(major, minor);
	h->rebase_offset = offset;
	return 0;
}

static int dsync_msg_continue(struct dsync *d, unsigned int argc, char **argv)
{
	struct dsync_history *h = d->history;
	u8 uuid[DSYNC_ID_SIZE];
	u64 epoch;

	if (dsync_parse_id(argv[1], uuid) || kstrtou64(argv[2], 10, &epoch) || epoch < 2)
		return -EINVAL;
	if (h->epoch != 1 || h->invalid || h->pending || !dsync_bitmap_empty(dsync_active(h)))
		return -EBUSY;
	memcpy(h->uuid, uuid, sizeof(uuid));
	h->epoch = epoch;
	return 0;
}

static int dsync_msg_restart(struct dsync *d, unsigned int argc, char **argv)
{
	struct dsync_history *h = d->history;

	if (h->live != d)
		return -EBUSY;
	/* before the swap: what is missed from there on is the new history's */
	clear_bit(DSYNC_MISSED, &h->flags);
	dsync_forget(h);
	get_random_bytes(h->uuid, sizeof(h->uuid));
	h->epoch = 1;
	h->invalid = false;
	h->reason[0] = '\0';
	return 0;
}

/* Called with h->lock held; all else is as the message's sender left it. */
static const struct dsync_msg {
	const char *name;
	unsigned int min, max;		/* words, with the name */
	int (*fn)(struct dsync *d, unsigned int argc, char **argv);
} dsync_messages[] = {
	{ "rotate",	2, 2,		dsync_msg_rotate },
	{ "ack",	2, 2,		dsync_msg_ack },
	{ "mark",	3, 3,		dsync_msg_mark },
	{ "invalidate",	2, UINT_MAX,	dsync_msg_invalidate },
	{ "rebase",	3, 3,		dsync_msg_rebase },
	{ "continue",	3, 3,		dsync_msg_continue },
	{ "restart",	1, 1,		dsync_msg_restart },
};

static int dsync_message(struct dm_target *ti, unsigned int argc, char **argv, char *result,
			 unsigned int maxlen)
{
	struct dsync *d = ti->private;
	const struct dsync_msg *m;
	int r;

	for (m = dsync_messages; m < dsync_messages + ARRAY_SIZE(dsync_messages); m++) {
		if (strcasecmp(argv[0], m->name))
			continue;
		if (argc < m->min || argc > m->max)
			return -EINVAL;
		mutex_lock(&d->history->lock);
		dsync_settle(d->history);
		r = m->fn(d, argc, argv);
		mutex_unlock(&d->history->lock);
		return r;
	}
	return -EINVAL;
}

/*
 * No prepare_ioctl: a command that is passed through to the device beneath (SG_IO,
 * NVMe) could write behind the bitmap's back. No direct_access and no report_zones:
 * DAX stores cannot be seen, zones are refused. A table holds this target alone, so
 * that no write to the device can pass beside it.
 */
static struct target_type dsync_target = {
	.name			= "dsync",
	.version		= { 1, 0, 0 },
	.features		= DM_TARGET_SINGLETON | DM_TARGET_NOWAIT |
				  DM_TARGET_PASSES_INTEGRITY | DM_TARGET_PASSES_CRYPTO,
	.module			= THIS_MODULE,
	.ctr			= dsync_ctr,
	.dtr			= dsync_dtr,
	.map			= dsync_map,
	.end_io			= dsync_end_io,
	.preresume		= dsync_preresume,
	.resume			= dsync_resume,
	.status			= dsync_status,
	.message		= dsync_message,
	.iterate_devices	= dsync_iterate_devices,
};

/*
 * The image of a hibernation is memory as it was before the machine's last writes, the
 * bitmaps with it. Before, so that the image knows; after, for histories that began
 * since.
 */
static int dsync_pm_notify(struct notifier_block *nb, unsigned long event, void *data)
{
	struct dsync_history *h;

	if (event != PM_HIBERNATION_PREPARE && event != PM_POST_HIBERNATION)
		return NOTIFY_DONE;
	mutex_lock(&dsync_lock);
	list_for_each_entry(h, &dsync_histories, list) {
		mutex_lock(&h->lock);
		dsync_invalidate(h, "the machine was hibernated");
		mutex_unlock(&h->lock);
	}
	mutex_unlock(&dsync_lock);
	return NOTIFY_OK;
}

static struct notifier_block dsync_pm_block = { .notifier_call = dsync_pm_notify };

static int __init dm_dsync_init(void)
{
	int r = -ENOMEM;

	dsync_root = proc_mkdir_mode("dsync", 0500, NULL);
	if (!dsync_root)
		return r;
	if (!proc_create_single("version", 0400, dsync_root, dsync_version_show))
		goto bad;
	r = register_pm_notifier(&dsync_pm_block);
	if (r)
		goto bad;
	r = dm_register_target(&dsync_target);
	if (r < 0)
		goto bad_target;
	return 0;

bad_target:
	unregister_pm_notifier(&dsync_pm_block);
bad:
	proc_remove(dsync_root);
	return r;
}

static void __exit dm_dsync_exit(void)
{
	/* no target is left, hence no history */
	dm_unregister_target(&dsync_target);
	unregister_pm_notifier(&dsync_pm_block);
	flush_work(&dsync_names_work);
	proc_remove(dsync_root);
}

module_init(dm_dsync_init);
module_exit(dm_dsync_exit);

MODULE_DESCRIPTION(DM_NAME " target that remembers which blocks were written");
MODULE_AUTHOR("The dsync-backup developers");
MODULE_LICENSE("GPL");
MODULE_VERSION(DSYNC_VERSION);
