/* A migration target with known memory.
 *
 *     victim [--seed N] [--dir D] [--report FILE] [--no-stdin] [--alone] [--max-seconds N]
 *            FEATURE[=ARG]...
 *
 * The content of every verified page is a function of (seed, region, page, version). Each region has a
 * model with the versions, from which a check recomputes its pages. Model and page change together under
 * one lock, so that a check is correct while other threads write. The root controls its children over
 * pipes, with one reply for each command, and answers for the whole tree; a child in strict seccomp mode
 * can do no more than that.
 *
 * `features` below lists the features, `run_command` the commands. SIGUSR1 checks the tree and appends the
 * answer to the report file, which also works for a restored copy, which has no stdin.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <linux/filter.h>
#include <linux/futex.h>
#include <linux/seccomp.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#ifndef MADV_GUARD_INSTALL
#define MADV_GUARD_INSTALL 102
#endif
#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4
#endif
#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid
#endif

enum {
	PAGE = 4096,
	WORDS = PAGE / 8,
	LINE = 64,
	HUGE = 2 << 20,
	MAX_REGIONS = 96,
	MAX_KIDS = 64,
	MAX_AUX = 16,
	BATCH = 256, /* pages that a check reads before it releases the lock */
	TICK_MS = 10,
	STRIPE = 16, /* adjacent pages of a shared region that belong to the same process */
	STEPS = 1 << 20, /* length of a history */
};

/* ---- Random bits ---- */

static uint64_t mix(uint64_t z)
{
	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
	return z ^ (z >> 31);
}

static uint64_t next(uint64_t *state)
{
	return mix(*state += 0x9e3779b97f4a7c15u);
}

static uint64_t gcd(uint64_t a, uint64_t b)
{
	while (b) {
		uint64_t rest = a % b;
		a = b;
		b = rest;
	}
	return a;
}

/* ---- Regions and their model ---- */

enum content { RANDOM, TEXT, ZERO };

/* Content of a page: version 0 was never written (zeros). Each patch changes one more line of 64 bytes, in
 * turn. */
struct version {
	uint32_t version, patch;
};

static const uint32_t GUARD = UINT32_MAX; /* must not be touched */

struct model {
	pthread_mutex_t lock; /* of a shared region; g.lock protects private ones */
	struct version page[];
};

struct region {
	const char *kind;
	uint32_t id;
	enum content content;
	uint8_t *addr; /* NULL: accessible through fd only */
	size_t pages, capacity;
	struct model *model;
	ino_t inode;
	int fd, prot;
	unsigned stride, gap; /* written: page % stride == 0 (if stride), page % gap != 0 (if gap) */
	bool shared, plain;   /* plain: private, anonymous, read-write, may move */
	bool wipe, keep_out;  /* MADV_WIPEONFORK, MADV_DONTFORK */
	bool huge, by_write;  /* by_write: odd pages are written with pwrite */
};

struct kid {
	pid_t pid;
	int in, out; /* commands to it, and replies from it */
};

/* Shared by the whole tree. */
struct board {
	_Atomic uint64_t errors;
	_Atomic uint64_t interrupted; /* EINTR from calls that a plain stop restarts (CRIU does not) */
	_Atomic uint64_t eintr;       /* EINTR that signal(7) allows after a stop */
	_Atomic uint32_t slots;       /* number of processes so far: the next ID */
	_Atomic bool first_taken;
	char first[240];
};

static struct {
	uint64_t seed, rng;
	pid_t pid; /* stored, because strict seccomp forbids getpid */
	uint32_t slot, next_id;
	struct region region[MAX_REGIONS];
	size_t regions;
	pthread_mutex_t lock;
	bool writing; /* under lock */
	struct kid kid[MAX_KIDS];
	size_t kids;
	pid_t aux[MAX_AUX]; /* children that take no commands */
	size_t auxes;
	double dirty;
	uint64_t dirty64;
	bool chaos, boxed, history;
	_Atomic uint32_t steps; /* of its history that are done */
	int grandchildren;
	int up_in, up_out;
	struct board *board;
	char **argv;
	const char *dir, *report;
	bool no_stdin, alone;
	unsigned max_seconds;
	char unlink[8][256];
	size_t unlinks;
} g = {
	.seed = 1,
	.lock = PTHREAD_MUTEX_INITIALIZER,
	.writing = true,
	.up_in = -1,
	.up_out = -1,
	.max_seconds = 600,
};

static void write_all(int fd, const char *text, size_t length)
{
	while (length) {
		ssize_t n = write(fd, text, length);
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return;
		text += n;
		length -= (size_t)n;
	}
}

static void append_report(const char *text, size_t length)
{
	int fd = open(g.report, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0644);
	if (fd >= 0) {
		write_all(fd, text, length); /* one write: lines of several processes do not mix */
		close(fd);
	}
}

static size_t format(char *out, size_t room, const char *pattern, va_list arguments)
{
	int n = vsnprintf(out, room - 1, pattern, arguments);
	size_t length = n < 0 ? 0 : (size_t)n < room - 1 ? (size_t)n : room - 2;
	out[length] = '\n';
	return length + 1;
}

__attribute__((format(printf, 1, 2))) static void answer(const char *pattern, ...)
{
	char line[512];
	va_list arguments;
	va_start(arguments, pattern);
	size_t length = format(line, sizeof line, pattern, arguments);
	va_end(arguments);
	if (g.no_stdin && g.report)
		append_report(line, length);
	else
		write_all(STDOUT_FILENO, line, length);
}

__attribute__((format(printf, 1, 2))) static void error(const char *pattern, ...)
{
	char line[240];
	int head = snprintf(line, sizeof line, "ERROR pid=%d ", g.pid);
	va_list arguments;
	va_start(arguments, pattern);
	size_t length = (size_t)head;
	length += format(line + head, sizeof line - (size_t)head, pattern, arguments);
	va_end(arguments);
	if (!atomic_exchange(&g.board->first_taken, true)) {
		memcpy(g.board->first, line, length - 1);
		g.board->first[length - 1] = 0;
	}
	atomic_fetch_add(&g.board->errors, 1);
	if (g.no_stdin && g.report)
		append_report(line, length);
	else
		write_all(STDERR_FILENO, line, length);
}

__attribute__((noreturn, format(printf, 1, 2))) static void die(const char *pattern, ...)
{
	va_list arguments;
	va_start(arguments, pattern);
	vdprintf(STDERR_FILENO, pattern, arguments);
	va_end(arguments);
	dprintf(STDERR_FILENO, ": %s\n", strerror(errno));
	_exit(1);
}

static void fill(enum content content, uint64_t key, uint64_t *out)
{
	static const char words[8][9] = {"ferry   ", "harbour ", "anchor  ", "tide    ",
					 "cargo   ", "deck    ", "lantern ", "north \n "};
	for (size_t i = 0; i < WORDS; i++) {
		uint64_t bits = mix(key + i * 0x9e3779b97f4a7c15u);
		if (content == TEXT)
			memcpy(&out[i], words[bits % 8], 8);
		else
			out[i] = bits;
	}
	out[0] = key; /* makes every version different */
}

static uint64_t page_key(const struct region *r, size_t page, struct version v)
{
	uint64_t key = mix(g.seed ^ (uint64_t)r->id << 32);
	return mix(mix(key ^ page) ^ v.version);
}

static void fill_line(uint64_t key, uint32_t patch, uint64_t *out)
{
	for (size_t i = 0; i < LINE / 8; i++)
		out[i] = mix(key + ((uint64_t)patch << 8 | i) * 0xd1342543de82ef95u);
}

static void expected(const struct region *r, size_t page, struct version v, uint64_t *out)
{
	uint64_t key = page_key(r, page, v);
	/* Alternates between zero pages (odd versions) and others (even versions). */
	if (v.version == 0 || (r->content == ZERO && v.version % 2))
		memset(out, 0, PAGE);
	else
		fill(r->content, key, out);
	uint32_t lines = PAGE / LINE, first = v.patch > lines ? v.patch - lines + 1 : 1;
	for (uint32_t patch = first; patch <= v.patch; patch++)
		fill_line(key, patch, out + patch % lines * (LINE / 8));
}

/* A busy thread would reacquire its lock at once; with a queue, waiting threads come first. */
static _Atomic int queued;

static void queue_for(pthread_mutex_t *mutex)
{
	atomic_fetch_add(&queued, 1);
	pthread_mutex_lock(mutex);
	atomic_fetch_sub(&queued, 1);
}

static void give_way(pthread_mutex_t *mutex)
{
	pthread_mutex_unlock(mutex);
	while (atomic_load(&queued))
		sched_yield();
	pthread_mutex_lock(mutex);
}

static void lock(struct region *r)
{
	queue_for(r->shared ? &r->model->lock : &g.lock);
}

static void unlock(struct region *r)
{
	pthread_mutex_unlock(r->shared ? &r->model->lock : &g.lock);
}

static bool readable(const struct region *r)
{
	return r->prot & PROT_READ;
}

/* Writes a page according to its model. The caller holds the lock. */
static void put(struct region *r, size_t page)
{
	struct version v = r->model->page[page];
	uint8_t *at = r->addr ? r->addr + page * PAGE : NULL;
	if (!at || (r->by_write && page % 2)) {
		uint64_t buffer[WORDS];
		expected(r, page, v, buffer);
		if (pwrite(r->fd, buffer, PAGE, (off_t)(page * PAGE)) != PAGE)
			error("pwrite %s page %zu: %s", r->kind, page, strerror(errno));
		return;
	}
	bool closed = !(r->prot & PROT_WRITE);
	if (closed && mprotect(at, PAGE, PROT_READ | PROT_WRITE))
		error("mprotect %s page %zu: %s", r->kind, page, strerror(errno));
	expected(r, page, v, (uint64_t *)at);
	if (closed)
		mprotect(at, PAGE, r->prot);
}

