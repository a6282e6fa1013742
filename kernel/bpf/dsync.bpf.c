//go:build ignore
// SPDX-License-Identifier: GPL-2.0-only
/*
 * Marks every 4 KiB block of one disk, or of a sector range of it, that may
 * have been written. See docs/tracking.md for why each step is sound.
 *
 * Of a disk whose driver takes requests, each write is marked three times: when
 * its bio is queued, when its request goes to the driver, and when it completes.
 * Between the last two it is also in the table of writes in flight, from which a
 * rotation carries it over into the new epoch. Of a disk that takes bios
 * (device-mapper) there are no requests: a bio is in the table from its
 * queueing to its completion. Either way device content changes only while a
 * write is in that table.
 */
#include "kernel.bpf.h"

#define SECTOR_SHIFT 9
#define BLOCK_SECTORS_SHIFT 3
#define WORD_SHIFT 6

/* A bio and a request hold at most 4 GiB (32-bit lengths): 2^14 words and one. */
#define MAX_WORDS ((1 << 14) + 2)
/* No driver merges more than a few hundred discards into one request. */
#define MAX_CHAIN (1 << 16)

#define COPIES 3
#define ALL_COPIES ((1 << COPIES) - 1)

/* Why the tracker cannot be relied on. Keep in step with reasons.go. */
#define F_NO_BITMAP (1 << 0)
#define F_INFLIGHT_FULL (1 << 1)
#define F_PASSTHROUGH (1 << 2)
#define F_UNKNOWN_OP (1 << 3)
#define F_STRANGER (1 << 4)
#define F_LONG_CHAIN (1 << 5)
#define F_REPLACED (1 << 6)
#define F_HIBERNATED (1 << 7)
#define F_SWAPS_FULL (1 << 8)

char LICENSE[] SEC("license") = "GPL";

/* What is tracked; constants of one load. */
const volatile __u32 disk_major;
const volatile __u32 disk_minor;
const volatile __u64 disk_seq;
const volatile __u64 start_sector;
const volatile __u64 end_sector;
const volatile bool takes_bios;
/* The address of bio_chain_endio(), by which the part of a split bio is known. */
const volatile __u64 chain_endio;
/* BIO_TRACE_COMPLETION in bi_flags, which has no name to be found by here. */
const volatile __u32 traced_flag;

struct bitmap {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1); /* words of 64 blocks; set at load */
	__type(key, __u32);
	__type(value, __u64);
};

struct bitmap bits0 SEC(".maps");
struct bitmap bits1 SEC(".maps");

/* The bitmap of the running epoch: bits0 or bits1. Replacing it is a rotation. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 1);
	__type(key, __u32);
	__array(values, struct bitmap);
} active SEC(".maps");

/* raised: F_…, written here only. settled: written by user space, which sets it
 * to 1 once no write from before the start is in flight. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} raised SEC(".maps"), settled SEC(".maps");

struct span {
	__u64 start; /* sectors on the disk */
	__u64 end;
	__u64 done; /* of a request. Bit i: copy i has seen the completion */
	__u64 since; /* of a bio: when it was queued, in ns */
};

/* Writes in flight, by the address of their request or bio. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1); /* set at load */
	__type(key, __u64);
	__type(value, struct span);
} inflight SEC(".maps");

/* Written by user space alone; here so that they are created and pinned with the rest. */
struct state {
	__u8 bytes[1024];
};
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct state);
} state SEC(".maps"), verdict SEC(".maps");

__subprog int raise(__u64 flag)
{
	__u32 zero = 0;
	__u64 *flags = bpf_map_lookup_elem(&raised, &zero);

	if (flags && !(*flags & flag))
		__sync_fetch_and_or(flags, flag);
	return 0;
}

__inline void mark_word(void *bits, __u32 word, __u64 mask)
{
	__u64 *p = bpf_map_lookup_elem(bits, &word);

	if (!p) {
		raise(F_NO_BITMAP);
		return;
	}
	/* Often marked already, by another copy or tracepoint: spare the lock. */
	if ((*(volatile __u64 *)p & mask) != mask)
		__sync_fetch_and_or(p, mask);
}

