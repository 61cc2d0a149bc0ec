/* What the parts of the benchmark client share: one process's work, and the operations it can repeat. */

#ifndef CLIENT_H
#define CLIENT_H

#include <stdint.h>
#include <sys/types.h>

/* What the command line asked for (sizes in bytes), and what an operation keeps between its steps. */
struct work {
    const char *path;
    long size, block, files;
    int index; /* Which of the processes this is, from 0. */

    int fd;
    int *handles;
    char *buffer, *map, *names;
    uint64_t random;
};

/* Only steps and the finish are timed.  A step returns how many units it did: bytes, entries or operations. */
struct operation {
    const char *name;
    void (*setup)(struct work *);
    long (*step)(struct work *, long number);
    void (*finish)(struct work *);
};

/* All lists end with an operation without a name. */
extern const struct operation content_operations[];
extern const struct operation name_operations[];
extern const struct operation lock_operations[];

enum { BUFFER_BYTES = 1 << 20 };

/* End this process with a line that says what failed. */
void fail(const char *what);

/* The result of a system call; fails where it is negative. */
long check(long value, const char *what);

/* Fails unless a call moved as many bytes as it was asked to. */
void check_whole(ssize_t done, long wanted, const char *what);

#endif
