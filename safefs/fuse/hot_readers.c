/* The threads that read the kernel's requests, and the queue through which pyfuse3 gets those that C leaves to it.
 *
 * A thread waits in epoll_wait(2) on a set of its own, in which the device is EPOLLEXCLUSIVE: one request wakes one
 * thread, the first that is idle.  read(2) and the decision what becomes of a request happen under one lock, so the
 * queue has the kernel's order.  Before a thread turns to an answer, which may block in the backing, it makes sure
 * that another one waits for the next request.
 *
 * pyfuse3 asks libfuse for a descriptor to wait for and for requests: both come from here once there are threads.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#define FUSE_USE_VERSION 312
#include "hot.h"
#include <errno.h>
#include <fcntl.h>
#include <fuse_lowlevel.h>
#include <linux/fuse.h>
#include <malloc.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/uio.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

#define MAX_THREADS 64
#define IDLE_THREADS 2 /* that stay */
#define IDLE_MS 500 /* of the others, until they end */
#define REQUEST_BYTES ((1u << 20) + 4096) /* what libfuse reads at once */
#define QUEUE_BYTES (64u << 20)
#define HANDED_OVER_BYTES (64u << 10) /* a longer request goes to Python in the buffer that it was read into */

atomic_ulong hot_answered[OPCODES], hot_passed[OPCODES];

static int device = -1; /* a descriptor of our own, which after the end leads nowhere */
static int stop_fd = -1; /* readable when the threads shall end */

/* Held while a request is read and its way decided. */
static pthread_mutex_t reading = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t thread_ended = PTHREAD_COND_INITIALIZER;
static size_t thread_count, idle_count; /* under `reading`; idle: not busy with an answer */

/* ------------------------------------------------------------------- queue */

struct request {
	struct request *next;
	char *bytes;
	size_t size;
};

static struct {
	pthread_mutex_t lock;
	pthread_cond_t room;
	struct request *first, **end;
	size_t bytes;
	bool ended; /* the connection is gone: nothing comes any more */
	int event_fd; /* readable while there is something to receive, or ever after the end */
} queue = {.lock = PTHREAD_MUTEX_INITIALIZER, .room = PTHREAD_COND_INITIALIZER, .event_fd = -1};

static void signal_queue(void)
{
	uint64_t one = 1;
	if (write(queue.event_fd, &one, sizeof one) < 0)
		return; /* EAGAIN: it is readable */
}

static void end_queue(void)
{
	pthread_mutex_lock(&queue.lock);
	queue.ended = true;
	signal_queue();
	pthread_mutex_unlock(&queue.lock);
}

/* Takes `bytes` over. */
static void push(struct request *request, char *bytes, size_t size)
{
	*request = (struct request){NULL, bytes, size};
	pthread_mutex_lock(&queue.lock);
	while (queue.bytes > QUEUE_BYTES && !queue.ended)
		pthread_cond_wait(&queue.room, &queue.lock);
	if (!queue.first) {
		queue.end = &queue.first;
		signal_queue();
	}
	*queue.end = request;
	queue.end = &request->next;
	queue.bytes += size;
	pthread_mutex_unlock(&queue.lock);
}

/* The next request for pyfuse3; NULL when there is none. */
static struct request *pop(bool *ended)
{
	pthread_mutex_lock(&queue.lock);
	struct request *request = queue.first;
	if (request) {
		queue.first = request->next;
		queue.bytes -= request->size;
		pthread_cond_signal(&queue.room);
	}
	*ended = queue.ended;
	uint64_t value;
	if (!queue.first && !queue.ended && read(queue.event_fd, &value, sizeof value) < 0)
		value = 0; /* EAGAIN: nobody has signalled */
	pthread_mutex_unlock(&queue.lock);
	return request;
}

/* Leave a request to Python.  Without memory its client gets the error, as from libfuse. */
static void pass_on(struct reader *reader, size_t size)
{
	const struct fuse_in_header *in = (const void *)reader->buffer;
	struct request *request = malloc(sizeof *request);
	char *bytes = malloc(size < HANDED_OVER_BYTES ? size : REQUEST_BYTES);
	if (!request || !bytes) {
		free(request);
		free(bytes);
		hot_reply(in->unique, ENOMEM, NULL, 0, NULL, 0);
		return;
	}
	atomic_fetch_add_explicit(&hot_passed[in->opcode % OPCODES], 1, memory_order_relaxed);
	if (size < HANDED_OVER_BYTES) {
		memcpy(bytes, reader->buffer, size);
	} else {
		char *full = reader->buffer;
		reader->buffer = bytes;
		bytes = full;
	}
	push(request, bytes, size);
}

/* ----------------------------------------------------------------- threads */