static long mark_full_word(__u32 i, __u32 *first)
{
	__u32 zero = 0;
	void *bits = bpf_map_lookup_elem(&active, &zero);

	if (!bits) {
		raise(F_NO_BITMAP);
		return 1;
	}
	mark_word(bits, *first + i, ~0ULL);
	return 0;
}

/* Marks what of the sectors from start up to end is tracked. */
__subprog int mark(__u64 start, __u64 end)
{
	__u64 first, last, head, tail;
	__u32 zero = 0, fw, lw, next, n;
	void *bits;

	if (start < start_sector)
		start = start_sector;
	if (end > end_sector)
		end = end_sector;
	if (start >= end)
		return 0;
	bits = bpf_map_lookup_elem(&active, &zero);
	if (!bits) {
		raise(F_NO_BITMAP);
		return 0;
	}
	first = (start - start_sector) >> BLOCK_SECTORS_SHIFT;
	last = (end - 1 - start_sector) >> BLOCK_SECTORS_SHIFT;
	head = ~0ULL << (first & 63);
	tail = ~0ULL >> (63 - (last & 63));
	fw = first >> WORD_SHIFT;
	lw = last >> WORD_SHIFT;
	if (fw == lw) {
		mark_word(bits, fw, head & tail);
		return 0;
	}
	mark_word(bits, fw, head);
	mark_word(bits, lw, tail);
	n = lw - fw - 1;
	if (n == 0)
		return 0;
	next = fw + 1;
	if (n > MAX_WORDS || bpf_loop(n, mark_full_word, &next, 0) != n)
		raise(F_NO_BITMAP);
	return 0;
}

__inline bool tracked(__u64 start, __u64 end)
{
	return start < end_sector && end > start_sector && start < end;
}

__inline bool is_ours(struct gendisk *disk)
{
	if (!disk || disk->major != disk_major || disk->first_minor != disk_minor)
		return 0;
	if (disk->diskseq != disk_seq)
		raise(F_REPLACED);
	return 1;
}

__inline bool is_known(__u32 op)
{
	return op == REQ_OP_WRITE || op == REQ_OP_DISCARD || op == REQ_OP_WRITE_ZEROES ||
	       op == REQ_OP_SECURE_ERASE;
}

struct walk {
	__u64 bio;
	struct span span;
};

static long walk_bio(__u32 i, struct walk *w)
{
	struct bio *bio = (struct bio *)w->bio;
	__u64 start = 0, end, next = 0;
	__u32 size = 0;

	if (!bio)
		return 1;
	if (bpf_probe_read_kernel(&start, sizeof(start), &bio->bi_iter.bi_sector) ||
	    bpf_probe_read_kernel(&size, sizeof(size), &bio->bi_iter.bi_size) ||
	    bpf_probe_read_kernel(&next, sizeof(next), &bio->bi_next)) {
		raise(F_LONG_CHAIN);
		return 1;
	}
	w->bio = next;
	end = start + (((__u64)size + 511) >> SECTOR_SHIFT);
	mark(start, end);
	if (!tracked(start, end))
		return 0;
	if (start < w->span.start)
		w->span.start = start;
	if (end > w->span.end)
		w->span.end = end;
	return 0;
}

/*
 * Marks what a request writes, and tells the span of it. A request of the
 * ordinary kind is one range; merged discards need not be adjacent.
 */
__inline void mark_request(struct request *rq, __u32 op, struct span *span)
{
	span->done = 0;
	if (op == REQ_OP_DISCARD || op == REQ_OP_SECURE_ERASE) {
		struct walk w = { .bio = (__u64)rq->bio, .span = { .start = ~0ULL } };

		bpf_loop(MAX_CHAIN, walk_bio, &w, 0);
		if (w.bio)
			raise(F_LONG_CHAIN);
		span->start = w.span.start;
		span->end = w.span.end;
		return;
	}
	span->start = rq->__sector;
	span->end = span->start + (((__u64)rq->__data_len + 511) >> SECTOR_SHIFT);
	mark(span->start, span->end);
}

/* False if the request is none of ours, or has been dealt with. */
__inline bool is_write_of_ours(struct request *rq, __u32 op)
{
	/* Even operations bring data in or move none: reads, flushes, inquiries. */
	if (!(op & 1))
		return 0;
	if (!is_ours(rq->q->disk))
		return 0;
	if (op == REQ_OP_DRV_OUT) {
		raise(F_PASSTHROUGH);
		return 0;
	}
	if (!is_known(op))
		raise(F_UNKNOWN_OP);
	return 1;
}

