/* Locks of flock(2) that Python has lent to C: of a name that one open file alone has to do with.
 *
 * While a loan stands, locking and unlocking through that open file changes nobody else's locks, so it is decided here,
 * at once.  Everybody else comes to Python, which first takes the loan back with what has become of it.  See hot.h, and
 * docs/decisions/0007-lent-locks.md.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "hot.h"
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>

struct lent {
	struct lent *next;
	uint64_t fh, owner;
	int64_t until_ns;
	struct loan loan;
};

#define SLOTS 1024u
static struct lent *loans[SLOTS];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static struct lent **slot_of(uint64_t fh)
{
	struct lent **slot = &loans[fh & (SLOTS - 1)];
	while (*slot && (*slot)->fh != fh)
		slot = &(*slot)->next;
	return slot;
}

/* CLOCK_BOOTTIME, as leases are counted. */
static int64_t now_ns(void)
{
	struct timespec now;
	clock_gettime(CLOCK_BOOTTIME, &now);
	return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

bool loan_give(uint64_t fh, uint64_t owner, struct loan loan, int64_t until_ns)
{
	pthread_mutex_lock(&lock);
	struct lent **slot = slot_of(fh);
	if (!*slot)
		*slot = calloc(1, sizeof **slot);
	struct lent *lent = *slot;
	if (lent) {
		lent->fh = fh;
		lent->owner = owner;
		lent->until_ns = until_ns;
		lent->loan = loan;
	}
	pthread_mutex_unlock(&lock);
	return lent;
}

bool loan_take(uint64_t fh, struct loan *loan)
{
	pthread_mutex_lock(&lock);
	struct lent **slot = slot_of(fh), *lent = *slot;
	if (lent) {
		*slot = lent->next;
		*loan = lent->loan;
	}
	pthread_mutex_unlock(&lock);
	free(lent);
	return lent;
}

bool loan_stands(uint64_t fh)
{
	pthread_mutex_lock(&lock);
	bool stands = *slot_of(fh);
	pthread_mutex_unlock(&lock);
	return stands;
}

bool loan_use(uint64_t fh, uint64_t owner, struct loan wanted)
{
	pthread_mutex_lock(&lock);
	struct lent *lent = *slot_of(fh);
	bool used = lent && lent->owner == owner && now_ns() < lent->until_ns;
	if (used)
		lent->loan = wanted;
	pthread_mutex_unlock(&lock);
	return used;
}
