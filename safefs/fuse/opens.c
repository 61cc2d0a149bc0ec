/* Which open handles the kernel passes through.  See hot.h, and docs/decisions/0003-passthrough.md. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "hot.h"
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/ioctl.h>

/* include/uapi/linux/fuse.h since 6.9; older headers do not have them. */
struct backing_map {
	int32_t fd;
	uint32_t flags;
	uint64_t padding;
};
#define BACKING_OPEN _IOW(229, 1, struct backing_map)
#define BACKING_CLOSE _IOW(229, 2, uint32_t)

static atomic_int device = -1;
static atomic_bool enabled;

struct agreement {
	struct agreement *next;
	uint64_t nodeid;
	uint32_t handles;
	int32_t backing_id; /* 0: none of them passes through */
	bool bare; /* the inode is a draft's that has no capability */
};

#define SLOTS 4096u /* open files, not known ones: chains stay short */
static struct agreement *agreements[SLOTS];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static struct agreement **slot_of(uint64_t nodeid)
{
	struct agreement **slot = &agreements[nodeid & (SLOTS - 1)];
	while (*slot && (*slot)->nodeid != nodeid)
		slot = &(*slot)->next;
	return slot;
}

void backing_enable(int fd)
{
	if (fd >= 0)
		atomic_store(&device, fd);
	atomic_store(&enabled, fd >= 0);
}

void backing_close(int32_t backing_id)
{
	uint32_t number = (uint32_t)backing_id;
	if (backing_id > 0)
		ioctl(atomic_load(&device), BACKING_CLOSE, &number);
}

int32_t backing_register(int fd)
{
	struct backing_map map = {.fd = fd};
	if (!atomic_load(&enabled)) {
		errno = EOPNOTSUPP;
		return -1;
	}
	int number = ioctl(atomic_load(&device), BACKING_OPEN, &map);
	if (number > MAX_BACKING_ID) {
		backing_close(number);
		errno = ENOSPC;
		return -1;
	}
	return number;
}

int32_t opens_agreed(uint64_t nodeid)
{
	pthread_mutex_lock(&lock);
	struct agreement *found = *slot_of(nodeid);
	int32_t backing_id = found ? found->backing_id : -1;
	pthread_mutex_unlock(&lock);
	return backing_id;
}

void opens_set_bare(uint64_t nodeid, bool bare)
{
	pthread_mutex_lock(&lock);
	struct agreement *found = *slot_of(nodeid);
	if (found)
		found->bare = bare;
	pthread_mutex_unlock(&lock);
}

bool opens_are_bare(uint64_t nodeid)
{
	pthread_mutex_lock(&lock);
	struct agreement *found = *slot_of(nodeid);
	bool bare = found && found->bare;
	pthread_mutex_unlock(&lock);
	return bare;
}

bool opens_join(uint64_t nodeid, int32_t *backing_id)
{
	int32_t own = *backing_id;
	pthread_mutex_lock(&lock);
	struct agreement **slot = slot_of(nodeid), *found = *slot;
	if (!found && (found = malloc(sizeof *found))) {
		*found = (struct agreement){NULL, nodeid, 0, own, false};
		*slot = found;
	}
	if (found) {
		found->handles++;
		*backing_id = found->backing_id;
	}
	pthread_mutex_unlock(&lock);
	if (!found || *backing_id != own)
		backing_close(own);
	return found != NULL;
}

void opens_leave(uint64_t nodeid)
{
	int32_t last = 0;
	pthread_mutex_lock(&lock);
	struct agreement **slot = slot_of(nodeid), *found = *slot;
	if (found && !--found->handles) {
		last = found->backing_id;
		*slot = found->next;
		free(found);
	}
	pthread_mutex_unlock(&lock);
	backing_close(last);
}