static bool may_write(const struct region *r, size_t page)
{
	return r->model->page[page].version != GUARD && !(r->stride && page % r->stride) &&
	       !(r->gap && page % r->gap == 0) &&
	       /* In a shared region the root writes anywhere, other processes in their own stripes. */
	       !(r->shared && g.slot && page / STRIPE % 8 != g.slot % 8);
}

static void bump(struct region *r, size_t page)
{
	struct version *v = &r->model->page[page];
	v->version++;
	v->patch = 0;
	put(r, page);
}

static void patch(struct region *r, size_t page)
{
	struct version *v = &r->model->page[page];
	if (!r->plain || v->patch == UINT32_MAX) {
		bump(r, page);
		return;
	}
	v->patch++;
	uint64_t line[LINE / 8];
	fill_line(page_key(r, page, *v), v->patch, line);
	memcpy(r->addr + page * PAGE + v->patch % (PAGE / LINE) * LINE, line, LINE);
}

/* Resets a page, as if it had never been written. */
static bool discard(struct region *r, size_t page)
{
	if (!r->addr || r->huge || !(r->plain || r->shared))
		return false;
	if (madvise(r->addr + page * PAGE, PAGE, r->shared ? MADV_REMOVE : MADV_DONTNEED))
		return false;
	r->model->page[page] = (struct version){0};
	return true;
}

static size_t total_pages(bool heap_only)
{
	size_t total = 0;
	for (size_t i = 0; i < g.regions; i++)
		if (!heap_only || !strcmp(g.region[i].kind, "heap"))
			total += g.region[i].pages;
	return total;
}

static struct region *locate(bool heap_only, size_t *page)
{
	for (size_t i = 0; i < g.regions; i++) {
		struct region *r = &g.region[i];
		if (heap_only && strcmp(r->kind, "heap"))
			continue;
		if (*page < r->pages)
			return r;
		*page -= r->pages;
	}
	return NULL;
}

/* Changes `wanted` different pages, or all pages if there are fewer: a walk with a stride coprime to their
 * number visits each once. */
static uint64_t change(uint64_t wanted, bool to_nothing)
{
	size_t total = total_pages(false), changed = 0;
	if (!total)
		return 0;
	uint64_t stride, at = next(&g.rng) % total;
	do
		stride = next(&g.rng) % total + 1;
	while (gcd(stride, total) != 1);
	for (size_t i = 0; i < total && changed < wanted; i++, at = (at + stride) % total) {
		size_t page = at;
		struct region *r = locate(false, &page);
		lock(r);
		if (may_write(r, page)) {
			if (!to_nothing)
				bump(r, page);
			changed += to_nothing ? discard(r, page) : true;
		}
		unlock(r);
	}
	return changed;
}

struct reply {
	uint64_t pages, mismatches;
	char first[160];
};

static void mismatch(struct reply *reply, const struct region *r, size_t page, size_t offset)
{
	if (!reply->mismatches++)
		snprintf(reply->first, sizeof reply->first,
			 "pid=%d region=%s/%x page=%zu address=%p offset=%zu version=%u.%u", g.pid, r->kind,
			 r->id, page, r->addr ? (void *)(r->addr + page * PAGE) : NULL, offset,
			 r->model->page[page].version, r->model->page[page].patch);
}

/* Returns whether a check may read a page that was never written. Reading such a page of a shared object would
 * allocate it, and a huge sparse mapping would get all its page tables. */
static bool look_at_hole(const struct region *r, size_t page)
{
	return !r->shared && r->stride != 2 && (r->stride != 7 || page % 64 == 3);
}

/* An access to a guard region is a fault, which a system call reports. */
static int guard_pipe[2];

static bool is_guarded(const void *at)
{
	char byte;
	if (write(guard_pipe[1], at, 1) == 1) {
		(void)!read(guard_pipe[0], &byte, 1);
		return false;
	}
	return errno == EFAULT;
}

static void check_region(struct region *r, struct reply *reply)
{
	uint64_t want[WORDS], got[WORDS];
	for (size_t page = 0; page < r->pages;) {
		lock(r);
		bool opened = r->addr && !readable(r);
		if (opened)
			mprotect(r->addr, r->pages * PAGE, PROT_READ);
		for (size_t n = 0; n < BATCH && page < r->pages; n++, page++) {
			struct version v = r->model->page[page];
			if (v.version == GUARD && !is_guarded(r->addr + page * PAGE))
				mismatch(reply, r, page, 0);
			if (v.version == GUARD || (!v.version && !v.patch && !look_at_hole(r, page)))
				continue;
			const void *at = r->addr ? r->addr + page * PAGE : (void *)got;
			if (!r->addr && pread(r->fd, got, PAGE, (off_t)(page * PAGE)) != PAGE)
				memset(got, 0xee, PAGE);
			expected(r, page, v, want);
			reply->pages++;
			if (memcmp(at, want, PAGE)) {
				size_t offset = 0;
				while (((const uint8_t *)at)[offset] == ((uint8_t *)want)[offset])
					offset++;
				mismatch(reply, r, page, offset);
			}
		}
		if (opened)
			mprotect(r->addr, r->pages * PAGE, r->prot);
		unlock(r);
	}
}

/* ---- Creating regions ---- */

static void *map(size_t bytes, int flags, int fd)
{
	void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, flags, fd, 0);
	return at == MAP_FAILED ? NULL : at;
}

static ino_t inode_at(const void *addr)
{
	FILE *maps = fopen("/proc/self/maps", "re");
	char line[512];
	unsigned long start, inode;
	ino_t found = 0;
	while (maps && fgets(line, sizeof line, maps))
		if (sscanf(line, "%lx-%*x %*s %*x %*s %lu", &start, &inode) == 2 && start == (uintptr_t)addr)
			found = inode;
	if (maps)
		fclose(maps);
	return found;
}

static struct region *add(const char *kind, void *addr, size_t pages, bool shared)
{
	if (g.regions == MAX_REGIONS)
		die("too many regions");
	struct region *r = &g.region[g.regions];
	*r = (struct region){
		.kind = kind,
		.id = g.slot << 16 | ++g.next_id,
		.addr = addr,
		.pages = pages,
		.capacity = pages * 4,
		.fd = -1,
		.prot = PROT_READ | PROT_WRITE,
		.shared = shared,
	};
	r->model = map(sizeof *r->model + r->capacity * sizeof(struct version),
		       MAP_ANONYMOUS | MAP_NORESERVE | (shared ? MAP_SHARED : MAP_PRIVATE), -1);
	if (!r->model)
		die("model of %s", kind);
	if (shared) {
		pthread_mutexattr_t attributes;
		pthread_mutexattr_init(&attributes);
		pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
		pthread_mutex_init(&r->model->lock, &attributes);
	}
	return r;
}

/* Writes the pages of a new region, and adds it to the list. */
static void publish(struct region *r)
{
	for (size_t page = 0; page < r->pages; page++)
		if (r->model->page[page].version == 0 && !(r->stride && page % r->stride) &&
		    !(r->gap && page % r->gap == 0)) {
			r->model->page[page].version = 1;
			put(r, page);
		}
	pthread_mutex_lock(&g.lock);
	g.regions++;
	pthread_mutex_unlock(&g.lock);
}

static struct region *add_plain(const char *kind, size_t bytes)
{
	void *at = map(bytes, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1);
	if (!at)
		die("%s of %zu bytes", kind, bytes);
	struct region *r = add(kind, at, bytes / PAGE, false);
	r->plain = true;
	return r;
}

static void skip(const char *what)
{
	answer("skip %s: %s", what, strerror(errno));
}

static const char *temporary(void)
{
	if (g.unlinks == 8)
		die("too many files");
	char *path = g.unlink[g.unlinks++];
	const char *dir = g.dir ? g.dir : getenv("TMPDIR");
	snprintf(path, sizeof g.unlink[0], "%s/victim-%d-%zu", dir ? dir : "/tmp", getpid(), g.unlinks);
	return path;
}

static size_t bytes_of(const char *arg)
{
	char *end;
	unsigned long long n = strtoull(arg ? arg : "1", &end, 0);
	return (size_t)(n << (*end == 'K' ? 10 : *end == 'G' ? 30 : 20));
}

static int count_of(const char *arg)
{
	return arg ? atoi(arg) : 1;
}

static void f_heap(const char *a) { publish(add_plain("heap", bytes_of(a))); }

static void f_text(const char *a)
{
	struct region *r = add_plain("text", bytes_of(a));
	r->content = TEXT;
	publish(r);
}

static void f_zero(const char *a)
{
	struct region *r = add_plain("zero", bytes_of(a));
	r->content = ZERO;
	publish(r);
}

static void f_sparse(const char *a)
{
	struct region *r = add_plain("sparse", bytes_of(a));
	r->stride = 7;
	publish(r);
}

/* One mapping for each page: adjacent ones differ, or the kernel would merge them. */
static void f_mappings(const char *a)
{
	struct region *r = add_plain("mappings", (size_t)count_of(a) * PAGE);
	r->stride = 2;
	r->plain = false;
	publish(r);
	for (size_t page = 1; page < r->pages; page += 2)
		if (mprotect(r->addr + page * PAGE, PAGE, PROT_NONE))
			die("mappings");
}

/* Shared segments of one page each, more than the maximum number of regions: not checked, only compared. */
static void f_segments(const char *a)
{
	for (int i = 0; i < count_of(a); i++) {
		uint64_t *at = map(PAGE, MAP_SHARED | MAP_ANONYMOUS, -1);
		if (!at)
			die("segments");
		fill(RANDOM, mix(g.seed + (uint64_t)i), at);
	}
}

static void f_readzero(const char *a)
{
	struct region *r = add_plain("readzero", bytes_of(a));
	r->stride = 64; /* may be written later */
	for (size_t page = 0; page < r->pages; page++)
		if (((volatile uint8_t *)r->addr)[page * PAGE])
			error("fresh page %zu is not zero", page);
	pthread_mutex_lock(&g.lock);
	g.regions++;
	pthread_mutex_unlock(&g.lock);
}

