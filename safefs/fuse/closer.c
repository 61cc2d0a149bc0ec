/* The thread that closes descriptors of inodes.
 *
 * The last close(2) of an inode that has no name any more frees its pages and blocks: hundreds of milliseconds for a
 * large file, and on a network filesystem as long as its server takes.  Where requests are read, under the table's
 * lock and on the event loop nobody can wait for that.  A close that somebody relies on, because it gives a lock or a
 * lease back or ends a writer, is none of this thread's.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "hot.h"
#include <pthread.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

static struct {
	pthread_mutex_t lock;
	pthread_cond_t filled, emptied;
	int *waiting; /* a ring */
	size_t first, count; /* with the one that is being closed */
	size_t most; /* 0 until the thread runs */
} queue = {.lock = PTHREAD_MUTEX_INITIALIZER, .filled = PTHREAD_COND_INITIALIZER, .emptied = PTHREAD_COND_INITIALIZER};

static void *run_closer(void *unused)
{
	pthread_mutex_lock(&queue.lock);
	for (;;) {
		while (!queue.count)
			pthread_cond_wait(&queue.filled, &queue.lock);
		int fd = queue.waiting[queue.first];
		pthread_mutex_unlock(&queue.lock);
		close(fd);
		pthread_mutex_lock(&queue.lock);
		queue.first = (queue.first + 1) % queue.most;
		if (!--queue.count)
			pthread_cond_broadcast(&queue.emptied);
	}
	return unused;
}

bool closer_start(size_t most)
{
	pthread_mutex_lock(&queue.lock);
	if (!queue.most && (queue.waiting = calloc(most, sizeof *queue.waiting)) && start_thread(run_closer, NULL))
		queue.most = most;
	bool started = queue.most != 0;
	pthread_mutex_unlock(&queue.lock);
	return started;
}

bool closer_takes(int fd)
{
	pthread_mutex_lock(&queue.lock);
	bool takes = queue.count < queue.most;
	if (takes) {
		queue.waiting[(queue.first + queue.count) % queue.most] = fd;
		if (!queue.count++)
			pthread_cond_signal(&queue.filled);
	}
	pthread_mutex_unlock(&queue.lock);
	return takes;
}

void close_later(int fd)
{
	if (!closer_takes(fd))
		close(fd);
}

size_t closer_waiting(void)
{
	pthread_mutex_lock(&queue.lock);
	size_t count = queue.count;
	pthread_mutex_unlock(&queue.lock);
	return count;
}

bool closer_wait(struct timespec longest)
{
	struct timespec deadline;
	clock_gettime(CLOCK_REALTIME, &deadline);
	deadline.tv_sec += longest.tv_sec;
	deadline.tv_nsec += longest.tv_nsec;
	if (deadline.tv_nsec >= 1000000000) {
		deadline.tv_sec++;
		deadline.tv_nsec -= 1000000000;
	}
	pthread_mutex_lock(&queue.lock);
	while (queue.count && pthread_cond_timedwait(&queue.emptied, &queue.lock, &deadline) == 0)
		;
	bool done = !queue.count;
	pthread_mutex_unlock(&queue.lock);
	return done;
}
