/* The clients of the benchmarks: processes that do one operation in a loop, started together.

   client OPERATION PROCESSES SECONDS STEPS SIZE BLOCK FILES PATH...

   Every process (the i-th one works on the i-th PATH, cyclically) sets up and says so.  When all are ready, the parent
   prints "ready" and waits for a line; then all of them repeat the operation's step, STEPS times or until SECONDS have
   passed, 0 standing for no limit.  The result is one line of JSON: "units" (bytes, entries or operations) of all
   processes together, "rate" the sum of their units per second, "seconds" the longest loop, "cpu" the processor time in
   seconds of all loops.  SIZE and BLOCK are bytes; FILES is how many files a loop goes round. */

#include "client.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { FIRST_PATH = 8 };

struct result {
    long units;
    double seconds, cpu;
};

void fail(const char *what)
{
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    _exit(1);
}

long check(long value, const char *what)
{
    if (value < 0)
        fail(what);
    return value;
}

void check_whole(ssize_t done, long wanted, const char *what)
{
    if (check(done, what) != wanted) {
        errno = EIO;
        fail(what);
    }
}

static double now(clockid_t clock)
{
    struct timespec time;

    clock_gettime(clock, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

static const struct operation *find_operation(const char *name)
{
    const struct operation *lists[] = {content_operations, name_operations, lock_operations};

    for (size_t list = 0; list < sizeof lists / sizeof *lists; list++)
        for (const struct operation *operation = lists[list]; operation->name; operation++)
            if (!strcmp(operation->name, name))
                return operation;
    fprintf(stderr, "unknown operation %s\n", name);
    exit(2);
}

static void repeat(const struct operation *operation, struct work *work, char **argv, struct result *result)
{
    double limit = atof(argv[3]), start = now(CLOCK_MONOTONIC), cpu = now(CLOCK_PROCESS_CPUTIME_ID);
    long steps = atol(argv[4]), step = 0;

    do
        result->units += operation->step(work, step);
    while (++step != steps && (!limit || now(CLOCK_MONOTONIC) - start < limit));
    if (operation->finish)
        operation->finish(work);
    result->seconds = now(CLOCK_MONOTONIC) - start;
    result->cpu = now(CLOCK_PROCESS_CPUTIME_ID) - cpu;
}

/* One process from its setup to its end; it reports on `ready` and begins with a byte from `go`. */
static void work_alone(int index, int argc, char **argv, int ready, int go, struct result *result)
{
    const struct operation *operation = find_operation(argv[1]);
    struct work work = {
        .path = argv[FIRST_PATH + index % (argc - FIRST_PATH)],
        .size = atol(argv[5]),
        .block = atol(argv[6]),
        .files = atol(argv[7]),
        .index = index,
        .buffer = malloc(BUFFER_BYTES),
        .random = 88172645463325252u + index,
    };
    char byte = 0;

    memset(work.buffer, 'x', BUFFER_BYTES);
    if (operation->setup)
        operation->setup(&work);
    check_whole(write(ready, &byte, 1), 1, "barrier");
    close(ready);
    check_whole(read(go, &byte, 1), 1, "barrier");
    repeat(operation, &work, argv, result);
    _exit(0);
}

/* Starts the processes together; 0 if one of them failed. */
static int run(int processes, int argc, char **argv, struct result *results)
{
    int ready[2], go[2], status, failed = 0;
    char byte = 0;

    if (pipe(ready) || pipe(go))
        fail("pipe");
    for (int index = 0; index < processes; index++)
        if (!check(fork(), "fork")) {
            close(go[1]);
            work_alone(index, argc, argv, ready[1], go[0], &results[index]);
        }
    close(ready[1]);
    for (int index = 0; index < processes; index++)
        if (read(ready[0], &byte, 1) != 1)
            return 0;
    printf("ready\n");
    fflush(stdout);
    if (getchar() == EOF)
        return 0;
    for (int index = 0; index < processes; index++)
        check_whole(write(go[1], &byte, 1), 1, "barrier");
    while (wait(&status) > 0)
        failed |= status;
    return !failed;
}

int main(int argc, char **argv)
{
    if (argc <= FIRST_PATH) {
        fprintf(stderr, "usage: client OPERATION PROCESSES SECONDS STEPS SIZE BLOCK FILES PATH...\n");
        return 2;
    }
    find_operation(argv[1]);
    int processes = atoi(argv[2]);
    struct result *results, sum = {0};
    double rate = 0;

    results = mmap(NULL, processes * sizeof *results, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (results == MAP_FAILED)
        fail("mmap");
    if (!run(processes, argc, argv, results))
        return 1;
    for (int index = 0; index < processes; index++) {
        rate += results[index].units / results[index].seconds;
        sum.units += results[index].units;
        sum.cpu += results[index].cpu;
        if (results[index].seconds > sum.seconds)
            sum.seconds = results[index].seconds;
    }
    printf("{\"rate\": %.9g, \"units\": %ld, \"cpu\": %.9f, \"seconds\": %.9f}\n", rate, sum.units, sum.cpu, sum.seconds);
    return 0;
}