static void advised(const char *kind, const char *a, int advice)
{
	size_t bytes = bytes_of(a);
	uint8_t *at = map(bytes + HUGE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1);
	if (!at)
		die("%s of %zu bytes", kind, bytes);
	uint8_t *aligned = (uint8_t *)(((uintptr_t)at + HUGE - 1) & ~(uintptr_t)(HUGE - 1));
	if (aligned > at)
		munmap(at, (size_t)(aligned - at));
	if (at + HUGE > aligned)
		munmap(aligned + bytes, (size_t)(at + HUGE - aligned));
	struct region *r = add(kind, aligned, bytes / PAGE, false);
	r->plain = true;
	r->wipe = advice == MADV_WIPEONFORK;
	r->keep_out = advice == MADV_DONTFORK;
	if (madvise(aligned, bytes, advice))
		skip(kind);
	publish(r);
}

static void f_thp(const char *a) { advised("thp", a, MADV_HUGEPAGE); }
static void f_wipeonfork(const char *a) { advised("wipeonfork", a, MADV_WIPEONFORK); }
static void f_dontfork(const char *a) { advised("dontfork", a, MADV_DONTFORK); }
static void f_dontdump(const char *a) { advised("dontdump", a, MADV_DONTDUMP); }
static void f_mergeable(const char *a) { advised("mergeable", a, MADV_MERGEABLE); }

static struct region *huge(const char *kind, const char *a, bool shared)
{
	size_t bytes = (size_t)count_of(a) * HUGE;
	void *at = map(bytes, MAP_ANONYMOUS | MAP_HUGETLB | (shared ? MAP_SHARED : MAP_PRIVATE), -1);
	if (!at) {
		skip(kind);
		return NULL;
	}
	struct region *r = add(kind, at, bytes / PAGE, shared);
	r->huge = true;
	r->keep_out = !shared; /* a child that cannot get its copy would be killed */
	r->inode = shared ? inode_at(at) : 0;
	publish(r);
	return r;
}

static void f_hugetlb(const char *a) { huge("hugetlb", a, false); }
static void f_hugeshared(const char *a) { huge("hugeshared", a, true); }

static void f_hugefork(const char *a)
{
	struct region *r = huge("hugefork", a, false);
	if (r) {
		r->keep_out = false;
		r->gap = 1; /* nothing is written again, so no child needs a copy */
	}
}

static void f_shared(const char *a)
{
	size_t bytes = bytes_of(a);
	void *at = map(bytes, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1);
	if (!at)
		die("shared");
	struct region *r = add("shared", at, bytes / PAGE, true);
	r->inode = inode_at(at);
	publish(r);
}

static void memfd(const char *kind, const char *a, bool mapped)
{
	size_t bytes = bytes_of(a);
	int fd = memfd_create(kind, MFD_CLOEXEC);
	if (fd < 0 || ftruncate(fd, (off_t)bytes))
		die("%s", kind);
	void *at = mapped ? map(bytes, MAP_SHARED, fd) : NULL;
	if (mapped && !at)
		die("%s", kind);
	struct region *r = add(kind, at, bytes / PAGE, true);
	struct stat status;
	fstat(fd, &status);
	r->fd = fd;
	r->inode = status.st_ino;
	r->gap = 5;
	r->by_write = true;
	publish(r);
}

static void f_memfd(const char *a) { memfd("memfd", a, true); }
static void f_memfd_unmapped(const char *a) { memfd("memfd_unmapped", a, false); }

static void f_sysv(const char *a)
{
	size_t bytes = bytes_of(a);
	int id = shmget(IPC_PRIVATE, bytes, IPC_CREAT | 0600);
	void *at = id < 0 ? (void *)-1 : shmat(id, NULL, 0);
	if (id >= 0)
		shmctl(id, IPC_RMID, NULL); /* exists while attached, and never leaks */
	if (at == (void *)-1) {
		skip("sysv");
		return;
	}
	struct region *r = add("sysv", at, bytes / PAGE, true);
	r->inode = inode_at(at);
	publish(r);
}

static void file(const char *kind, const char *a, bool shared)
{
	size_t bytes = bytes_of(a);
	const char *path = temporary();
	int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	if (fd < 0 || ftruncate(fd, (off_t)bytes))
		die("%s", path);
	struct region *r = add(kind, NULL, bytes / PAGE, shared);
	struct stat status;
	fstat(fd, &status);
	r->fd = fd;
	r->inode = status.st_ino;
	publish(r); /* through the descriptor: the file contains version 1 now */
	r->addr = map(bytes, shared ? MAP_SHARED : MAP_PRIVATE, fd);
	if (!r->addr)
		die("%s", path);
	close(fd);
	r->fd = -1;
	if (!shared)
		r->stride = 3; /* the others remain pages of the file */
	for (size_t page = 0; page < r->pages; page += 3)
		bump(r, page);
}

static void f_fileprivate(const char *a) { file("fileprivate", a, false); }
static void f_fileshared(const char *a) { file("fileshared", a, true); }

static void protected(const char *kind, const char *a, int prot)
{
	struct region *r = add_plain(kind, bytes_of(a));
	r->plain = false;
	publish(r);
	if (mprotect(r->addr, r->pages * PAGE, prot))
		die("%s", kind);
	r->prot = prot;
}

static void f_protnone(const char *a) { protected("protnone", a, PROT_NONE); }
static void f_readonly(const char *a) { protected("readonly", a, PROT_READ); }
static void f_code(const char *a) { protected("code", a, PROT_READ | PROT_EXEC); }

static void f_guard(const char *a)
{
	struct region *r = add_plain("guard", bytes_of(a));
	r->plain = false;
	if (pipe2(guard_pipe, O_CLOEXEC))
		die("guard");
	for (size_t page = 5; page < r->pages; page += 8) {
		if (madvise(r->addr + page * PAGE, PAGE, MADV_GUARD_INSTALL)) {
			skip("guard");
			break;
		}
		r->model->page[page].version = GUARD;
	}
	publish(r);
}

static void f_mlock(const char *a)
{
	struct region *r = add_plain("mlock", bytes_of(a));
	r->plain = false; /* locked pages cannot be discarded */
	publish(r);
	if (mlock(r->addr, r->pages * PAGE))
		skip("mlock");
}

/* Memory for whose missing pages the process itself has a userfaultfd; none is missing. */
static void f_uffd(const char *a)
{
	struct region *r = add_plain("uffd", bytes_of(a));
	r->plain = false;
	publish(r);
	struct uffdio_api api = {.api = UFFD_API};
	struct uffdio_register missing = {
		.range = {(uintptr_t)r->addr, r->pages * PAGE},
		.mode = UFFDIO_REGISTER_MODE_MISSING,
	};
	int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	if (fd < 0 || ioctl(fd, UFFDIO_API, &api) || ioctl(fd, UFFDIO_REGISTER, &missing))
		skip("uffd");
}

static void f_brk(const char *a)
{
	size_t bytes = bytes_of(a);
	uintptr_t end = (uintptr_t)sbrk(0);
	sbrk((intptr_t)(-end & (PAGE - 1)));
	void *at = sbrk((intptr_t)bytes);
	if (at == (void *)-1)
		die("brk");
	publish(add("brk", at, bytes / PAGE, false));
}

static _Alignas(PAGE) uint8_t static_bss[64 * PAGE];
static _Alignas(PAGE) uint8_t static_data[16 * PAGE] = {1};

static void f_static(const char *a)
{
	(void)a;
	publish(add("bss", static_bss, sizeof static_bss / PAGE, false));
	publish(add("data", static_data, sizeof static_data / PAGE, false));
}

static void f_lock(const char *a)
{
	(void)a;
	int fd = open(temporary(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	struct flock whole = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
	if (fd < 0 || fcntl(fd, F_SETLK, &whole))
		die("lock");
}

/* ---- Threads ---- */

static void start(void *(*run)(void *), void *argument, const char *name)
{
	sigset_t all, old;
	pthread_t thread;
	sigfillset(&all);
	pthread_sigmask(SIG_BLOCK, &all, &old); /* signals go to the main thread unless unblocked */
	errno = pthread_create(&thread, NULL, run, argument);
	if (errno)
		die("thread %s", name);
	pthread_setname_np(thread, name);
	pthread_detach(thread);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
}

static int64_t now_us(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000LL + t.tv_nsec / 1000;
}

static void *dirty_thread(void *unused)
{
	(void)unused;
	uint64_t rng = mix(g.seed ^ (uint64_t)getpid());
	double owed = 0, owed64 = 0;
	int64_t due = now_us();
	for (;;) {
		due += TICK_MS * 1000;
		int64_t late = now_us() - due;
		if (late > 100000 || late < -1000000) /* stopped for long, or the clock of another host */
			due += late;
		struct timespec until = {due / 1000000, due % 1000000 * 1000};
		clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL);

		pthread_mutex_lock(&g.lock);
		size_t total = total_pages(true);
		if (g.writing && total) {
			owed += g.dirty / 100 * (double)total * TICK_MS / 1000;
			owed64 += (double)g.dirty64 * TICK_MS / 1000;
		}
		/* Heap regions are private: g.lock protects them. */
		for (unsigned n = 1; g.writing && total && owed + owed64 >= 1; n++) {
			bool whole = owed >= 1;
			*(whole ? &owed : &owed64) -= 1;
			size_t page = next(&rng) % total;
			struct region *r = locate(true, &page);
			whole ? bump(r, page) : patch(r, page);
			if (n % 64 == 0) {
				give_way(&g.lock);
				total = total_pages(true); /* the region may have been remapped */
			}
			if (owed < 1 && owed64 < 1)
				break;
		}
		pthread_mutex_unlock(&g.lock);
	}
	return NULL;
}

/* Deep frames with known contents, checked on return and created again. */
static struct {
	pthread_mutex_t lock;
	pthread_cond_t changed;
	uint64_t asked, done;
	bool on;
} deep = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};

static const struct region deep_region = {.kind = "stack", .id = 0xdeeb, .content = RANDOM};
enum { DEPTH = 200 };

