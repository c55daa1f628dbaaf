/* Fail, kill or stop this process at the n-th file operation below a folder. For fault_server.py.

   Loaded with LD_PRELOAD, so that it sees every library's operations: Python's, Arrow's, those of
   safetensors (Rust). It counts what changes files or names: open for writing, write, truncate,
   fsync, rename, mkdir, unlink, rmdir, link. Nothing is flushed for real: a test does not cut power. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { NONE, FAIL, FULL, KILL, TEAR, STOP, CLOCK };

static char folder[PATH_MAX];
static size_t folder_length;
static long counted, armed_at = -1;
static int kind = NONE, number, full, journal = -1;
static long clock_offset;

#define REAL(name) ((__typeof__(&name))real(#name))

static void *real(const char *name) { return dlsym(RTLD_NEXT, name); }

/* Watch a folder from now on and do `how` at operation `at` (from 0); -1 counts only.
   `lines` is a file descriptor that gets a line for each operation, or -1. */
void faults_arm(const char *path, int how, long at, int error, int lines) {
  snprintf(folder, sizeof folder, "%s", path);
  folder_length = strlen(folder);
  counted = 0, armed_at = at, kind = how, number = error, full = 0, journal = lines;
}

void faults_disarm(void) { folder_length = 0; full = 0; }

/* Seconds by which the wall clock is wrong. */
void faults_set_clock(long seconds) { clock_offset = seconds; }

static int below(const char *path) {
  return folder_length && path && !strncmp(path, folder, folder_length) &&
         (path[folder_length] == '/' || !path[folder_length]);
}

static const char *named(int directory, const char *path, char *room) {
  char link[64], base[PATH_MAX];
  if (path[0] == '/') return path;
  if (directory == AT_FDCWD) {
    if (!getcwd(base, sizeof base)) return path;
  } else {
    snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
    ssize_t length = readlink(link, base, sizeof base - 1);
    if (length < 0) return path;
    base[length] = 0;
  }
  snprintf(room, PATH_MAX * 2, "%s/%s", base, path);
  return room;
}

static const char *path_of(int descriptor, char *room) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t length = readlink(link, room, PATH_MAX - 1);
  if (length < 0) return NULL;
  room[length] = 0;
  return room;
}

/* Count an operation; returns the error it must end with, or 0. `needs_space` says that it fails on
   a full disk. `torn` is set where a write must be cut in half first. */
static int meets(const char *what, const char *path, int needs_space, int *torn) {
  if (!below(path)) return 0;
  if (journal >= 0) {
    static __typeof__(&write) put;
    if (!put) put = REAL(write);
    char line[PATH_MAX + 64];
    int length = snprintf(line, sizeof line, "%s %s\n", what, path + folder_length);
    if (put(journal, line, length) < 0) abort();
  }
  if (full && needs_space) return number;
  if (counted++ != armed_at) return 0;
  switch (kind) {
    case FAIL: return number;
    case FULL: full = 1; if (torn) *torn = 1; return needs_space ? number : 0;
    case KILL: kill(getpid(), SIGKILL); pause(); return 0;
    case TEAR: if (torn) { *torn = 1; return EIO; } kill(getpid(), SIGKILL); pause(); return 0;
    case STOP: kill(getpid(), SIGSTOP); return 0;
    case CLOCK: clock_offset = -86400; return 0;
  }
  return 0;
}

#define OPEN_BODY(call)                                                            \
  mode_t mode = 0;                                                                 \
  if (flags & (O_CREAT | O_TMPFILE)) {                                             \
    va_list rest; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); \
  }                                                                                \
  char room[PATH_MAX * 2];                                                         \
  int error = 0;                                                                   \
  if (folder_length && flags & (O_WRONLY | O_RDWR | O_CREAT))                      \
    error = meets("open", named(directory, path, room), flags & O_CREAT, NULL);    \
  if (error) { errno = error; return -1; }                                         \
  return call;

int open(const char *path, int flags, ...) {
  int directory = AT_FDCWD; OPEN_BODY(REAL(open)(path, flags, mode))
}
int open64(const char *path, int flags, ...) {
  int directory = AT_FDCWD; OPEN_BODY(REAL(open64)(path, flags, mode))
}
int openat(int directory, const char *path, int flags, ...) {
  OPEN_BODY(REAL(openat)(directory, path, flags, mode))
}
int openat64(int directory, const char *path, int flags, ...) {
  OPEN_BODY(REAL(openat64)(directory, path, flags, mode))
}

/* What a written descriptor's operation must end with. */
static int meets_on(const char *what, int descriptor, int needs_space, int *torn) {
  char room[PATH_MAX];
  if (!folder_length || descriptor == journal) return 0;
  return meets(what, path_of(descriptor, room), needs_space, torn);
}

