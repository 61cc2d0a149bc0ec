/* Operations on one open file that nobody else uses: what a lock costs, and what any request costs at the least.

   Each process makes a file of its own in PATH.  Its name has safefs write it in place, so that every close of a
   descriptor sends a FLUSH. */

#include "client.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <termios.h>
#include <unistd.h>

enum { PATH_BYTES = 4096, ROUND = 16 };

static void open_lock_file(struct work *work)
{
    char path[PATH_BYTES];

    snprintf(path, sizeof path, "%s/p%d.lock", work->path, work->index);
    work->fd = check(open(path, O_RDWR | O_CREAT, 0644), path);
}

/* Two requests; units are requests. */
static long lock_and_unlock(struct work *work, long number)
{
    (void)number;
    for (int i = 0; i < ROUND; i += 2) {
        check(flock(work->fd, LOCK_EX), "flock");
        check(flock(work->fd, LOCK_UN), "flock");
    }
    return ROUND;
}

/* The kernel knows no answer to this ioctl, and safefs answers it without a look at anything: an empty round trip. */
static long ask_for_nothing(struct work *work, long number)
{
    struct termios settings;

    (void)number;
    for (int i = 0; i < ROUND; i++)
        if (ioctl(work->fd, TCGETS, &settings) == 0 || errno != ENOTTY)
            fail("ioctl of a file that is no terminal");
    return ROUND;
}

/* FLUSH and nothing else: the file stays open. */
static long close_a_copy(struct work *work, long number)
{
    (void)number;
    for (int i = 0; i < ROUND; i++)
        check(close(check(dup(work->fd), "dup")), "close");
    return ROUND;
}

const struct operation lock_operations[] = {
    {"flock", open_lock_file, lock_and_unlock, NULL},
    {"empty", open_lock_file, ask_for_nothing, NULL},
    {"flush", open_lock_file, close_a_copy, NULL},
    {NULL, NULL, NULL, NULL},
};