__attribute__((noinline)) static void descend(size_t depth, uint32_t version)
{
	volatile uint64_t frame[WORDS];
	struct version v = {version, 0};
	uint64_t key = page_key(&deep_region, depth, v);
	for (size_t i = 0; i < WORDS; i++)
		frame[i] = key + i;
	if (depth + 1 < DEPTH) {
		descend(depth + 1, version);
	} else {
		pthread_mutex_lock(&deep.lock);
		deep.done = version - 1;
		pthread_cond_broadcast(&deep.changed);
		while (deep.asked < version)
			pthread_cond_wait(&deep.changed, &deep.lock);
		pthread_mutex_unlock(&deep.lock);
	}
	for (size_t i = 0; i < WORDS; i++)
		if (frame[i] != key + i) {
			error("stack frame %zu word %zu is wrong", depth, i);
			break;
		}
}

static void *deep_thread(void *unused)
{
	(void)unused;
	for (uint32_t version = 1;; version++)
		descend(0, version);
	return NULL;
}

static void f_stack(const char *a)
{
	(void)a;
	deep.on = true;
	start(deep_thread, NULL, "stack");
}

static void check_deep(struct reply *reply)
{
	if (!deep.on)
		return;
	pthread_mutex_lock(&deep.lock);
	uint64_t wanted = ++deep.asked;
	pthread_cond_broadcast(&deep.changed);
	while (deep.done < wanted)
		pthread_cond_wait(&deep.changed, &deep.lock);
	pthread_mutex_unlock(&deep.lock);
	reply->pages += DEPTH;
}

/* Reports a system call that returned although it must not, too early, or with a wrong error. `restarts`
 * selects how EINTR counts. */
enum restarts { ALWAYS, RESTART_BLOCK, NEVER };

static bool judge(const char *call, long result, int error_number, enum restarts restarts)
{
	if (result < 0 && error_number >= 512 && error_number <= 516) {
		error("%s: restart code %d reached user space", call, error_number);
		return false;
	}
	if (result < 0 && error_number == EINTR && restarts != ALWAYS) {
		/* CRIU ends calls with a restart block; a plain stop must not. */
		atomic_fetch_add(restarts == NEVER ? &g.board->eintr : &g.board->interrupted, 1);
		return false;
	}
	return true;
}

static void took(const char *call, int64_t since, int64_t least_us)
{
	int64_t elapsed = now_us() - since;
	if (elapsed >= 0 && elapsed < least_us) /* the clock of another host may be behind */
		error("%s ended after %lld of %lld us", call, (long long)elapsed, (long long)least_us);
}

static void unexpected(const char *call, long result, int error_number)
{
	error("%s returned %ld (%s)", call, result, result < 0 ? strerror(error_number) : "no error");
}

static void block_futex(void)
{
	static uint32_t word;
	for (;;) {
		long n = syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, NULL);
		if (judge("futex", n, errno, ALWAYS))
			unexpected("futex", n, errno);
	}
}

static void block_futex_timeout(void)
{
	static uint32_t word;
	for (;;) {
		struct timespec t = {0, 200000000};
		int64_t since = now_us();
		long n = syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, &t);
		if (!judge("futex with timeout", n, errno, RESTART_BLOCK))
			continue;
		if (n != -1 || errno != ETIMEDOUT)
			unexpected("futex with timeout", n, errno);
		took("futex with timeout", since, 200000);
	}
}

static void block_pipe(void)
{
	int fd[2];
	char byte;
	if (pipe2(fd, O_CLOEXEC))
		die("pipe");
	for (;;) {
		ssize_t n = read(fd[0], &byte, 1);
		if (judge("read of a pipe", n, errno, ALWAYS))
			unexpected("read of a pipe", n, errno);
	}
}

static void block_nanosleep(void)
{
	for (;;) {
		struct timespec t = {0, 150000000};
		int64_t since = now_us();
		int n = nanosleep(&t, NULL);
		if (!judge("nanosleep", n, errno, RESTART_BLOCK))
			continue;
		if (n)
			unexpected("nanosleep", n, errno);
		took("nanosleep", since, 150000);
	}
}

static void block_poll(void)
{
	int fd[2];
	if (pipe2(fd, O_CLOEXEC))
		die("pipe");
	for (;;) {
		struct pollfd one = {.fd = fd[0], .events = POLLIN};
		int64_t since = now_us();
		int n = poll(&one, 1, 250);
		if (!judge("poll", n, errno, RESTART_BLOCK))
			continue;
		if (n)
			unexpected("poll", n, errno);
		took("poll", since, 250000);
	}
}

static void block_epoll(void)
{
	int set = epoll_create1(EPOLL_CLOEXEC), event = eventfd(0, EFD_CLOEXEC);
	struct epoll_event ready = {.events = EPOLLIN};
	if (set < 0 || event < 0 || epoll_ctl(set, EPOLL_CTL_ADD, event, &ready))
		die("epoll");
	for (;;) {
		int64_t since = now_us();
		int n = epoll_wait(set, &ready, 1, 300);
		if (!judge("epoll_wait", n, errno, NEVER))
			continue;
		if (n)
			unexpected("epoll_wait", n, errno);
		took("epoll_wait", since, 300000);
	}
}

static void block_sigsuspend(void)
{
	sigset_t all;
	sigfillset(&all);
	for (;;) {
		int n = sigsuspend(&all);
		error("sigsuspend returned %d (%s) with every signal blocked", n, strerror(errno));
	}
}

static void block_semaphore(void)
{
	sem_t semaphore;
	sem_init(&semaphore, 0, 0);
	for (;;) {
		int n = sem_wait(&semaphore);
		if (judge("sem_wait", n, errno, ALWAYS))
			unexpected("sem_wait", n, errno);
	}
}

static void block_eventfd(void)
{
	int fd = eventfd(0, EFD_CLOEXEC);
	uint64_t value;
	for (;;) {
		ssize_t n = read(fd, &value, sizeof value);
		if (judge("read of an eventfd", n, errno, ALWAYS))
			unexpected("read of an eventfd", n, errno);
	}
}

static void block_socket(void)
{
	int fd[2];
	char byte;
	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fd))
		die("socketpair");
	for (;;) {
		ssize_t n = recv(fd[0], &byte, 1, 0);
		if (judge("recv", n, errno, ALWAYS))
			unexpected("recv", n, errno);
	}
}

static void block_timerfd(void)
{
	int fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC);
	struct itimerspec period = {{0, 170000000}, {0, 170000000}};
	uint64_t ticks;
	if (fd < 0 || timerfd_settime(fd, 0, &period, NULL))
		die("timerfd");
	for (;;) {
		ssize_t n = read(fd, &ticks, sizeof ticks);
		if (!judge("read of a timerfd", n, errno, ALWAYS))
			continue;
		if (n != sizeof ticks || !ticks)
			unexpected("read of a timerfd", n, errno);
	}
}

static void block_absolute(void)
{
	for (;;) {
		struct timespec t;
		clock_gettime(CLOCK_MONOTONIC, &t);
		int64_t since = now_us();
		t.tv_sec += 1;
		int n = clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL);
		if (!judge("clock_nanosleep", n ? -1 : 0, n, ALWAYS))
			continue;
		if (n)
			unexpected("clock_nanosleep", -1, n);
		took("clock_nanosleep", since, 990000);
	}
}

static const struct {
	const char *name;
	void (*run)(void);
} blocks[] = {
	{"futex", block_futex},		{"pipe", block_pipe},
	{"nanosleep", block_nanosleep}, {"poll", block_poll},
	{"epoll", block_epoll},		{"sigsuspend", block_sigsuspend},
	{"semaphore", block_semaphore}, {"futex-timeout", block_futex_timeout},
	{"eventfd", block_eventfd},	{"socket", block_socket},
	{"timerfd", block_timerfd},	{"absolute", block_absolute},
};
enum { BLOCKS = sizeof blocks / sizeof *blocks };

static void *block_thread(void *index)
{
	blocks[(uintptr_t)index % BLOCKS].run();
	return NULL;
}

static void f_threads(const char *a)
{
	for (int i = 0; i < count_of(a); i++)
		start(block_thread, (void *)(uintptr_t)i, blocks[i % BLOCKS].name);
}

/* Known register values, compared repeatedly. With a pid in the table each turn also makes a system call, so
 * that stops occur in user code and at system call boundaries. */
struct registers {
	uint64_t general[13]; /* 0: rax rbx rcx rdx rsi rdi r8..r14 */
	uint64_t self;	      /* 104: r15 */
	uint64_t turns;	      /* 112 */
	uint64_t pid;	      /* 120 */
	_Alignas(32) uint8_t vector[15][32]; /* 128 */
};
static __thread uint64_t tls_canary;

#ifdef __x86_64__
_Static_assert(offsetof(struct registers, vector) == 128, "the assembly counts on it");
#define GENERAL(X) \
	X("rax", 0) X("rbx", 8) X("rcx", 16) X("rdx", 24) X("rsi", 32) X("rdi", 40) X("r8", 48) \
	X("r9", 56) X("r10", 64) X("r11", 72) X("r12", 80) X("r13", 88) X("r14", 96)
#define VECTOR(X) \
	X("0", 128) X("1", 160) X("2", 192) X("3", 224) X("4", 256) X("5", 288) X("6", 320) \
	X("7", 352) X("8", 384) X("9", 416) X("10", 448) X("11", 480) X("12", 512) X("13", 544) \
	X("14", 576)
#define LOAD(reg, at) "movq " #at "(%%r15), %%" reg "\n\t"
#define COMPARE(reg, at) "cmpq " #at "(%%r15), %%" reg "\n\tjne 9f\n\t"
#define LOAD_SSE(n, at) "movdqa " #at "(%%r15), %%xmm" n "\n\t"
#define COMPARE_SSE(n, at) \
	"movdqa %%xmm" n ", %%xmm15\n\tpxor " #at "(%%r15), %%xmm15\n\tptest %%xmm15, %%xmm15\n\tjne 9f\n\t"