#include "bio.bpf.h"

__inline int on_issue(struct request *rq)
{
	__u32 op = rq->cmd_flags & REQ_OP_MASK;
	struct span span = {}, *old;
	__u64 key = (__u64)rq;

	if (!is_write_of_ours(rq, op))
		return 0;
	mark_request(rq, op, &span);
	if (!tracked(span.start, span.end))
		return 0;
	old = bpf_map_lookup_elem(&inflight, &key);
	if (old && !old->done && old->start == span.start && old->end == span.end)
		return 0; /* another copy was here */
	if (bpf_map_update_elem(&inflight, &key, &span, BPF_ANY))
		raise(F_INFLIGHT_FULL);
	return 0;
}

/*
 * nr_bytes may be less than the request holds: the rest is issued again. The
 * tracepoint fires before the bios advance, so that the range read here is
 * everything that had not yet completed.
 */
__inline int on_complete(struct request *rq, __u32 error, __u32 nr_bytes, __u32 copy)
{
	__u32 op = rq->cmd_flags & REQ_OP_MASK, zero = 0;
	__u64 key = (__u64)rq;
	struct span span = {}, *was;
	__u64 *calm;

	if (!is_write_of_ours(rq, op))
		return 0;
	mark_request(rq, op, &span);
	was = bpf_map_lookup_elem(&inflight, &key);
	if (!was || was->done & (1 << copy)) {
		/*
		 * Issued before the start, or unseen: then something is missed.
		 * (An entry that this copy is done with is of an earlier write:
		 * another copy was skipped when that completed.)
		 */
		calm = bpf_map_lookup_elem(&settled, &zero);
		if (calm && *calm && !error && tracked(span.start, span.end))
			raise(F_STRANGER);
		return 0;
	}
	if (nr_bytes < rq->__data_len)
		return 0;
	was->done |= 1 << copy;
	if (was->done == ALL_COPIES)
		bpf_map_delete_elem(&inflight, &key);
	return 0;
}

/*
 * The kernel skips a program that interrupts itself on a CPU. Three copies
 * leave one that runs: a task and a softirq can occupy two of them when a
 * hardirq comes.
 */
#define THREE_COPIES(name, tracepoint, call0, call1, call2)                        \
	SEC("tp_btf/" tracepoint) int name##_0(__u64 *ctx) { return call0; } \
	SEC("tp_btf/" tracepoint) int name##_1(__u64 *ctx) { return call1; } \
	SEC("tp_btf/" tracepoint) int name##_2(__u64 *ctx) { return call2; }

#define QUEUE on_bio_queue((struct bio *)ctx[0])
#define BIO_COMPLETE(copy) on_bio_complete((struct bio *)ctx[1], copy)
#define ISSUE on_issue((struct request *)ctx[0])
#define COMPLETE(copy) on_complete((struct request *)ctx[0], ctx[1], ctx[2], copy)

THREE_COPIES(bio_queue, "block_bio_queue", QUEUE, QUEUE, QUEUE)
THREE_COPIES(bio_complete, "block_bio_complete", BIO_COMPLETE(0), BIO_COMPLETE(1), BIO_COMPLETE(2))
THREE_COPIES(rq_issue, "block_rq_issue", ISSUE, ISSUE, ISSUE)
THREE_COPIES(rq_complete, "block_rq_complete", COMPLETE(0), COMPLETE(1), COMPLETE(2))

/*
 * The image of a hibernation is a copy of memory, and with it of the bitmap,
 * from before the machine's last writes.
 */
SEC("tp_btf/suspend_resume") int hibernate(__u64 *ctx)
{
	if ((__u32)ctx[1] == PM_EVENT_HIBERNATE)
		raise(F_HIBERNATED);
	return 0;
}

/* A table that is put in place where there was none changes nothing. */
SEC("fexit/dm_swap_table") int table_swap(__u64 *ctx)
{
	if (ctx[2])
		count_swap((struct mapped_device *)ctx[0]);
	return 0;
}
