/* Operations on the contents of one file of `size` bytes, in blocks of `block` bytes. */

#include "client.h"

#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static off_t random_offset(struct work *work)
{
    work->random ^= work->random << 13;
    work->random ^= work->random >> 7;
    work->random ^= work->random << 17;
    return (off_t)(work->random % (uint64_t)(work->size / work->block)) * work->block;
}

static long write_next(struct work *work, long number, int flags)
{
    if (number == 0)
        work->fd = check(open(work->path, O_WRONLY | flags, 0644), work->path);
    check_whole(write(work->fd, work->buffer, work->block), work->block, "write");
    return work->block;
}

static long write_new(struct work *work, long number)
{
    return write_next(work, number, O_CREAT | O_TRUNC);
}

static long write_existing(struct work *work, long number)
{
    return write_next(work, number, 0);
}

static void sync_and_close(struct work *work)
{
    check(fsync(work->fd), "fsync");
    check(close(work->fd), "close");
}

/* A file that was just written, left open for what comes next. */
static void fill_dirty(struct work *work)
{
    work->fd = check(open(work->path, O_RDWR | O_CREAT | O_TRUNC, 0644), work->path);
    for (long done = 0; done < work->size; done += BUFFER_BYTES)
        check_whole(write(work->fd, work->buffer, BUFFER_BYTES), BUFFER_BYTES, "write");
}

/* The same with all its blocks on disk, and clean. */
static void fill(struct work *work)
{
    fill_dirty(work);
    check(fsync(work->fd), "fsync");
}

static long close_written(struct work *work, long number)
{
    (void)number;
    check(close(work->fd), "close");
    return work->size;
}

static long sync_and_close_written(struct work *work, long number)
{
    check(fsync(work->fd), "fsync");
    return close_written(work, number);
}

static long overwrite_at(struct work *work, off_t offset)
{
    check_whole(pwrite(work->fd, work->buffer, work->block, offset), work->block, "pwrite");
    return work->block;
}

static long overwrite(struct work *work, long number)
{
    return overwrite_at(work, number * work->block);
}

static long overwrite_randomly(struct work *work, long number)
{
    (void)number;
    return overwrite_at(work, random_offset(work));
}

static void open_for_reading(struct work *work)
{
    work->fd = check(open(work->path, O_RDONLY), work->path);
}

static long read_next(struct work *work, long number)
{
    (void)number;
    check_whole(read(work->fd, work->buffer, work->block), work->block, "read");
    return work->block;
}

static long read_randomly(struct work *work, long number)
{
    (void)number;
    check_whole(pread(work->fd, work->buffer, work->block, random_offset(work)), work->block, "pread");
    return work->block;
}

static void map_for_reading(struct work *work)
{
    open_for_reading(work);
    work->map = mmap(NULL, work->size, PROT_READ, MAP_SHARED, work->fd, 0);
    if (work->map == MAP_FAILED)
        fail("mmap");
}

static long copy_from_map(struct work *work, long number)
{
    memcpy(work->buffer, work->map + number * work->block, work->block);
    return work->block;
}

const struct operation content_operations[] = {
    {"write", NULL, write_new, NULL},
    {"write-sync", NULL, write_new, sync_and_close},
    {"modify-sync", NULL, write_existing, sync_and_close},
    {"close", fill_dirty, close_written, NULL},
    {"sync-close", fill_dirty, sync_and_close_written, NULL},
    {"overwrite", fill, overwrite, NULL},
    {"overwrite-sync", fill, overwrite, sync_and_close},
    {"overwrite-randomly", fill, overwrite_randomly, NULL},
    {"read", open_for_reading, read_next, NULL},
    {"read-randomly", open_for_reading, read_randomly, NULL},
    {"mmap", map_for_reading, copy_from_map, NULL},
    {NULL, NULL, NULL, NULL},
};
