/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The few kernel types, helpers and constants that dsync.bpf.c needs. Field
 * offsets are relocated at load time against the running kernel's BTF, so only
 * names and types matter here, not the layout.
 */
#ifndef DSYNC_KERNEL_BPF_H
#define DSYNC_KERNEL_BPF_H

typedef unsigned char __u8;
typedef unsigned int __u32;
typedef unsigned long long __u64;
typedef _Bool bool;

#define SEC(name) __attribute__((section(name), used))
#define __uint(name, val) int(*name)[val]
#define __type(name, val) typeof(val) *name
#define __array(name, val) typeof(val) *name[]
#define __inline static inline __attribute__((always_inline))
#define __subprog static __attribute__((noinline))
#define __core __attribute__((preserve_access_index))

/* enum bpf_map_type, enum bpf_map_update_elem_flags, BPF_MAP_CREATE flags */
#define BPF_MAP_TYPE_HASH 1
#define BPF_MAP_TYPE_ARRAY 2
#define BPF_MAP_TYPE_PERCPU_ARRAY 6
#define BPF_MAP_TYPE_ARRAY_OF_MAPS 12
#define BPF_ANY 0
#define BPF_NOEXIST 1
#define BPF_F_NO_PREALLOC (1U << 0)
#define BPF_F_MMAPABLE (1U << 10)

static void *(*bpf_map_lookup_elem)(void *map, const void *key) = (void *)1;
static long (*bpf_map_update_elem)(void *map, const void *key, const void *value,
				   __u64 flags) = (void *)2;
static long (*bpf_map_delete_elem)(void *map, const void *key) = (void *)3;
static long (*bpf_probe_read_kernel)(void *dst, __u32 size, const void *src) = (void *)113;
static __u64 (*bpf_ktime_get_ns)(void) = (void *)5;
static long (*bpf_for_each_map_elem)(void *map, void *fn, void *ctx, __u64 flags) = (void *)164;
static long (*bpf_loop)(__u32 n, void *fn, void *ctx, __u64 flags) = (void *)181;

/*
 * enum req_op. The numbers have been the same since Linux 4.10, and an
 * operation whose data goes to the device has an odd one: see op_is_write().
 */
#define REQ_OP_MASK 0xff
#define REQ_OP_WRITE 1
#define REQ_OP_DISCARD 3
#define REQ_OP_SECURE_ERASE 5
#define REQ_OP_WRITE_ZEROES 9
#define REQ_OP_DRV_OUT 35

#define PM_EVENT_HIBERNATE 4

struct gendisk {
	int major;
	int first_minor;
	__u64 diskseq;
} __core;

struct block_device {
	struct gendisk *bd_disk;
} __core;

struct bvec_iter {
	__u64 bi_sector;
	unsigned int bi_size;
} __core;

struct bio {
	struct bio *bi_next;
	struct block_device *bi_bdev;
	unsigned int bi_opf;
	unsigned short bi_flags;
	struct bvec_iter bi_iter;
	void *bi_end_io;
	void *bi_private;
} __core;

struct mapped_device {
	struct gendisk *disk;
} __core;

struct request_queue {
	struct gendisk *disk;
} __core;

struct request {
	struct request_queue *q;
	unsigned int cmd_flags;
	unsigned int __data_len;
	__u64 __sector;
	struct bio *bio;
} __core;

#endif
