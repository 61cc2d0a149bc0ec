/* Operations on names and small files.

   Files that exist are called f000000, f000001 and so on.  All names are relative to the working directory, so that
   every filesystem is asked for one name and not for the directories above it as well. */

#define _GNU_SOURCE
#include "client.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* Cheap operations come in batches, so that the loop's look at the clock does not count. */
enum { NAME_BYTES = 32, SMALL_FILE_BYTES = 4096, BATCH = 16 };

static void enter(struct work *work)
{
    check(chdir(work->path), work->path);
}

/* Enters the directory and writes the names down in advance; processes start at different ones. */
static void enter_with_names(struct work *work)
{
    enter(work);
    work->names = malloc(work->files * NAME_BYTES);
    for (long number = 0; number < work->files; number++)
        snprintf(work->names + number * NAME_BYTES, NAME_BYTES, "f%06ld", (number + work->index * 37) % work->files);
}

static const char *name(const struct work *work, long number)
{
    return work->names + number % work->files * NAME_BYTES;
}

static void hold_files(struct work *work)
{
    enter_with_names(work);
    work->handles = calloc(work->files, sizeof *work->handles);
    for (long number = 0; number < work->files; number++)
        work->handles[number] = check(open(name(work, number), O_PATH), "open");
}

/* One GETATTR each: the descriptor needs no lookup, and the flag passes over the attributes that the kernel has. */
static long get_attributes(struct work *work, long number)
{
    struct statx status;

    for (long i = number * BATCH; i < (number + 1) * BATCH; i++)
        check(statx(work->handles[i % work->files], "", AT_EMPTY_PATH | AT_STATX_FORCE_SYNC, STATX_BASIC_STATS, &status),
              "statx");
    return BATCH;
}

static long stat_names(struct work *work, long number)
{
    struct stat status;

    for (long i = number * BATCH; i < (number + 1) * BATCH; i++)
        check(stat(name(work, i), &status), "stat");
    return BATCH;
}

static long open_close(struct work *work, long number)
{
    check(close(check(open(name(work, number), O_RDONLY), "open")), "close");
    return 1;
}

static long open_read_close(struct work *work, long number)
{
    int fd = check(open(name(work, number), O_RDONLY), "open");

    check_whole(read(fd, work->buffer, SMALL_FILE_BYTES), SMALL_FILE_BYTES, "read");
    check(close(fd), "close");
    return 1;
}

/* Names of new files, each process its own. */
static void new_name(const struct work *work, char *buffer, const char *prefix, long number)
{
    snprintf(buffer, NAME_BYTES, "%sp%d-%ld", prefix, work->index, number);
}

static void write_small(struct work *work, const char *path, int flags, int durable)
{
    int fd = check(open(path, O_WRONLY | flags, 0644), "open");

    check_whole(write(fd, work->buffer, SMALL_FILE_BYTES), SMALL_FILE_BYTES, "write");
    if (durable)
        check(fsync(fd), "fsync");
    check(close(fd), "close");
}

static long create_small(struct work *work, long number)
{
    char path[NAME_BYTES];

    new_name(work, path, "", number);
    write_small(work, path, O_CREAT | O_EXCL, 0);
    return 1;
}

static void create_files(struct work *work)
{
    enter(work);
    for (long number = 0; number < work->files; number++)
        create_small(work, number);
}

static long rewrite_small(struct work *work, long number)
{
    char path[NAME_BYTES];

    new_name(work, path, "", number % work->files);
    write_small(work, path, O_TRUNC, 0);
    return 1;
}

static void enter_and_open(struct work *work)
{
    enter(work);
    work->fd = check(open(".", O_RDONLY | O_DIRECTORY), work->path);
}

/* What a careful program does by hand to put a file in place: write aside, sync, rename, sync the directory. */
static long publish_by_hand(struct work *work, long number)
{
    char path[NAME_BYTES], aside[NAME_BYTES];

    new_name(work, path, "", number);
    new_name(work, aside, ".tmp-", number);
    write_small(work, aside, O_CREAT | O_EXCL, 1);
    check(rename(aside, path), "rename");
    check(fsync(work->fd), "fsync of the directory");
    return 1;
}

/* Lists a directory and returns its number of entries; `deep` adds a stat of each and goes into subdirectories. */
static long list(int directory, int deep)
{
    DIR *stream = fdopendir(directory);
    struct dirent *entry;
    struct stat status;
    long count = 0;

    if (!stream)
        fail("opendir");
    while (errno = 0, (entry = readdir(stream))) {
        if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, ".."))
            continue;
        count++;
        if (!deep)
            continue;
        check(fstatat(dirfd(stream), entry->d_name, &status, AT_SYMLINK_NOFOLLOW), "stat");
        if (S_ISDIR(status.st_mode))
            count += list(check(openat(dirfd(stream), entry->d_name, O_RDONLY | O_DIRECTORY), "open"), 1);
    }
    if (errno)
        fail("readdir");
    closedir(stream);
    return count;
}

static long list_directory(struct work *work, long number)
{
    (void)number;
    return list(check(open(work->path, O_RDONLY | O_DIRECTORY), work->path), 0);
}

static long walk_tree(struct work *work, long number)
{
    (void)number;
    return list(check(open(work->path, O_RDONLY | O_DIRECTORY), work->path), 1);
}

const struct operation name_operations[] = {
    {"getattr", hold_files, get_attributes, NULL},
    {"stat", enter_with_names, stat_names, NULL},
    {"open", enter_with_names, open_close, NULL},
    {"open-read", enter_with_names, open_read_close, NULL},
    {"create", enter, create_small, NULL},
    {"rewrite", create_files, rewrite_small, NULL},
    {"publish", enter_and_open, publish_by_hand, NULL},
    {"list", NULL, list_directory, NULL},
    {"walk", NULL, walk_tree, NULL},
    {NULL, NULL, NULL, NULL},
};
