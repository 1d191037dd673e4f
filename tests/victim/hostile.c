/*
 * A process that changes the code of another one while that is frozen: the two share their memory, and only the
 * second is the target. `hostile loop` makes the first `syscall` instruction of the vDSO an endless loop and back;
 * `hostile mkdir PATH` makes it a jump to a call of mkdir, which the target's seccomp filter forbids.
 *
 * Prints the target's PID. The target counts, and prints its count when it is told to by SIGUSR1.
 */
#define _GNU_SOURCE
#include <elf.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { PAGE = 4096, VDSO = 2 * PAGE, STACK = 1 << 20 };

static volatile uint64_t count;
static const char *path;

static void die(const char *what)
{
	perror(what);
	exit(1);
}

/* Allows all but mkdir, which fails. */
static void forbid_mkdir(void)
{
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_mkdir, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = { sizeof code / sizeof *code, code };

	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program))
		die("seccomp");
}

static void report(int signal)
{
	char text[32];
	int length = snprintf(text, sizeof text, "count %llu\n", (unsigned long long)count);

	(void)signal;
	if (write(1, text, length) < 0)
		_exit(1);
}

/* The target: it makes no call through the vDSO. */
static int target(void *unused)
{
	(void)unused;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	signal(SIGUSR1, report);
	if (path)
		forbid_mkdir();
	for (;;) {
		count++;
		usleep(100);
	}
	return 0;
}

/* Changes code, for a moment. */
static void put(uint8_t *at, const uint8_t *code, size_t length)
{
	memcpy(at, code, length);
	/* The compiler must not leave it out, for it is written again soon. */
	__asm__ volatile("" ::: "memory");
	for (volatile int i = 0; i < 20000; i++)
		;
}

int main(int argc, char **argv)
{
	uint8_t *vdso = (uint8_t *)getauxval(AT_SYSINFO_EHDR), *at, *stack, *code;
	uint8_t kept[5], loop[2] = { 0xeb, 0xfe }, jump[5] = { 0xe9 };
	const uint8_t *changed = loop;
	size_t length = sizeof loop;
	int pid;

	if (argc == 3 && !strcmp(argv[1], "mkdir"))
		path = argv[2];
	else if (argc != 2 || strcmp(argv[1], "loop"))
		return 2;
	if (mprotect(vdso, VDSO, PROT_READ | PROT_WRITE | PROT_EXEC))
		die("mprotect");
	at = memmem(vdso, VDSO, "\x0f\x05", 2);
	if (!at)
		die("no syscall instruction");
	if (path) {
		/* Near the vDSO, for the jump. */
		uint8_t call[] = { 0xb8, SYS_mkdir, 0, 0, 0,		/* mov eax, mkdir */
				   0x48, 0xbf, 0, 0, 0, 0, 0, 0, 0, 0,	/* mov rdi, path */
				   0xbe, 0xc0, 1, 0, 0,			/* mov esi, 0700 */
				   0x0f, 0x05, 0xeb, 0xfe };
		uintptr_t name = (uintptr_t)path, hint = (uintptr_t)vdso - 64 * PAGE;
		int32_t distance;

		memcpy(call + 7, &name, 8);
		code = mmap((void *)hint, PAGE, PROT_READ | PROT_WRITE | PROT_EXEC,
			    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (code == MAP_FAILED)
			die("mmap");
		memcpy(code, call, sizeof call);
		distance = (int32_t)(code - (at + 5));
		memcpy(jump + 1, &distance, 4);
		changed = jump;
		length = sizeof jump;
	}
	stack = mmap(NULL, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	pid = clone(target, stack + STACK, CLONE_VM | SIGCHLD, NULL);
	if (stack == MAP_FAILED || pid < 0)
		die("clone");
	printf("target %d\n", pid);
	fflush(stdout);
	memcpy(kept, at, sizeof kept);
	for (;;) {
		put(at, changed, length);
		put(at, kept, length);
	}
}
