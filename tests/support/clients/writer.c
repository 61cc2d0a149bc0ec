// writer CASE FILE [ARG]: writers that end in ways Python cannot show.
//
// At each step the program prints the step's name and waits for a line on stdin, so a test can look in between.
// Pieces are 64 KiB of one letter.  RLIMIT_CORE is 0: a crash is the case, not its core file.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PIECE = 65536, THREADS = 4, MAPPED = 8192 };

static int file;
static long argument;
static pthread_barrier_t barrier;

static void fail(const char *what) {
    perror(what);
    _exit(99);
}

static void step(const char *name) {
    char c = 0;
    dprintf(1, "%s\n", name);
    while (c != '\n')
        if (read(0, &c, 1) != 1) _exit(98);
}

static void piece(char letter, off_t at) {
    char buffer[PIECE];
    memset(buffer, letter, sizeof buffer);
    if (pwrite(file, buffer, sizeof buffer, at) != PIECE) fail("pwrite");
}

static void *spin(void *unused) {
    // Writes over the same MiB for ever, so that a signal finds it inside or between two writes.
    (void)unused;
    for (off_t at = 0;; at = (at + PIECE) % (16 * PIECE)) piece('x', at);
    return NULL;
}

static void *idle(void *unused) {
    (void)unused;
    for (;;) pause();
    return NULL;
}

static void *write_quarter(void *index) {
    piece('a' + (char)(long)index, (long)index * PIECE);
    return NULL;
}

static void *exit_process(void *unused) {
    (void)unused;
    pthread_barrier_wait(&barrier);
    exit((int)argument);
}

static void *crash(void *unused) {
    (void)unused;
    pthread_barrier_wait(&barrier);
    *(volatile int *)argument = 1;  // argument is 0: a true SIGSEGV
    return NULL;
}

static void *abort_process(void *unused) {
    (void)unused;
    pthread_barrier_wait(&barrier);
    abort();
}

static void *write_and_exit(void *leader) {
    // The main thread has ended by pthread_exit: this process is a zombie leader with a living writer.
    pthread_join(*(pthread_t *)leader, NULL);
    step("half");
    piece('b', PIECE);
    if (argument) exit((int)argument);
    if (close(file)) fail("close");
    step("closed");
    _exit(0);
}

static void *open_in_thread(void *path) {
    file = open(path, O_CREAT | O_TRUNC | O_RDWR, 0644);
    return NULL;
}

static void *close_in_thread(void *unused) {
    (void)unused;
    if (close(file)) fail("close");
    return NULL;
}

static pthread_t thread(void *(*body)(void *), void *value) {
    pthread_t id;
    if (pthread_create(&id, NULL, body, value)) fail("pthread_create");
    return id;
}

static void run_barrier_thread(void *(*body)(void *)) {
    for (int i = 0; i < 3; i++) thread(idle, NULL);
    thread(body, NULL);
    piece('a', 0);
    step("half");
    pthread_barrier_wait(&barrier);
    idle(NULL);
}

int main(int count, char **values) {
    if (count < 3) return 97;
    const char *name = values[1], *path = values[2];
    struct rlimit no_core = {0, 0};
    setrlimit(RLIMIT_CORE, &no_core);
    alarm(120);
    argument = count > 3 ? atol(values[3]) : 0;
    pthread_barrier_init(&barrier, NULL, 2);

    if (!strcmp(name, "thread_open_close")) {  // opened by one thread, written by another, closed by a third
        pthread_join(thread(open_in_thread, (void *)path), NULL);
        if (file < 0) fail(path);
        piece('a', 0);
        step("half");
        piece('b', PIECE);
        pthread_join(thread(close_in_thread, NULL), NULL);
        step("closed");
        return 0;
    }
    file = open(path, O_CREAT | O_TRUNC | O_RDWR, 0644);
    if (file < 0) fail(path);
    if (!strcmp(name, "spin")) {  // one thread, killed from outside
        piece('x', 0);
        step("half");
        spin(NULL);
    }
    if (!strcmp(name, "spin_threads")) {  // all threads write, the main thread too
        piece('x', 0);
        for (int i = 0; i < THREADS; i++) thread(spin, NULL);
        step("half");
        spin(NULL);
    }
    if (!strcmp(name, "spin_main")) {  // the main thread writes, others are idle
        for (int i = 0; i < THREADS; i++) thread(idle, NULL);
        piece('x', 0);
        step("half");
        spin(NULL);
    }
    if (!strcmp(name, "spin_worker")) {  // a worker writes, the main thread is idle
        piece('x', 0);
        thread(spin, NULL);
        step("half");
        idle(NULL);
    }
    if (!strcmp(name, "threads_write")) {  // four threads write a quarter each; the main thread closes
        pthread_t writers[THREADS];
        for (long i = 0; i < THREADS; i++) writers[i] = thread(write_quarter, (void *)i);
        for (int i = 0; i < THREADS; i++) pthread_join(writers[i], NULL);
        step("half");
        if (close(file)) fail("close");
        step("closed");
        return 0;
    }
    if (!strcmp(name, "exit")) {
        piece('a', 0);
        step("half");
        exit((int)argument);
    }
    if (!strcmp(name, "exit_worker")) run_barrier_thread(exit_process);
    if (!strcmp(name, "crash_worker")) run_barrier_thread(crash);
    if (!strcmp(name, "abort_worker")) run_barrier_thread(abort_process);
    if (!strcmp(name, "crash")) {
        piece('a', 0);
        step("half");
        *(volatile int *)argument = 1;
    }
    if (!strcmp(name, "leader_exit")) {
        static pthread_t leader;
        leader = pthread_self();
        piece('a', 0);
        thread(write_and_exit, &leader);
        pthread_exit(NULL);
    }
    if (!strcmp(name, "map_after_close") || !strcmp(name, "map_exit")) {
        if (ftruncate(file, MAPPED)) fail("ftruncate");
        char *map = mmap(NULL, MAPPED, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        if (map == MAP_FAILED) fail("mmap");
        memset(map, 'a', MAPPED);
        if (close(file)) fail("close");
        step("closed");
        memset(map + MAPPED / 2, 'b', MAPPED / 2);
        if (!strcmp(name, "map_exit")) return 0;
        if (munmap(map, MAPPED)) fail("munmap");
        step("unmapped");
        return 0;
    }
    return 97;
}
