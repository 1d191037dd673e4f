/*
 * Loaded by the CRIU of scripts/install-criu, ahead of libc: two calls of CRIU 4.1 that fail here and there
 * though their answer can be known. Where they succeed nothing changes.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

static long (*next_syscall)(long, ...);

__attribute__((constructor)) static void find_next_syscall(void)
{
    next_syscall = dlsym(RTLD_NEXT, "syscall");
}

/*
 * Linux 6.16 refuses two socket options on all but a few families; CRIU before 4.2 asks every socket for them
 * and gives up (CRIU's issue 2705). Where they are refused they are off.
 */
int getsockopt(int fd, int level, int name, void *restrict value, socklen_t *restrict size)
{
    int result = next_syscall(SYS_getsockopt, fd, level, name, value, size);
    if (result == 0 || errno != EOPNOTSUPP || level != SOL_SOCKET
        || (name != SO_PASSCRED && name != SO_PASSSEC) || *size < sizeof(int))
        return result;
    *(int *)value = 0;
    *size = sizeof(int);
    return 0;
}

static rlim64_t parse_limit(const char *text)
{
    return strncmp(text, "unlimited", 9) == 0 ? RLIM64_INFINITY : strtoull(text, NULL, 10);
}

/*
 * A container's root without CAP_SYS_RESOURCE may not ask for the limits of another user's process.
 * They can be read all the same: /proc/PID/limits has one line for each, in the order of their numbers.
 */
static int read_limit(pid_t pid, unsigned resource, struct rlimit64 *limit)
{
    char path[32], line[128], soft[32], hard[32];
    int found = 0;
    snprintf(path, sizeof path, "/proc/%d/limits", pid);
    FILE *file = fopen(path, "re");
    if (!file)
        return -1;
    for (unsigned i = 0; fgets(line, sizeof line, file); i++) {
        /* Line 0 is the header; the names, which have blanks, fill 25 columns. */
        if (i == resource + 1 && strlen(line) > 26) {
            found = sscanf(line + 26, "%31s %31s", soft, hard) == 2;
            break;
        }
    }
    fclose(file);
    if (!found) {
        errno = EINVAL;
        return -1;
    }
    limit->rlim_cur = parse_limit(soft);
    limit->rlim_max = parse_limit(hard);
    return 0;
}

/* CRIU makes that call by number. All arguments are passed on, as libc does it, whether meant or not. */
long syscall(long number, ...)
{
    long a[6];
    va_list args;
    va_start(args, number);
    for (int i = 0; i < 6; i++)
        a[i] = va_arg(args, long);
    va_end(args);
    long result = next_syscall(number, a[0], a[1], a[2], a[3], a[4], a[5]);
    if (number == SYS_prlimit64 && result == -1 && errno == EPERM && !a[2] && a[3])
        return read_limit(a[0], a[1], (struct rlimit64 *)a[3]);
    return result;
}
