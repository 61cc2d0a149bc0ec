/* By which of its names a thread found a file that has several.
 *
 * OPEN does not say it, and other threads can have found the file by another name since.  But the kernel keeps none of
 * the names of such a file, so whoever opens it by a path has just looked that name up; unless he was the last to do so
 * when it had one name yet, which the kernel goes on to keep for a moment (node.doubtful_until in Python).  See hot.h.
 */
#include "hot.h"
#include <pthread.h>
#include <string.h>

struct walk {
	uint32_t tid;
	uint64_t nodeid;
	struct place place;
};

#define SLOTS 1024u /* two threads that share one and walk at the same time: the latest counts, who opens has to guess */
static struct walk walks[SLOTS];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static struct walk *slot_of(uint32_t tid)
{
	return &walks[tid & (SLOTS - 1)];
}

void walk_note(uint32_t tid, uint64_t nodeid, uint64_t parent, const char *name)
{
	struct walk *walk = slot_of(tid);
	size_t length = strlen(name);
	if (!tid || length >= sizeof walk->place.name)
		return;
	pthread_mutex_lock(&lock);
	walk->tid = tid;
	walk->nodeid = nodeid;
	walk->place.parent = parent;
	memcpy(walk->place.name, name, length + 1);
	pthread_mutex_unlock(&lock);
}

bool walk_last(uint32_t tid, uint64_t nodeid, struct place *place)
{
	struct walk *walk = slot_of(tid);
	pthread_mutex_lock(&lock);
	bool found = tid && walk->tid == tid && walk->nodeid == nodeid;
	if (found)
		*place = walk->place;
	pthread_mutex_unlock(&lock);
	return found;
}

static bool same_place(const struct place *one, const struct place *other)
{
	return one->parent == other->parent && !strcmp(one->name, other->name);
}

void walk_moved(uint64_t nodeid, const struct place *before, const struct place *now)
{
	pthread_mutex_lock(&lock);
	for (size_t i = 0; i < SLOTS; i++)
		if (walks[i].nodeid == nodeid && same_place(&walks[i].place, before))
			walks[i].place = *now;
	pthread_mutex_unlock(&lock);
}