bool hot_reply(uint64_t unique, int error, const void *head, size_t head_size, const void *data, size_t data_size)
{
	struct fuse_out_header out = {
		.len = (uint32_t)(sizeof out + head_size + data_size), .error = -error, .unique = unique};
	struct iovec parts[] = {{&out, sizeof out}, {(void *)head, head_size}, {(void *)data, data_size}};
	/* ENOENT: the kernel has given the request up.  It says so of nothing else. */
	return writev(device, parts, 3) >= 0;
}

static void free_reader(struct reader *reader)
{
	if (reader->epoll_fd >= 0)
		close(reader->epoll_fd);
	free(reader->buffer);
	free(reader->answer);
	free(reader);
}

static bool watch(int epoll_fd, int fd, uint32_t events)
{
	struct epoll_event event = {.events = events, .data.fd = fd};
	return epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event) == 0;
}

static struct reader *new_reader(void)
{
	struct reader *reader = calloc(1, sizeof *reader);
	if (!reader)
		return NULL;
	reader->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	reader->buffer = malloc(REQUEST_BYTES);
	reader->answer = malloc(ANSWER_BYTES);
	if (reader->epoll_fd >= 0 && reader->buffer && reader->answer &&
	    watch(reader->epoll_fd, device, EPOLLIN | EPOLLEXCLUSIVE) && watch(reader->epoll_fd, stop_fd, EPOLLIN))
		return reader;
	free_reader(reader);
	return NULL;
}

bool start_thread(void *(*run)(void *), void *argument)
{
	pthread_attr_t attributes;
	pthread_t thread;
	sigset_t all, before;
	sigfillset(&all); /* signals are the main thread's */
	pthread_sigmask(SIG_SETMASK, &all, &before);
	pthread_attr_init(&attributes);
	pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
	pthread_attr_setstacksize(&attributes, 256 << 10);
	int error = pthread_create(&thread, &attributes, run, argument);
	pthread_attr_destroy(&attributes);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	return !error;
}

static void *run_reader(void *argument);

/* One more thread; called with `reading` held. */
static bool start_reader(void)
{
	struct reader *reader = thread_count < MAX_THREADS ? new_reader() : NULL;
	if (!reader)
		return false;
	if (!start_thread(run_reader, reader)) {
		free_reader(reader);
		return false;
	}
	thread_count++;
	idle_count++;
	return true;
}

/* Whether the thread may turn to an answer that could block; called with `reading` held. */
static bool may_leave(void)
{
	if (idle_count == 1 && !start_reader())
		return false;
	idle_count--;
	return true;
}

static void come_back(void)
{
	pthread_mutex_lock(&reading);
	idle_count++;
	pthread_mutex_unlock(&reading);
}

static void serve(struct reader *reader, size_t size)
{
	uint32_t opcode = ((const struct fuse_in_header *)reader->buffer)->opcode % OPCODES;
	if (hot_answer(reader, reader->buffer, size))
		atomic_fetch_add_explicit(&hot_answered[opcode], 1, memory_order_relaxed);
	else
		pass_on(reader, size); /* its client waits: it may come later than what was read after it */
	come_back();
}

static bool is_forget(const char *request)
{
	uint32_t opcode = ((const struct fuse_in_header *)request)->opcode;
	return opcode == FUSE_FORGET || opcode == FUSE_BATCH_FORGET;
}

/* Read one request and see to it; false when the connection is gone. */
static bool receive(struct reader *reader)
{
	pthread_mutex_lock(&reading);
	ssize_t size = read(device, reader->buffer, REQUEST_BYTES);
	if (size < (ssize_t)sizeof(struct fuse_in_header)) {
		int error = size < 0 ? errno : EIO;
		pthread_mutex_unlock(&reading);
		/* EAGAIN: another thread was quicker; ENOENT: the request was interrupted before it was read */
		return error == EAGAIN || error == EINTR || error == ENOENT;
	}
	if (hot_candidate(reader->buffer, (size_t)size) && may_leave()) {
		pthread_mutex_unlock(&reading);
		serve(reader, (size_t)size);
		return true;
	}
	if (is_forget(reader->buffer))
		size = (ssize_t)hot_forget(reader->buffer, (size_t)size);
	if (size)
		pass_on(reader, (size_t)size);
	pthread_mutex_unlock(&reading);
	return true;
}

/* How long an idle thread waits: those that stay wake up for requests alone. */
static int patience(void)
{
	pthread_mutex_lock(&reading);
	bool stays = idle_count <= IDLE_THREADS;
	pthread_mutex_unlock(&reading);
	return stays ? -1 : IDLE_MS;
}

/* Whether there are enough idle threads without this one, which then counts no more. */
static bool is_spare(void)
{
	pthread_mutex_lock(&reading);
	bool spare = idle_count > IDLE_THREADS;
	if (spare) {
		idle_count--;
		thread_count--;
	}
	pthread_mutex_unlock(&reading);
	return spare;
}