#define LOAD_AVX(n, at) "vmovdqa " #at "(%%r15), %%ymm" n "\n\t"
#define COMPARE_AVX(n, at) \
	"vxorps " #at "(%%r15), %%ymm" n ", %%ymm15\n\tvptest %%ymm15, %%ymm15\n\tjne 9f\n\t"
#define HOLD(load, compare, end) \
	__asm__ volatile(GENERAL(LOAD) VECTOR(load) \
			 "1:\n\t" \
			 "cmpq $0, 120(%%r15)\n\tje 2f\n\t" \
			 "movl $39, %%eax\n\tsyscall\n\t" \
			 "cmpq 120(%%r15), %%rax\n\tjne 9f\n\t" \
			 "movq (%%r15), %%rax\n\tmovq 16(%%r15), %%rcx\n\tmovq 72(%%r15), %%r11\n\t" \
			 "2:\n\t" GENERAL(COMPARE) COMPARE("r15", 104) VECTOR(compare) \
			 "decq 112(%%r15)\n\tjnz 1b\n\t" \
			 "xorl %%eax, %%eax\n\tjmp 8f\n\t" \
			 "9:\n\tmovl $1, %%eax\n\t" \
			 "8:\n\t" end \
			 : "=&a"(wrong), "+r"(r15) \
			 : \
			 : "rbx", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", \
			   "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", \
			   "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "cc", "memory")

static bool hold(struct registers *table)
{
	register struct registers *r15 __asm__("r15") = table;
	uint32_t wrong;
	if (__builtin_cpu_supports("avx"))
		HOLD(LOAD_AVX, COMPARE_AVX, "vzeroupper\n\t");
	else if (__builtin_cpu_supports("sse4.1"))
		HOLD(LOAD_SSE, COMPARE_SSE, "");
	else
		return true;
	return !wrong;
}
#else
static bool hold(struct registers *table)
{
	volatile uint64_t a = table->general[0], b = table->general[1], c = table->general[2];
	for (; table->turns; table->turns--)
		if (a != table->general[0] || b != table->general[1] || c != table->general[2] ||
		    (table->pid && table->pid != (uint64_t)getpid()))
			return false;
	return true;
}
#endif

static void make_registers(struct registers *table, uint64_t key, bool calls)
{
	uint64_t *words = (uint64_t *)table;
	for (size_t i = 0; i < sizeof *table / 8; i++)
		words[i] = next(&key);
	table->self = (uintptr_t)table;
	table->pid = calls ? (uint64_t)getpid() : 0;
}

static void *spin_thread(void *index)
{
	struct registers table;
	bool calls = (uintptr_t)index % 2;
	make_registers(&table, mix(g.seed + (uintptr_t)index), calls);
	tls_canary = table.general[3];
	for (;;) {
		table.turns = 10000;
		if (!hold(&table))
			error("a register changed (%s)", calls ? "around a system call" : "in user code");
		if (tls_canary != table.general[3])
			error("thread-local storage changed");
	}
	return NULL;
}

static void f_spin(const char *a)
{
	for (int i = 0; i < count_of(a); i++)
		start(spin_thread, (void *)(uintptr_t)i, "spin");
}

/* Timer signals: one thread computes, one sleeps in a call that SA_RESTART must restart. */
static _Atomic uint64_t signals_seen;
static const int SIGNAL_COOKIE = 0x5eed;

static void on_timer(int number, siginfo_t *info, void *context)
{
	(void)context;
	if (number != SIGRTMIN + 1 || info->si_code != SI_TIMER || info->si_value.sival_int != SIGNAL_COOKIE)
		error("signal %d code %d value %d", number, info->si_code, info->si_value.sival_int);
	struct registers other; /* sigreturn must undo what the handler leaves in the registers */
	make_registers(&other, atomic_fetch_add(&signals_seen, 1), false);
	other.turns = 1;
	if (!hold(&other))
		error("a register changed in a signal handler");
}

static void arm_timer(void)
{
	struct sigevent event = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = SIGRTMIN + 1};
	event.sigev_notify_thread_id = (pid_t)syscall(SYS_gettid);
	event.sigev_value.sival_int = SIGNAL_COOKIE;
	struct itimerspec period = {{0, 1000000}, {0, 1000000}};
	timer_t timer;
	sigset_t one;
	sigemptyset(&one);
	sigaddset(&one, SIGRTMIN + 1);
	pthread_sigmask(SIG_UNBLOCK, &one, NULL);
	if (timer_create(CLOCK_MONOTONIC, &event, &timer) || timer_settime(timer, 0, &period, NULL))
		die("timer");
}

static void *signals_compute(void *unused)
{
	arm_timer();
	return spin_thread(unused);
}

static void *signals_sleep(void *unused)
{
	(void)unused;
	arm_timer();
	block_pipe();
	return NULL;
}

static void f_signals(const char *a)
{
	(void)a;
	struct sigaction action = {.sa_flags = SA_RESTART | SA_SIGINFO};
	action.sa_sigaction = on_timer;
	sigaction(SIGRTMIN + 1, &action, NULL);
	start(signals_compute, NULL, "signals-compute");
	start(signals_sleep, NULL, "signals-sleep");
}

/* ---- Chaos: mappings are created, removed, moved and changed, and checked after every step ---- */

enum { CHAOS_MAPS = 16, CHAOS_PAGES = 64 };
static struct {
	pthread_mutex_t lock;
	pthread_cond_t go;
	struct chaos_map {
		uint8_t *addr; /* NULL: free */
		size_t pages;
		int prot;
		uint64_t key[CHAOS_PAGES]; /* 0: zeros */
	} map[CHAOS_MAPS];
	uint64_t rng, keys, steps;
	bool may_brk;
} chaos = {.lock = PTHREAD_MUTEX_INITIALIZER, .go = PTHREAD_COND_INITIALIZER};

static void chaos_put(struct chaos_map *m, size_t page)
{
	if (!(m->prot & PROT_WRITE) &&
	    !mprotect(m->addr, m->pages * PAGE, PROT_READ | PROT_WRITE))
		m->prot = PROT_READ | PROT_WRITE;
	m->key[page] = ++chaos.keys;
	fill(RANDOM, m->key[page], (uint64_t *)(m->addr + page * PAGE));
}

static bool chaos_page_right(const struct chaos_map *m, size_t page)
{
	uint64_t want[WORDS];
	const uint8_t *at = m->addr + page * PAGE;
	memset(want, 0, sizeof want);
	if (m->key[page])
		fill(RANDOM, m->key[page], want);
	if (m->prot == PROT_NONE)
		mprotect(m->addr, m->pages * PAGE, PROT_READ);
	bool right = !memcmp(at, want, PAGE);
	if (m->prot == PROT_NONE)
		mprotect(m->addr, m->pages * PAGE, PROT_NONE);
	return right;
}

static void chaos_verify(const char *after)
{
	struct chaos_map *m = &chaos.map[next(&chaos.rng) % CHAOS_MAPS];
	for (int i = 0; m->addr && i < 2; i++) {
		size_t page = next(&chaos.rng) % m->pages;
		if (!chaos_page_right(m, page))
			error("chaos: page %zu of %p is wrong after %s", page, (void *)m->addr, after);
	}
}

static void chaos_wait(pid_t pid, const char *what)
{
	int status;
	if (pid < 0)
		return; /* no more processes available: not under test */
	if (waitpid(pid, &status, 0) != pid || status)
		error("chaos: %s ended with %#x", what, status);
}

static void chaos_fork(void)
{
	pid_t pid = fork();
	if (pid == 0) {
		struct chaos_map *m = &chaos.map[next(&chaos.rng) % CHAOS_MAPS];
		if (m->addr && !chaos_page_right(m, 0))
			_exit(1);
		if (m->addr)
			chaos_put(m, m->pages - 1); /* its own copy */
		_exit(0);
	}
	chaos_wait(pid, "fork");
}

static void chaos_exec(void)
{
	pid_t pid = vfork();
	if (pid == 0) {
		execl("/proc/self/exe", "victim", "chaos-child", (char *)NULL);
		_exit(127);
	}
	chaos_wait(pid, "vfork and exec");
}

static void chaos_brk(void)
{
	/* Only if no other thread maps memory. */
	size_t pages = next(&chaos.rng) % 16 + 1;
	uint8_t *at = sbrk((intptr_t)(pages * PAGE + PAGE));
	if (at == (void *)-1)
		return;
	uint64_t want[WORDS], key = ++chaos.keys;
	uint8_t *first = (uint8_t *)(((uintptr_t)at + PAGE - 1) & ~(uintptr_t)(PAGE - 1));
	fill(RANDOM, key, want);
	for (size_t i = 0; i < pages; i++)
		memcpy(first + i * PAGE, want, PAGE);
	chaos_verify("brk");
	for (size_t i = 0; i < pages; i++)
		if (memcmp(first + i * PAGE, want, PAGE))
			error("chaos: brk page %zu is wrong", i);
	sbrk(-(intptr_t)(pages * PAGE + PAGE));
}

