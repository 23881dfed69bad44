/* LD_PRELOAD shim for test_crash.py: while the file named by FAILING_SYNC exists, fsync and fdatasync fail with EIO,
 * as on a disk that lost a write. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

static int sync_or_fail(int fd, const char *name) {
    const char *sign = getenv("FAILING_SYNC");
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
    if (sign && access(sign, F_OK) == 0) {
        errno = EIO;
        return -1;
    }
    return real(fd);
}

int fsync(int fd) { return sync_or_fail(fd, "fsync"); }
int fdatasync(int fd) { return sync_or_fail(fd, "fdatasync"); }
