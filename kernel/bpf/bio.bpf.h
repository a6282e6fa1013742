/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Submission of bios, and the part of dsync.bpf.c that is for disks which take
 * bios: their completion, and the exchange of device-mapper tables.
 */
#ifndef DSYNC_BIO_BPF_H
#define DSYNC_BIO_BPF_H

/* How deep the part of a part of a bio may lie. */
#define MAX_SPLITS 16
/* An entry is not judged by its bio's flags before it is so old, in ns. */
#define SETTLED_NS 1000000000ULL

/* Bit i: copy i of the completion runs on this CPU, or is interrupted there. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} running SEC(".maps");

/* How often the live table of a device-mapper device was replaced by another
 * one, by the device's diskseq. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1); /* set at load */
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u64);
	__type(value, __u64);
} swaps SEC(".maps");

/* Written by user space alone: the tables that it saw last. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct state);
} stack SEC(".maps");

/*
 * Drops an entry whose bio has ended unseen. The kernel sets this flag when a
 * bio is queued, and clears it when it completes: memory without it, or none at
 * all, is no bio in flight. The flag is set just after the bio was entered here.
 */
static long drop_if_ended(void *map, const __u64 *key, struct span *span, __u64 *now)
{
	const struct bio *bio = (const struct bio *)*key;
	unsigned short flags = 0;

	if (span->since + SETTLED_NS > *now)
		return 0;
	if (bpf_probe_read_kernel(&flags, sizeof(flags), &bio->bi_flags) ||
	    !(flags & traced_flag))
		bpf_map_delete_elem(map, key);
	return 0;
}

/* Enters a bio. One that is there has ended unseen, or another copy was here. */
__subprog int remember_bio(__u64 key, __u64 start, __u64 end)
{
	struct span span = { .start = start, .end = end }, *old;
	__u64 *flags;
	__u32 zero = 0;

	old = bpf_map_lookup_elem(&inflight, &key);
	if (old && old->start == start && old->end == end)
		return 0;
	span.since = bpf_ktime_get_ns();
	if (!bpf_map_update_elem(&inflight, &key, &span, BPF_ANY))
		return 0;
	/* Once is enough: past that the tracker is not reliable anyway. */
	flags = bpf_map_lookup_elem(&raised, &zero);
	if (!flags || *flags & F_INFLIGHT_FULL)
		return 0;
	bpf_for_each_map_elem(&inflight, drop_if_ended, &span.since, 0);
	if (bpf_map_update_elem(&inflight, &key, &span, BPF_ANY))
		raise(F_INFLIGHT_FULL);
	return 0;
}

__inline int on_bio_queue(struct bio *bio)
{
	__u32 op = bio->bi_opf & REQ_OP_MASK;
	__u64 start, end;

	if (!(op & 1) || op == REQ_OP_DRV_OUT || !is_ours(bio->bi_bdev->bd_disk))
		return 0;
	if (!is_known(op))
		raise(F_UNKNOWN_OP);
	start = bio->bi_iter.bi_sector;
	end = start + (((__u64)bio->bi_iter.bi_size + 511) >> SECTOR_SHIFT);
	/* A flush without data, too: then whatever completes has been entered. */
	if (takes_bios)
		remember_bio((__u64)bio, start, end);
	mark(start, end);
	return 0;
}

struct climb {
	__u64 bio;
	bool found;
};

static long climb_to_parent(__u32 i, struct climb *c)
{
	const struct bio *bio = (const struct bio *)c->bio;
	__u64 end_io = 0, parent = 0;

	if (bpf_probe_read_kernel(&end_io, sizeof(end_io), &bio->bi_end_io) || end_io != chain_endio ||
	    bpf_probe_read_kernel(&parent, sizeof(parent), &bio->bi_private))
		return 1;
	c->bio = parent;
	c->found = bpf_map_lookup_elem(&inflight, &parent) != (void *)0;
	return c->found;
}

/*
 * The part of a bio that was split is not queued of its own, but its completion
 * is traced. The bio that it is part of is in the table until all its parts have
 * completed.
 */
__subprog int is_part(__u64 bio)
{
	struct climb c = { .bio = bio };

	bpf_loop(MAX_SPLITS, climb_to_parent, &c, 0);
	return c.found;
}

/* True if every earlier copy was skipped at this event. */
__inline bool is_first(__u64 running, __u32 copy)
{
	__u64 earlier = (1 << copy) - 1;

	return (running & earlier) == earlier;
}

/*
 * What is left in bi_iter is not what was written: the remembered range counts.
 * The first copy that runs deals with the bio, which stays what it is until all
 * have run.
 */
__inline int end_bio(struct bio *bio, __u64 running, __u32 copy)
{
	__u64 key = (__u64)bio, *calm;
	__u32 zero = 0;
	struct span *was = bpf_map_lookup_elem(&inflight, &key);

	if (was) {
		mark(was->start, was->end);
		bpf_map_delete_elem(&inflight, &key);
		return 0;
	}
	if (!is_first(running, copy) || is_part(key))
		return 0;
	calm = bpf_map_lookup_elem(&settled, &zero);
	if (calm && *calm)
		raise(F_STRANGER);
	return 0;
}

__inline int on_bio_complete(struct bio *bio, __u32 copy)
{
	__u32 op = bio->bi_opf & REQ_OP_MASK, zero = 0;
	__u64 *here;

	if (!(op & 1) || op == REQ_OP_DRV_OUT || !is_ours(bio->bi_bdev->bd_disk))
		return 0;
	here = bpf_map_lookup_elem(&running, &zero);
	if (!here)
		return 0;
	*(volatile __u64 *)here |= 1 << copy;
	end_bio(bio, *(volatile __u64 *)here, copy);
	*(volatile __u64 *)here &= ~(1ULL << copy);
	return 0;
}

__inline void count_swap(struct mapped_device *md)
{
	__u64 seq = md->disk->diskseq, none = 0, *count;

	bpf_map_update_elem(&swaps, &seq, &none, BPF_NOEXIST);
	count = bpf_map_lookup_elem(&swaps, &seq);
	if (count)
		__sync_fetch_and_add(count, 1);
	else
		raise(F_SWAPS_FULL);
}

#endif