static const char *chaos_step(void)
{
	static const int prots[] = {PROT_NONE, PROT_READ, PROT_READ | PROT_WRITE};
	uint64_t dice = next(&chaos.rng);
	struct chaos_map *m = &chaos.map[dice % CHAOS_MAPS];
	size_t some = (dice >> 16) % 16 + 1;
	if (!m->addr) {
		m->addr = map(some * PAGE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
		if (!m->addr)
			return "failed map";
		m->pages = some;
		m->prot = PROT_READ | PROT_WRITE;
		memset(m->key, 0, sizeof m->key);
		for (size_t page = 0; page < some; page += 1 + page % 3)
			chaos_put(m, page);
		return "map";
	}
	size_t page = (dice >> 24) % m->pages, bytes = m->pages * PAGE;
	switch ((dice >> 32) % 64) {
	case 0 ... 3:
		munmap(m->addr, bytes);
		m->addr = NULL;
		return "unmap";
	case 4 ... 9: { /* onto a reserved range, which mremap replaces */
		void *to = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (to == MAP_FAILED)
			return "failed move";
		bool leave = dice >> 63;
		int flags = MREMAP_MAYMOVE | MREMAP_FIXED | (leave ? MREMAP_DONTUNMAP : 0);
		void *from = m->addr;
		if (mremap(from, bytes, bytes, flags, to) == MAP_FAILED) {
			munmap(to, bytes);
			return "failed move";
		}
		m->addr = to;
		if (leave)
			munmap(from, bytes);
		return "move";
	}
	case 10 ... 13: {
		if (m->pages + some > CHAOS_PAGES)
			return "nothing";
		void *to = mremap(m->addr, bytes, bytes + some * PAGE, MREMAP_MAYMOVE);
		if (to == MAP_FAILED)
			return "failed grow";
		m->addr = to;
		memset(m->key + m->pages, 0, some * sizeof *m->key);
		m->pages += some;
		return "grow";
	}
	case 14 ... 17:
		if (page && mremap(m->addr, bytes, page * PAGE, 0) != MAP_FAILED)
			m->pages = page;
		return "shrink";
	case 18 ... 21: /* a hole at its head */
		if (page && !munmap(m->addr, page * PAGE)) {
			m->addr += page * PAGE;
			m->pages -= page;
			memmove(m->key, m->key + page, m->pages * sizeof *m->key);
		}
		return "cut";
	case 22 ... 29:
		if (!mprotect(m->addr, bytes, prots[some % 3]))
			m->prot = prots[some % 3];
		return "mprotect";
	case 30 ... 35: {
		size_t count = some < m->pages - page ? some : m->pages - page;
		if (!madvise(m->addr + page * PAGE, count * PAGE, MADV_DONTNEED))
			memset(m->key + page, 0, count * sizeof *m->key);
		return "discard";
	}
	case 36:
		chaos_fork();
		return "fork";
	case 37:
		chaos_exec();
		return "exec";
	case 38:
		if (chaos.may_brk)
			chaos_brk();
		return "brk";
	default:
		for (size_t i = 0; i < some; i++)
			chaos_put(m, (page + i) % m->pages);
		return "write";
	}
}

static bool is_writing(void)
{
	pthread_mutex_lock(&g.lock);
	bool writing = g.writing;
	pthread_mutex_unlock(&g.lock);
	return writing;
}

static void *chaos_thread(void *unused)
{
	(void)unused;
	pthread_mutex_lock(&chaos.lock);
	for (;;) {
		while (!is_writing())
			pthread_cond_wait(&chaos.go, &chaos.lock);
		for (int i = 0; i < 16; i++)
			chaos_verify(chaos_step());
		chaos.steps += 16;
		give_way(&chaos.lock);
	}
	return NULL;
}

static void start_chaos(bool may_brk)
{
	chaos.rng = mix(g.seed ^ (uint64_t)getpid() << 20);
	chaos.may_brk = may_brk;
	g.chaos = true;
	start(chaos_thread, NULL, "chaos");
}

static void check_chaos(struct reply *reply)
{
	if (!g.chaos)
		return;
	queue_for(&chaos.lock);
	for (struct chaos_map *m = chaos.map; m < chaos.map + CHAOS_MAPS; m++)
		for (size_t page = 0; m->addr && page < m->pages; page++, reply->pages++)
			if (!chaos_page_right(m, page) && !reply->mismatches++)
				snprintf(reply->first, sizeof reply->first, "pid=%d region=chaos page=%zu address=%p",
					 g.pid, page, (void *)(m->addr + page * PAGE));
	pthread_mutex_unlock(&chaos.lock);
}

/* ---- Processes ---- */

enum op { CHECK, MUTATE, MUTATE_ALL, DISCARD, STOP_WRITING, START_WRITING, REGIONS, QUIT };
struct command {
	uint64_t op, argument;
};

static void end_kids(void);

/* Runs a command in this process. */
static void act(struct command command, struct reply *reply)
{
	switch (command.op) {
	case CHECK:
		for (size_t i = 0; i < g.regions; i++)
			check_region(&g.region[i], reply);
		check_deep(reply);
		check_chaos(reply);
		break;
	case MUTATE:
		reply->pages = change(command.argument, false);
		break;
	case MUTATE_ALL:
		reply->pages = change(UINT64_MAX, false);
		break;
	case DISCARD:
		reply->pages = change(command.argument, true);
		break;
	case STOP_WRITING:
	case START_WRITING:
		queue_for(&chaos.lock); /* waits for the end of a step of chaos */
		queue_for(&g.lock);
		g.writing = command.op == START_WRITING;
		pthread_mutex_unlock(&g.lock);
		if (g.chaos)
			pthread_cond_broadcast(&chaos.go);
		pthread_mutex_unlock(&chaos.lock);
		break;
	case REGIONS:
		for (struct region *r = g.region; r < g.region + g.regions; r++, reply->pages++)
			answer("region pid=%d id=%x start=%#lx length=%zu kind=%s inode=%lu", g.pid, r->id,
			    (unsigned long)(uintptr_t)r->addr, r->pages * PAGE, r->kind, (unsigned long)r->inode);
		break;
	case QUIT:
		break;
	}
}

static void run(struct command command, struct reply *reply)
{
	bool sent[MAX_KIDS];
	for (size_t i = 0; i < g.kids; i++)
		sent[i] = write(g.kid[i].in, &command, sizeof command) == sizeof command;
	act(command, reply);
	for (size_t i = 0; i < g.kids; i++) {
		struct reply theirs;
		if (!sent[i] || read(g.kid[i].out, &theirs, sizeof theirs) != sizeof theirs) {
			error("child %d is gone", g.kid[i].pid);
			continue;
		}
		reply->pages += theirs.pages;
		if (theirs.mismatches && !reply->mismatches)
			memcpy(reply->first, theirs.first, sizeof reply->first);
		reply->mismatches += theirs.mismatches;
	}
}

__attribute__((noreturn)) static void serve(void)
{
	struct command command;
	while (read(g.up_in, &command, sizeof command) == sizeof command) {
		struct reply reply = {0};
		run(command, &reply);
		if (command.op == QUIT)
			end_kids();
		if (write(g.up_out, &reply, sizeof reply) != sizeof reply || command.op == QUIT)
			break;
	}
	if (g.boxed)
		syscall(SYS_exit, 0); /* strict seccomp allows no exit_group, and there is one thread */
	_exit(0);
}

static void die_with(pid_t parent)
{
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (getppid() != parent)
		_exit(1);
}

/* Forks while no other thread holds a lock, for the child would not have that thread. */
static pid_t quiet_fork(void)
{
	pid_t parent = getpid();
	queue_for(&chaos.lock);
	queue_for(&g.lock);
	for (size_t i = 0; i < g.regions; i++)
		if (g.region[i].shared)
			lock(&g.region[i]);
	pid_t pid = fork();
	if (pid == 0)
		die_with(parent);
	else
		for (size_t i = 0; i < g.regions; i++)
			if (g.region[i].shared)
				unlock(&g.region[i]);
	pthread_mutex_unlock(&g.lock);
	pthread_mutex_unlock(&chaos.lock);
	return pid;
}

static void inherit(void)
{
	g.pid = getpid();
	g.slot = atomic_fetch_add(&g.board->slots, 1);
	g.rng = mix(g.seed ^ g.slot);
	g.next_id = 0;
	g.kids = g.auxes = g.unlinks = 0;
	g.chaos = deep.on = false;
	for (struct chaos_map *m = chaos.map; m < chaos.map + CHAOS_MAPS; m++)
		if (m->addr) {
			munmap(m->addr, m->pages * PAGE);
			m->addr = NULL;
		}
	size_t kept = 0;
	for (size_t i = 0; i < g.regions; i++) {
		struct region *r = &g.region[i];
		if (r->keep_out)
			continue;
		if (r->wipe)
			memset(r->model->page, 0, r->pages * sizeof *r->model->page);
		g.region[kept++] = *r;
	}
	g.regions = kept;
}

/* Forks a child that runs `begin` and serves commands. */
static pid_t add_kid(void (*begin)(void))
{
	int down[2], up[2];
	if (g.kids == MAX_KIDS || pipe2(down, O_CLOEXEC) || pipe2(up, O_CLOEXEC))
		return -1;
	pid_t pid = quiet_fork();
	if (pid == 0) {
		/* A pipe must be closed when the process at its other end exits. */
		for (size_t i = 0; i < g.kids; i++) {
			close(g.kid[i].in);
			close(g.kid[i].out);
		}
		if (g.up_in >= 0) {
			close(g.up_in);
			close(g.up_out);
		}
		close(down[1]);
		close(up[0]);
		g.up_in = down[0];
		g.up_out = up[1];
		inherit();
		begin();
		struct reply ready = {0};
		if (write(g.up_out, &ready, sizeof ready) != sizeof ready)
			_exit(1);
		serve();
	}
	close(down[0]);
	close(up[1]);
	struct reply ready;
	if (pid < 0 || read(up[0], &ready, sizeof ready) != sizeof ready) {
		close(down[1]);
		close(up[0]);
		return -1;
	}
	g.kid[g.kids++] = (struct kid){pid, down[1], up[0]};
	return pid;
}

static void end_kid(struct kid *kid)
{
	struct command quit = {QUIT, 0};
	struct reply reply;
	if (write(kid->in, &quit, sizeof quit) != sizeof quit ||
	    read(kid->out, &reply, sizeof reply) != sizeof reply)
		kill(kid->pid, SIGKILL);
	waitpid(kid->pid, NULL, 0);
	close(kid->in);
	close(kid->out);
}

static void end_kids(void)
{
	while (g.kids)
		end_kid(&g.kid[--g.kids]);
	while (g.auxes) {
		kill(g.aux[--g.auxes], SIGKILL);
		waitpid(g.aux[g.auxes], NULL, 0);
	}
}

/* Does one step after another. The number of steps is private memory, and moves along; the file is one for all
 * copies on this machine. So a step that is done already was done by another copy, or the number is an old one. */
static void *history_thread(void *file)
{
	_Atomic uint32_t *host = file;
	for (uint32_t n = atomic_load(&g.steps); n < STEPS; n = atomic_load(&g.steps)) {
		struct stat namespace;
		if (stat("/proc/self/ns/pid", &namespace))
			die("namespace");
		uint32_t none = 0;
		if (!atomic_compare_exchange_strong(&host[n], &none, (uint32_t)namespace.st_ino)) {
			error("step %u of process %u was done before, on host %u", n, g.slot, none);
			return NULL;
		}
		atomic_store(&g.steps, n + 1);
		nanosleep(&(struct timespec){0, 1000000}, NULL);
	}
	return NULL;
}

static void start_history(void)
{
	char path[300];
	snprintf(path, sizeof path, "%s/history-%u", g.dir, g.slot);
	int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0644);
	if (fd < 0 || ftruncate(fd, STEPS * sizeof(uint32_t)))
		die("%s", path);
	void *file = mmap(NULL, STEPS * sizeof(uint32_t), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (file == MAP_FAILED)
		die("%s", path);
	close(fd);
	atomic_store(&g.steps, 0); /* a child has inherited its parent's */
	start(history_thread, file, "history");
}

static void start_writers(void)
{
	if (g.dirty > 0 || g.dirty64 > 0)
		start(dirty_thread, NULL, "dirty");
	if (g.history)
		start_history();
}

static void begin_grandchild(void)
{
	f_heap("256K");
	change(16, false);
	start_writers();
}

static void begin_child(void)
{
	f_heap("1");
	change(total_pages(false) / 8, false); /* private copies of inherited pages */
	for (int i = 0; i < g.grandchildren; i++)
		if (add_kid(begin_grandchild) < 0)
			_exit(1);
	start_writers();
}

static void f_children(const char *a)
{
	for (int i = 0; i < count_of(a); i++)
		if (add_kid(begin_child) < 0)
			die("child");
}

static void f_grandchildren(const char *a)
{
	g.grandchildren = count_of(a);
	f_children(NULL);
	g.grandchildren = 0;
}

static void begin_chaos(void)
{
	f_heap("1");
	start_chaos(true);
}

static void f_chaos(const char *a)
{
	(void)a;
	if (add_kid(begin_chaos) < 0)
		die("chaos child");
	start_chaos(false);
}

static void enter_box(void)
{
	/* Only regions that need no system call: no waiting for locks, no discarded pages. */
	size_t kept = 0;
	for (size_t i = 0; i < g.regions; i++)
		if (!g.region[i].shared && g.region[i].prot == (PROT_READ | PROT_WRITE)) {
			g.region[i].plain = false;
			g.region[kept++] = g.region[i];
		}
	g.regions = kept;
	g.boxed = true;
}

static void begin_strict(void)
{
	f_heap("1");
	enter_box();
	if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT))
		_exit(1);
}