static void after_tear(void) {
  if (kind == TEAR) { kill(getpid(), SIGKILL); pause(); }
}

ssize_t write(int descriptor, const void *data, size_t size) {
  static __typeof__(&write) put;
  if (!put) put = REAL(write);
  int torn = 0, error = meets_on("write", descriptor, 1, &torn);
  if (torn && size > 1 && put(descriptor, data, size / 2) < 0) abort();
  if (error) { after_tear(); errno = error; return -1; }
  return put(descriptor, data, size);
}
ssize_t writev(int descriptor, const struct iovec *parts, int count) {
  int torn = 0, error = meets_on("write", descriptor, 1, &torn);
  if (torn && count && REAL(write)(descriptor, parts[0].iov_base, parts[0].iov_len / 2) < 0) abort();
  if (error) { after_tear(); errno = error; return -1; }
  return REAL(writev)(descriptor, parts, count);
}

#define ON_DESCRIPTOR(result, name, what, space, declared, passed)     \
  result name declared {                                               \
    int error = meets_on(what, descriptor, space, NULL);               \
    if (error) { errno = error; return -1; }                           \
    return REAL(name) passed;                                          \
  }
ON_DESCRIPTOR(ssize_t, pwrite, "write", 1,
              (int descriptor, const void *data, size_t size, off_t at), (descriptor, data, size, at))
ON_DESCRIPTOR(ssize_t, pwrite64, "write", 1,
              (int descriptor, const void *data, size_t size, off64_t at), (descriptor, data, size, at))
ON_DESCRIPTOR(int, ftruncate, "truncate", 0, (int descriptor, off_t size), (descriptor, size))
ON_DESCRIPTOR(int, ftruncate64, "truncate", 0, (int descriptor, off64_t size), (descriptor, size))
ON_DESCRIPTOR(ssize_t, sendfile, "write", 1,
              (int descriptor, int from, off_t *at, size_t size), (descriptor, from, at, size))
ON_DESCRIPTOR(ssize_t, sendfile64, "write", 1,
              (int descriptor, int from, off64_t *at, size_t size), (descriptor, from, at, size))

ssize_t copy_file_range(int from, off64_t *at, int descriptor, off64_t *to, size_t size,
                        unsigned flags) {
  int error = meets_on("write", descriptor, 1, NULL);
  if (error) { errno = error; return -1; }
  return REAL(copy_file_range)(from, at, descriptor, to, size, flags);
}

int posix_fallocate(int descriptor, off_t at, off_t size) {
  int error = meets_on("allocate", descriptor, 1, NULL);
  return error ? error : REAL(posix_fallocate)(descriptor, at, size);
}

static int flushed(int descriptor) {
  int error = meets_on("fsync", descriptor, 1, NULL);
  if (error) { errno = error; return -1; }
  return 0;
}
int fsync(int descriptor) { return flushed(descriptor); }
int fdatasync(int descriptor) { return flushed(descriptor); }

#define ON_PATH(name, what, space, declared, directory, passed)             \
  int name declared {                                                       \
    char room[PATH_MAX * 2];                                                \
    int error = folder_length ? meets(what, named(directory, path, room), space, NULL) : 0; \
    if (error) { errno = error; return -1; }                                \
    return REAL(name) passed;                                               \
  }
/* A rename is named by its new path. */
ON_PATH(rename, "rename", 0, (const char *old, const char *path), AT_FDCWD, (old, path))
ON_PATH(renameat, "rename", 0, (int from, const char *old, int to, const char *path), to,
        (from, old, to, path))
ON_PATH(mkdir, "mkdir", 1, (const char *path, mode_t mode), AT_FDCWD, (path, mode))
ON_PATH(mkdirat, "mkdir", 1, (int directory, const char *path, mode_t mode), directory,
        (directory, path, mode))
ON_PATH(unlink, "unlink", 0, (const char *path), AT_FDCWD, (path))
ON_PATH(unlinkat, "unlink", 0, (int directory, const char *path, int flags), directory,
        (directory, path, flags))
ON_PATH(rmdir, "rmdir", 0, (const char *path), AT_FDCWD, (path))
ON_PATH(link, "link", 1, (const char *old, const char *path), AT_FDCWD, (old, path))
ON_PATH(symlink, "link", 1, (const char *old, const char *path), AT_FDCWD, (old, path))

int clock_gettime(clockid_t which, struct timespec *now) {
  static __typeof__(&clock_gettime) ask;
  if (!ask) ask = REAL(clock_gettime);
  int result = ask(which, now);
  if (which == CLOCK_REALTIME) now->tv_sec += clock_offset;
  return result;
}
time_t time(time_t *where) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (where) *where = now.tv_sec;
  return now.tv_sec;
}
