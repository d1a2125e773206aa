/* A library to be preloaded: it lets the n-th call fail that opens, reads, writes, flushes, renames or
   removes something below a folder, or lets a write stop halfway. See injection.py. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static char prefix[PATH_MAX];
static long fails_at, calls, hits;
static unsigned choice;
static int sticky;

static const int reading[] = {EIO, EACCES, EMFILE, ESTALE};
static const int writing[] = {ENOSPC, EIO, EDQUOT, EROFS};

void fault_arm(const char *folder, long nth, unsigned seed, int lasting) {
    strncpy(prefix, folder, sizeof prefix - 1);
    fails_at = nth;
    choice = seed;
    sticky = lasting;
    calls = hits = 0;
}

long fault_calls(void) { return calls; }
long fault_hits(void) { return hits; }

/* Whether this call is to fail; sets errno. `kind`: 0 reads, 1 writes. */
static int due(const char *path, int kind) {
    if (!fails_at || !path || strncmp(path, prefix, strlen(prefix))) return 0;
    long number = __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST);
    if (number != fails_at && !(sticky && number > fails_at)) return 0;
    __atomic_add_fetch(&hits, 1, __ATOMIC_SEQ_CST);
    errno = kind ? writing[choice % 4] : reading[choice % 4];
    return 1;
}

static const char *path_at(int folder, const char *path, char *buffer) {
    if (!path || path[0] == '/') return path;
    char link[64];
    if (folder == AT_FDCWD)
        strcpy(link, "/proc/self/cwd");
    else
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    long length = syscall(SYS_readlinkat, AT_FDCWD, link, buffer, PATH_MAX / 2);
    if (length < 0) return NULL;
    snprintf(buffer + length, PATH_MAX / 2, "/%s", path);
    return buffer;
}

static int file_is_due(int file, int kind) {
    char link[64], buffer[PATH_MAX];
    if (!fails_at) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    long length = syscall(SYS_readlinkat, AT_FDCWD, link, buffer, sizeof buffer - 1);
    if (length < 0) return 0;
    buffer[length] = 0;
    return due(buffer, kind);
}

static int path_is_due(int folder, const char *path, int kind) {
    char buffer[PATH_MAX];
    return fails_at && due(path_at(folder, path, buffer), kind);
}

#define ORIGINAL(name) \
    static __typeof__(name) *original; \
    if (!original) original = dlsym(RTLD_NEXT, #name)

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        ORIGINAL(name); \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = va_arg(rest, mode_t); \
        va_end(rest); \
        if (path_is_due(AT_FDCWD, path, (flags & O_ACCMODE) != O_RDONLY)) return -1; \
        return original(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        ORIGINAL(name); \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = va_arg(rest, mode_t); \
        va_end(rest); \
        if (path_is_due(folder, path, (flags & O_ACCMODE) != O_RDONLY)) return -1; \
        return original(folder, path, flags, mode); \
    }
OPENAT(openat)
OPENAT(openat64)

ssize_t read(int file, void *data, size_t size) {
    ORIGINAL(read);
    return file_is_due(file, 0) ? -1 : original(file, data, size);
}
ssize_t pread(int file, void *data, size_t size, off_t at) {
    ORIGINAL(pread);
    return file_is_due(file, 0) ? -1 : original(file, data, size, at);
}
ssize_t pread64(int file, void *data, size_t size, off64_t at) {
    ORIGINAL(pread64);
    return file_is_due(file, 0) ? -1 : original(file, data, size, at);
}
ssize_t preadv(int file, const struct iovec *parts, int count, off_t at) {
    ORIGINAL(preadv);
    return file_is_due(file, 0) ? -1 : original(file, parts, count, at);
}
ssize_t preadv64(int file, const struct iovec *parts, int count, off64_t at) {
    ORIGINAL(preadv64);
    return file_is_due(file, 0) ? -1 : original(file, parts, count, at);
}

/* Half of the write is made; with an odd choice it is taken for success, as the system may do. */
static ssize_t half(ssize_t done) { return choice & 4 ? done : -1; }

ssize_t write(int file, const void *data, size_t size) {
    ORIGINAL(write);
    if (!file_is_due(file, 1)) return original(file, data, size);
    int error = errno;
    ssize_t done = original(file, data, size / 2);
    errno = error;
    return half(done > 0 ? done : -1);
}
ssize_t pwrite(int file, const void *data, size_t size, off_t at) {
    ORIGINAL(pwrite);
    return file_is_due(file, 1) ? -1 : original(file, data, size, at);
}
ssize_t pwrite64(int file, const void *data, size_t size, off64_t at) {
    ORIGINAL(pwrite64);
    return file_is_due(file, 1) ? -1 : original(file, data, size, at);
}
ssize_t writev(int file, const struct iovec *parts, int count) {
    ORIGINAL(writev);
    return file_is_due(file, 1) ? -1 : original(file, parts, count);
}
int fsync(int file) {
    ORIGINAL(fsync);
    return file_is_due(file, 1) ? -1 : original(file);
}
int fdatasync(int file) {
    ORIGINAL(fdatasync);
    return file_is_due(file, 1) ? -1 : original(file);
}
int ftruncate(int file, off_t size) {
    ORIGINAL(ftruncate);
    return file_is_due(file, 1) ? -1 : original(file, size);
}
int ftruncate64(int file, off64_t size) {
    ORIGINAL(ftruncate64);
    return file_is_due(file, 1) ? -1 : original(file, size);
}
int rename(const char *from, const char *to) {
    ORIGINAL(rename);
    return path_is_due(AT_FDCWD, to, 1) ? -1 : original(from, to);
}
int renameat(int from_folder, const char *from, int folder, const char *to) {
    ORIGINAL(renameat);
    return path_is_due(folder, to, 1) ? -1 : original(from_folder, from, folder, to);
}
int mkdir(const char *path, mode_t mode) {
    ORIGINAL(mkdir);
    return path_is_due(AT_FDCWD, path, 1) ? -1 : original(path, mode);
}
int unlink(const char *path) {
    ORIGINAL(unlink);
    return path_is_due(AT_FDCWD, path, 1) ? -1 : original(path);
}
int symlink(const char *to, const char *path) {
    ORIGINAL(symlink);
    return path_is_due(AT_FDCWD, path, 1) ? -1 : original(to, path);
}
int stat(const char *path, struct stat *found) {
    ORIGINAL(stat);
    return path_is_due(AT_FDCWD, path, 0) ? -1 : original(path, found);
}
int stat64(const char *path, struct stat64 *found) {
    ORIGINAL(stat64);
    return path_is_due(AT_FDCWD, path, 0) ? -1 : original(path, found);
}