static void begin_filter(void)
{
	f_heap("1");
	enter_box();
#define ALLOW(call) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_##call, 0, 1), \
		    BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		ALLOW(read), ALLOW(write), ALLOW(exit), ALLOW(exit_group), ALLOW(rt_sigreturn),
		ALLOW(restart_syscall), ALLOW(getpid),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
	};
	struct sock_fprog program = {sizeof code / sizeof *code, code};
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) ||
	    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program))
		_exit(1);
}

static void f_seccomp(const char *a)
{
	if (add_kid(a && !strcmp(a, "strict") ? begin_strict : begin_filter) < 0)
		skip("seccomp");
}

static pid_t add_aux(void)
{
	pid_t pid = quiet_fork();
	if (pid > 0 && g.auxes < MAX_AUX)
		g.aux[g.auxes++] = pid;
	return pid;
}

static void f_execloop(const char *a)
{
	if (add_aux() == 0) {
		execl("/proc/self/exe", "victim", "execloop-child", a ? a : "50", (char *)NULL);
		_exit(127);
	}
}

/* Forks children that fork children, each of which calls exec, with at most `limit` at a time. */
static void f_bomb(const char *a)
{
	int limit = count_of(a), alive = 0;
	if (add_aux() != 0)
		return;
	for (;;) {
		pid_t pid = alive < limit / 2 ? fork() : -1;
		if (pid == 0) {
			die_with(getppid());
			pid_t child = fork();
			execl("/proc/self/exe", "victim", "bomb-child", child ? "20" : "5", (char *)NULL);
			_exit(127);
		}
		if (pid > 0)
			alive++;
		while (alive && waitpid(-1, NULL, pid > 0 ? WNOHANG : 0) > 0)
			alive--;
	}
}

static void f_zombie(const char *a)
{
	(void)a;
	pid_t pid = add_aux();
	siginfo_t info;
	if (pid == 0)
		_exit(0);
	waitid(P_PID, (id_t)pid, &info, WEXITED | WNOWAIT); /* waits until it is a zombie */
}

static void f_stopped(const char *a)
{
	(void)a;
	pid_t pid = add_aux();
	siginfo_t info;
	if (pid == 0)
		for (;;)
			raise(SIGSTOP);
	waitid(P_PID, (id_t)pid, &info, WSTOPPED | WNOWAIT);
}

static void f_dirty(const char *a) { g.dirty = a ? atof(a) : 10; }
static void f_history(const char *a) { (void)a; g.history = true; }
static void f_dirty64(const char *a) { g.dirty64 = a ? strtoull(a, NULL, 0) : 1000; }

/* Memory first, so that children inherit it; then children, so that they inherit no threads. */
static const struct feature {
	int phase;
	const char *name;
	void (*make)(const char *);
} features[] = {
	{0, "brk", f_brk}, /* first: the break must be free */
	{1, "heap", f_heap},
	{1, "text", f_text},
	{1, "zero", f_zero},
	{1, "sparse", f_sparse},
	{1, "mappings", f_mappings},
	{1, "segments", f_segments},
	{1, "thp", f_thp},
	{1, "hugetlb", f_hugetlb},
	{1, "hugeshared", f_hugeshared},
	{1, "hugefork", f_hugefork},
	{1, "shared", f_shared},
	{1, "memfd", f_memfd},
	{1, "memfd_unmapped", f_memfd_unmapped},
	{1, "sysv", f_sysv},
	{1, "fileprivate", f_fileprivate},
	{1, "fileshared", f_fileshared},
	{1, "protnone", f_protnone},
	{1, "readonly", f_readonly},
	{1, "code", f_code},
	{1, "guard", f_guard},
	{1, "readzero", f_readzero},
	{1, "mlock", f_mlock},
	{1, "uffd", f_uffd},
	{1, "wipeonfork", f_wipeonfork},
	{1, "dontfork", f_dontfork},
	{1, "dontdump", f_dontdump},
	{1, "mergeable", f_mergeable},
	{1, "static", f_static},
	{1, "lock", f_lock},
	{1, "dirty", f_dirty},
	{1, "dirty64", f_dirty64},
	{1, "history", f_history},
	{2, "children", f_children},
	{2, "grandchildren", f_grandchildren},
	{2, "seccomp", f_seccomp},
	{2, "execloop", f_execloop},
	{2, "bomb", f_bomb},
	{2, "zombie", f_zombie},
	{2, "stopped", f_stopped},
	{2, "chaos", f_chaos},
	{3, "stack", f_stack},
	{3, "threads", f_threads},
	{3, "spin", f_spin},
	{3, "signals", f_signals},
};

/* ---- The root: commands and signals ---- */

static volatile sig_atomic_t check_requested, exit_requested;

static void remove_files(void)
{
	for (size_t i = 0; i < g.unlinks; i++)
		unlink(g.unlink[i]);
}

static void on_signal(int number)
{
	if (number == SIGUSR1)
		check_requested = 1;
	else
		exit_requested = 1;
}

static void on_alarm(int number)
{
	static const char late[] = "victim: time is up (--max-seconds)\n";
	(void)number;
	write_all(STDERR_FILENO, late, sizeof late - 1);
	remove_files();
	_exit(3); /* the kernel kills the children: PR_SET_PDEATHSIG */
}

static void answer_check(char *out, size_t room)
{
	struct reply reply = {0};
	run((struct command){CHECK, 0}, &reply);
	uint64_t errors = atomic_load(&g.board->errors);
	if (!reply.mismatches && !errors)
		snprintf(out, room, "ok %lu 0", (unsigned long)reply.pages);
	else
		snprintf(out, room, "bad pages=%lu mismatches=%lu errors=%lu first: %s", (unsigned long)reply.pages,
			 (unsigned long)reply.mismatches, (unsigned long)errors,
			 reply.mismatches ? reply.first : g.board->first);
}

static struct region *last_plain(void)
{
	struct region *found = NULL;
	for (struct region *r = g.region; r < g.region + g.regions; r++)
		if (r->plain && !r->stride && r->pages > 1 && !r->wipe && !r->keep_out &&
		    !(found && !strcmp(found->kind, "heap") && strcmp(r->kind, "heap")))
			found = r; /* the last heap if there is one */
	return found;
}

enum reshape { REMAP, MOVE, SHRINK, GROW };

/* Changes the mapping of one region of the root. Returns its new number of pages. */
static size_t reshape(enum reshape how)
{
	static unsigned turn;
	struct region *r = last_plain();
	if (!r)
		return 0;
	queue_for(&g.lock);
	size_t bytes = r->pages * PAGE, filled = r->pages;
	void *to;
	switch (how) {
	case REMAP: { /* every other time to the same address, with identical page tables */
		bool same = turn++ % 2 == 0;
		munmap(r->addr, bytes);
		to = mmap(same ? r->addr : NULL, bytes, PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (same ? MAP_FIXED_NOREPLACE : 0), -1, 0);
		if (to == MAP_FAILED && same)
			to = map(bytes, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1);
		if (!to || to == MAP_FAILED)
			die("remap");
		r->addr = to;
		r->id = g.slot << 16 | ++g.next_id;
		memset(r->model->page, 0, r->pages * sizeof *r->model->page);
		filled = 0;
		break;
	}
	case MOVE:
		to = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
		if (to == MAP_FAILED || mremap(r->addr, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, to) != to)
			die("move");
		r->addr = to;
		break;
	case SHRINK:
		munmap(r->addr + bytes / 2 / PAGE * PAGE, bytes - bytes / 2 / PAGE * PAGE);
		r->pages = filled = bytes / 2 / PAGE;
		break;
	case GROW: {
		size_t more = r->pages * 3 / 2 < r->capacity ? r->pages * 3 / 2 : r->capacity;
		to = mremap(r->addr, bytes, more * PAGE, MREMAP_MAYMOVE);
		if (to == MAP_FAILED)
			die("grow");
		r->addr = to;
		memset(r->model->page + r->pages, 0, (more - r->pages) * sizeof *r->model->page);
		r->pages = more;
		break;
	}
	}
	for (size_t page = filled; page < r->pages; page++)
		bump(r, page);
	size_t pages = r->pages;
	pthread_mutex_unlock(&g.lock);
	return pages;
}