size_t hot_threads(void)
{
	pthread_mutex_lock(&reading);
	size_t count = thread_count;
	pthread_mutex_unlock(&reading);
	return count;
}

static void *run_reader(void *argument)
{
	struct reader *reader = argument;
	bool spare = false, connected = true, stopped = false;
	hot_reset_identity(reader);
	while (!spare && connected && !stopped) {
		struct epoll_event event;
		int count = epoll_wait(reader->epoll_fd, &event, 1, patience());
		if (count == 0)
			spare = is_spare();
		else if (count > 0 && event.data.fd == stop_fd)
			stopped = true;
		else if (count > 0)
			connected = receive(reader);
	}
	if (!connected)
		end_queue();
	free_reader(reader);
	if (spare && hot_threads() <= IDLE_THREADS)
		malloc_trim(0); /* the last of many: what they used goes back to the system */
	if (!spare) {
		pthread_mutex_lock(&reading);
		thread_count--;
		idle_count--;
		pthread_cond_broadcast(&thread_ended);
		pthread_mutex_unlock(&reading);
	}
	return NULL;
}

bool hot_requests_wait(int kernel_fd)
{
	struct pollfd kernel = {.fd = kernel_fd, .events = POLLIN};
	if (poll(&kernel, 1, 0) != 0)
		return true;
	/* Who took one out before has the lock until it is in the queue. */
	if (pthread_mutex_trylock(&reading) != 0)
		return true;
	pthread_mutex_lock(&queue.lock);
	bool waits = queue.first != NULL;
	pthread_mutex_unlock(&queue.lock);
	pthread_mutex_unlock(&reading);
	return waits;
}

/* -------------------------------------------------------- start and end */

/* Before pyfuse3.init, which asks for the descriptor to wait for. */
int hot_prepare(void)
{
	/* What threads allocate is passed on to others or kept in tables under a lock.  Heaps of their own (mallopt(3))
	 * would each keep pages for the few nodes that outlive a walk. */
	mallopt(M_ARENA_MAX, 1);
	queue.event_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	stop_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	return queue.event_fd < 0 || stop_fd < 0 ? -1 : 0;
}

/* From here on requests come from the kernel's descriptor. */
int hot_start(int kernel_fd)
{
	int flags = fcntl(kernel_fd, F_GETFL);
	if (flags < 0 || fcntl(kernel_fd, F_SETFL, flags | O_NONBLOCK) < 0)
		return -1;
	device = fcntl(kernel_fd, F_DUPFD_CLOEXEC, 0);
	if (device < 0)
		return -1;
	pthread_mutex_lock(&reading);
	bool started = start_reader() && start_reader();
	pthread_mutex_unlock(&reading);
	errno = EAGAIN;
	return started ? 0 : -1;
}

/* No thread reads or answers any more, but for those that hang in the backing: these answer into the void. */
void hot_stop(void)
{
	if (device < 0)
		return;
	uint64_t one = 1;
	struct timespec deadline;
	clock_gettime(CLOCK_REALTIME, &deadline);
	deadline.tv_sec += 1;
	end_queue();
	pthread_cond_signal(&queue.room);
	if (write(stop_fd, &one, sizeof one) < 0)
		return;
	pthread_mutex_lock(&reading);
	while (thread_count && pthread_cond_timedwait(&thread_ended, &reading, &deadline) == 0)
		;
	pthread_mutex_unlock(&reading);
	int nowhere = open("/dev/null", O_RDWR | O_CLOEXEC);
	if (nowhere >= 0) {
		dup3(nowhere, device, O_CLOEXEC);
		close(nowhere);
	}
}

/* ------------------------------------------------------------ interposing */

EXPORT int fuse_session_fd(struct fuse_session *session)
{
	static int (*real)(struct fuse_session *);
	if (queue.event_fd >= 0)
		return queue.event_fd;
	if (!real)
		real = libfuse_symbol("fuse_session_fd");
	return real(session);
}

/* As libfuse's: the size of the request, 0 at the end, or a negative errno; the buffer is the caller's to free. */
EXPORT int fuse_session_receive_buf(struct fuse_session *session, struct fuse_buf *buffer)
{
	static int (*real)(struct fuse_session *, struct fuse_buf *);
	if (device < 0) {
		if (!real)
			real = libfuse_symbol("fuse_session_receive_buf");
		return real(session, buffer);
	}
	bool ended;
	struct request *request = pop(&ended);
	if (!request && !ended)
		return -EINTR;
	if (!request) {
		fuse_session_exit(session);
		return 0;
	}
	free(buffer->mem);
	buffer->mem = request->bytes;
	buffer->size = request->size;
	buffer->flags = 0;
	free(request);
	return (int)buffer->size;
}