__attribute__((noreturn)) static void finish(void)
{
	end_kids();
	remove_files();
	_exit(0);
}

static unsigned long run_all(enum op op, uint64_t argument)
{
	struct reply reply = {0};
	run((struct command){op, argument}, &reply);
	return (unsigned long)reply.pages;
}

__attribute__((noreturn)) static void exec_anew(void)
{
	execv("/proc/self/exe", g.argv);
	die("exec");
}

static void *exec_thread(void *unused)
{
	(void)unused;
	exec_anew();
}

__attribute__((noreturn)) static void exec_by_thread(void)
{
	start(exec_thread, NULL, "exec");
	for (;;)
		pause();
}

__attribute__((noreturn)) static void exec_other(void)
{
	execl("/bin/sh", "sh", "-c", "echo ready other; while read line; do echo $line; done", (char *)NULL);
	die("exec");
}

static void become_anew(void (*become)(void))
{
	if (g.board->errors) {
		answer("bad %s", g.board->first);
		return;
	}
	end_kids();
	remove_files();
	become();
}

static void run_command(const char *line)
{
	char word[32] = "", result[512];
	unsigned long long n = 0;
	sscanf(line, "%31s %llu", word, &n);
	if (!strcmp(word, "check")) {
		answer_check(result, sizeof result);
		answer("%s", result);
	} else if (!strcmp(word, "mutate")) { /* N pages in each process; answers with the total */
		answer("ok %lu", run_all(MUTATE, n));
	} else if (!strcmp(word, "mutate-all")) {
		answer("ok %lu", run_all(MUTATE_ALL, 0));
	} else if (!strcmp(word, "discard")) { /* discards pages */
		answer("ok %lu", run_all(DISCARD, n));
	} else if (!strcmp(word, "stop-writing")) {
		run_all(STOP_WRITING, 0);
		answer("ok");
	} else if (!strcmp(word, "start-writing")) {
		run_all(START_WRITING, 0);
		answer("ok");
	} else if (!strcmp(word, "regions")) {
		answer("ok %lu", run_all(REGIONS, 0));
	} else if (!strcmp(word, "remap")) {
		answer("ok %zu", reshape(REMAP));
	} else if (!strcmp(word, "move")) {
		answer("ok %zu", reshape(MOVE));
	} else if (!strcmp(word, "shrink")) {
		answer("ok %zu", reshape(SHRINK));
	} else if (!strcmp(word, "grow")) {
		answer("ok %zu", reshape(GROW));
	} else if (!strcmp(word, "fork")) {
		pid_t pid = add_kid(begin_child);
		answer(pid < 0 ? "bad %d" : "ok %d", pid);
	} else if (!strcmp(word, "reap")) {
		if (g.kids)
			end_kid(&g.kid[--g.kids]);
		answer("ok %zu", g.kids);
	} else if (!strcmp(word, "errors")) { /* errors, interrupted, eintr, the first error */
		answer("ok %lu %lu %lu %s", (unsigned long)g.board->errors, (unsigned long)g.board->interrupted,
		    (unsigned long)g.board->eintr, g.board->first_taken ? g.board->first : "");
	} else if (!strcmp(word, "activity")) { /* steps of chaos, signals seen */
		queue_for(&chaos.lock);
		uint64_t steps = chaos.steps;
		pthread_mutex_unlock(&chaos.lock);
		answer("ok %lu %lu", (unsigned long)steps, (unsigned long)atomic_load(&signals_seen));
	} else if (!strcmp(word, "exec")) {
		become_anew(exec_anew);
	} else if (!strcmp(word, "exec-by-thread")) { /* the new program keeps the PID of the root */
		become_anew(exec_by_thread);
	} else if (!strcmp(word, "exec-other")) {
		become_anew(exec_other);
	} else if (!strcmp(word, "setuid")) { /* and the group with the same ID; clears the dumpable flag */
		bool done = !setgroups(0, NULL) && !setgid((gid_t)n) && !setuid((uid_t)n);
		answer(done ? "ok %llu" : "bad %llu", n);
	} else if (!strcmp(word, "dumpable")) {
		answer(prctl(PR_SET_DUMPABLE, n, 0, 0, 0) ? "bad %llu" : "ok %llu", n);
	} else if (!strcmp(word, "quit")) {
		answer("ok");
		finish();
	} else if (*word) {
		answer("bad command %s", word);
	}
}

/* Waits for lines and signals; without stdin, for signals only. */
__attribute__((noreturn)) static void serve_root(const sigset_t *open_mask)
{
	char buffer[512];
	size_t length = 0;
	struct pollfd in = {.fd = g.no_stdin ? -1 : STDIN_FILENO, .events = POLLIN};
	for (;;) {
		if (exit_requested)
			finish();
		if (check_requested) {
			char line[512];
			check_requested = 0;
			answer_check(line, sizeof line - 1);
			strcat(line, "\n");
			if (g.report)
				append_report(line, strlen(line));
			continue;
		}
		/* Signals are unblocked only during ppoll: none is lost between the tests above and the call. */
		if (ppoll(&in, 1, NULL, open_mask) <= 0)
			continue;
		ssize_t n = read(in.fd, buffer + length, sizeof buffer - 1 - length);
		if (n <= 0) { /* stdin is closed: keep running */
			in.fd = -1;
			continue;
		}
		length += (size_t)n;
		char *end;
		while ((end = memchr(buffer, '\n', length))) {
			*end++ = 0;
			run_command(buffer);
			length -= (size_t)(end - buffer);
			memmove(buffer, end, length);
		}
		if (length == sizeof buffer - 1)
			length = 0; /* no command is that long */
	}
}

static void make_features(char **list, int phase)
{
	for (char **word = list; *word; word++) {
		const char *equals = strchr(*word, '=');
		size_t length = equals ? (size_t)(equals - *word) : strlen(*word);
		bool known = false;
		for (const struct feature *f = features; f < features + sizeof features / sizeof *features; f++)
			if (strlen(f->name) == length && !memcmp(f->name, *word, length)) {
				known = true;
				if (f->phase == phase)
					f->make(equals ? equals + 1 : NULL);
			}
		if (!known) {
			dprintf(STDERR_FILENO, "victim: unknown feature %s\n", *word);
			exit(2);
		}
	}
}

static char **parse(char **argv)
{
	for (argv++; *argv && !strncmp(*argv, "--", 2); argv++) {
		const char *option = *argv + 2;
		if (!strcmp(option, "no-stdin")) {
			g.no_stdin = true;
			continue;
		}
		if (!strcmp(option, "alone")) { /* shares no memory, so it can have no children */
			g.alone = true;
			continue;
		}
		if (!argv[1]) {
			dprintf(STDERR_FILENO, "victim: --%s needs a value\n", option);
			exit(2);
		}
		const char *value = *++argv;
		if (!strcmp(option, "seed"))
			g.seed = strtoull(value, NULL, 0);
		else if (!strcmp(option, "dir"))
			g.dir = value;
		else if (!strcmp(option, "report"))
			g.report = value;
		else if (!strcmp(option, "max-seconds"))
			g.max_seconds = (unsigned)atoi(value);
		else {
			dprintf(STDERR_FILENO, "victim: unknown option --%s\n", option);
			exit(2);
		}
	}
	return argv;
}

static void handle(int number, void (*handler)(int))
{
	struct sigaction action = {.sa_handler = handler};
	sigaction(number, &action, NULL);
}

int main(int argc, char **argv)
{
	if (argc == 2 && !strcmp(argv[1], "chaos-child"))
		return 0;
	bool again = argc == 3 && !strcmp(argv[1], "execloop-child");
	if (again || (argc == 3 && !strcmp(argv[1], "bomb-child"))) {
		struct timespec t = {atoi(argv[2]) / 1000, atoi(argv[2]) % 1000 * 1000000L};
		nanosleep(&t, NULL);
		if (!again)
			return 0;
		execv("/proc/self/exe", argv); /* stays the same process, dies with the same parent */
		return 127;
	}
	g.argv = argv;
	char **list = parse(argv);
	if (g.no_stdin) {
		/* CRIU cannot restore inherited sessions and descriptors. */
		setsid();
		close_range(3, ~0u, 0);
	}
	sigset_t closed, open_mask;
	sigemptyset(&open_mask);
	sigprocmask(SIG_SETMASK, &open_mask, NULL);
	handle(SIGALRM, on_alarm);
	alarm(g.max_seconds);
	sigemptyset(&closed);
	sigaddset(&closed, SIGUSR1);
	sigaddset(&closed, SIGTERM);
	sigprocmask(SIG_BLOCK, &closed, NULL);
	handle(SIGUSR1, on_signal);
	handle(SIGTERM, on_signal);
	signal(SIGPIPE, SIG_IGN);

	g.board = map(sizeof *g.board, (g.alone ? MAP_PRIVATE : MAP_SHARED) | MAP_ANONYMOUS, -1);
	if (!g.board)
		die("board");
	atomic_store(&g.board->slots, 1);
	g.pid = getpid();
	g.rng = mix(g.seed);
	for (int phase = 0; phase <= 3; phase++)
		make_features(list, phase);
	start_writers();
	answer("ready pid=%d", getpid());
	serve_root(&open_mask);
}
