/* What C may answer for.  See hot.h. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "hot.h"
#include <fnmatch.h>
#include <malloc.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct hot_settings hot_settings;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

#define SMALLEST_TABLE 1024u

static struct {
	struct node **by_number, **by_identity;
	size_t size; /* of both, a power of two */
	size_t count, born;
	size_t descriptors; /* of BORN nodes */
	struct node *oldest, *newest; /* of those that can lose theirs */
	bool shrunk; /* since table_trim */
	uint64_t last_number;
} table = {.last_number = 0};

static uint64_t mix(uint64_t value)
{
	value ^= value >> 33;
	value *= 0xff51afd7ed558ccdULL;
	return value ^ value >> 29;
}

static size_t identity_slot(struct identity identity, size_t size)
{
	return mix(identity.ino ^ mix(identity.dev)) & (size - 1);
}

/* Make the table `size` slots long; without memory it stays as it is, which is slower and not wrong. */
static void resize(size_t size)
{
	struct node **numbers = calloc(size, sizeof *numbers), **identities = calloc(size, sizeof *identities);
	if (!numbers || !identities) {
		free(numbers);
		free(identities);
		return;
	}
	for (size_t i = 0; i < table.size; i++) {
		for (struct node *node = table.by_number[i], *next; node; node = next) {
			next = node->next_by_number;
			struct node **slot = &numbers[mix(node->nodeid) & (size - 1)];
			node->next_by_number = *slot;
			*slot = node;
			slot = &identities[identity_slot(node->identity, size)];
			node->next_by_identity = *slot;
			*slot = node;
		}
	}
	free(table.by_number);
	free(table.by_identity);
	table.by_number = numbers;
	table.by_identity = identities;
	table.size = size;
}

static struct node *find_number(uint64_t nodeid)
{
	struct node *node = table.size ? table.by_number[mix(nodeid) & (table.size - 1)] : NULL;
	while (node && node->nodeid != nodeid)
		node = node->next_by_number;
	return node;
}

static struct node *find_identity(struct identity identity)
{
	struct node *node = table.size ? table.by_identity[identity_slot(identity, table.size)] : NULL;
	while (node && (node->identity.ino != identity.ino || node->identity.dev != identity.dev))
		node = node->next_by_identity;
	return node;
}

static struct node *insert(uint64_t nodeid, struct identity identity, enum owner owner)
{
	if (table.count >= table.size)
		resize(table.size ? table.size * 2 : SMALLEST_TABLE);
	struct node *node = table.size ? calloc(1, sizeof *node) : NULL;
	if (!node)
		return NULL;
	node->nodeid = nodeid;
	node->identity = identity;
	node->fd = -1;
	node->owner = (uint8_t)owner;
	struct node **slot = &table.by_number[mix(nodeid) & (table.size - 1)];
	node->next_by_number = *slot;
	*slot = node;
	slot = &table.by_identity[identity_slot(identity, table.size)];
	node->next_by_identity = *slot;
	*slot = node;
	table.count++;
	return node;
}

static void destroy(struct node *node)
{
	if (node->close_fd)
		close_later(node->fd);
	free(node->handle);
	free(node->second_name);
	free(node->name);
	free(node);
}

/* ------------------------------------------- descriptors of nodes that C made */

static void queue_descriptor(struct node *node, int fd)
{
	node->fd = fd;
	table.descriptors++;
	if (!node->handle)
		return; /* without its descriptor it could not be told from a later inode with its number */
	node->newer = NULL;
	node->older = table.newest;
	*(table.newest ? &table.newest->newer : &table.oldest) = node;
	table.newest = node;
}

static void unqueue_descriptor(struct node *node)
{
	if (node->fd < 0)
		return;
	table.descriptors--;
	if (!node->handle)
		return;
	*(node->older ? &node->older->newer : &table.oldest) = node->newer;
	*(node->newer ? &node->newer->older : &table.newest) = node->older;
	node->older = node->newer = NULL;
}

/* Keep to the budget: the oldest descriptor that nobody uses goes; false when there is none. */
static bool make_room(void)
{
	struct node *node = table.oldest;
	if (table.descriptors < hot_settings.max_born)
		return true;
	for (int tries = 0; node && node->uses && tries < OPCODES; tries++)
		node = node->newer;
	if (!node || node->uses)
		return false;
	unqueue_descriptor(node);
	close_later(node->fd);
	node->fd = -1;
	return true;
}

/* Nobody finds the node any more; who still uses it keeps it until then. */
static void take_out(struct node *node)
{
	struct node **slot = &table.by_number[mix(node->nodeid) & (table.size - 1)];
	while (*slot != node)
		slot = &(*slot)->next_by_number;
	*slot = node->next_by_number;
	slot = &table.by_identity[identity_slot(node->identity, table.size)];
	while (*slot != node)
		slot = &(*slot)->next_by_identity;
	*slot = node->next_by_identity;
	table.count--;
	if (node->owner == BORN) {
		table.born--;
		unqueue_descriptor(node);
		node->close_fd = node->fd >= 0;
	}
	node->gone = true;
	if (!node->uses)
		destroy(node);
	if (table.size > SMALLEST_TABLE && table.count < table.size / 8) {
		resize(table.size / 4);
		table.shrunk = true;
	}
}

static bool place(struct node *node, uint64_t parent, const char *name)
{
	size_t length = strlen(name);
	if (node->parent == parent && node->name && node->length == length && !memcmp(node->name, name, length))
		return true;
	char *copy = strdup(name);
	if (!copy)
		return false;
	free(node->name);
	node->name = copy;
	node->length = (uint16_t)length;
	node->parent = parent;
	return true;
}

static bool placed(const struct node *node, uint64_t parent, const char *name)
{
	return node->parent == parent && node->name && !strcmp(node->name, name);
}

static bool placed_second(const struct node *node, uint64_t parent, const char *name)
{
	return node->second_parent == parent && node->second_name && !strcmp(node->second_name, name);
}

static void set_second(struct node *node, uint64_t parent, char *name)
{
	free(node->second_name);
	node->second_parent = parent;
	node->second_name = name;
}

/* One more place of a file that is written in place: the kernel keeps none of its names, so each is as good as another.
 * Two are known, the latest first unless a thread reads that one. */
static void place_too(struct node *node, uint64_t parent, const char *name)
{
	char *copy = placed_second(node, parent, name) ? NULL : strdup(name);
	if (copy && node->uses) {
		set_second(node, parent, copy);
	} else if (copy) {
		set_second(node, node->parent, node->name);
		node->parent = parent;
		node->name = copy;
		node->length = (uint16_t)strlen(copy);
	}
}

/* ---------------------------------------------------------- Python's side */

uint64_t table_new_number(void)
{
	pthread_mutex_lock(&lock);
	uint64_t number = ++table.last_number;
	pthread_mutex_unlock(&lock);
	return number;
}

/* Python has a node for this inode; its number, or a new one for 0.  0 when the inode has a node already. */
uint64_t table_register(uint64_t nodeid, struct identity identity)
{
	pthread_mutex_lock(&lock);
	uint64_t number = 0;
	if (!find_identity(identity)) {
		number = nodeid ? nodeid : ++table.last_number;
		insert(number, identity, KEPT);
	}
	pthread_mutex_unlock(&lock);
	return number;
}

/* Python has a descriptor for the node, and says where the node was found.  Threads read name and descriptor without
 * the lock: a node that one of them uses is not changed but left to Python until the next offer.  So is one that was
 * elsewhere before: the kernel may keep that name, and an open by it would be checked by the other.  (It keeps none of
 * what is written in place.) */
bool table_offer(uint64_t nodeid, mode_t mode, int fd, uint64_t parent, const char *name, struct stamp stamp,
		 bool in_place)
{
	bool plain = S_ISDIR(mode) || S_ISLNK(mode) || (S_ISREG(mode) && (in_place || !name_doubtful(name)));
	pthread_mutex_lock(&lock);
	struct node *node = find_number(nodeid);
	bool elsewhere = node && node->name && !placed(node, parent, name);
	if (node && node->owner == GRANTED && !elsewhere) {
		node->moved = false;
	} else if (node && node->owner == GRANTED && node->in_place && in_place && !node->moved) {
		place_too(node, parent, name);
	} else if (node && node->owner != BORN && node->uses) {
		node->moved = true;
	} else if (node && node->owner != BORN) {
		bool was_in_place = node->in_place;
		if (node->owner == KEPT)
			node->stamp = stamp;
		node->owner = plain && place(node, parent, name) ? GRANTED : KEPT;
		node->fd = fd;
		node->mode = mode;
		node->in_place = in_place;
		node->moved = elsewhere && !(was_in_place && in_place);
		set_second(node, 0, NULL);
	}
	bool granted = node && node->owner == GRANTED && !node->moved;
	pthread_mutex_unlock(&lock);
	return granted;
}

static void settle(struct node *node, struct settled *settled)
{
	settled->lookups = node->lookups;
	settled->stamp = node->stamp;
	settled->descriptor_kept = node->uses && node->fd >= 0;
	node->lookups = 0;
	if (settled->descriptor_kept)
		node->close_fd = true;
}

/* The descriptor goes away; the node stays. */
bool table_withdraw(uint64_t nodeid, struct settled *settled)
{
	pthread_mutex_lock(&lock);
	struct node *node = find_number(nodeid);
	if (node && node->owner != BORN) {
		struct identity identity = node->identity;
		settle(node, settled);
		if (node->uses) {
			take_out(node);
			insert(nodeid, identity, KEPT);
		} else {
			node->owner = KEPT;
			node->fd = -1;
		}
	} else {
		node = NULL;
	}
	pthread_mutex_unlock(&lock);
	return node != NULL;
}

static void give_back(struct node *node, uint64_t count)
{
	node->lookups -= count < node->lookups ? count : node->lookups;
}

void table_give_back(uint64_t nodeid, uint64_t count)
{
	pthread_mutex_lock(&lock);
	struct node *node = find_number(nodeid);
	if (node)
		give_back(node, count);
	pthread_mutex_unlock(&lock);
}

/* The node goes away, unless the kernel has references from replies of C. */
bool table_unregister(uint64_t nodeid, bool always, struct settled *settled)
{
	memset(settled, 0, sizeof *settled);
	pthread_mutex_lock(&lock);
	struct node *node = find_number(nodeid);
	bool ends = always || !node || !node->lookups;
	if (node && ends) {
		settle(node, settled);
		take_out(node);
	}
	pthread_mutex_unlock(&lock);
	return ends;
}

/* A copy for Python of a node that becomes its own; free name and copy. */
static struct node *adopted(struct node *node)
{
	if (!node || node->owner != BORN)
		return NULL;
	struct node *copy = malloc(sizeof *copy);
	if (!copy)
		return NULL;
	*copy = *node;
	copy->name = strdup(node->name);
	if (!copy->name) {
		free(copy);
		return NULL;
	}
	node->owner = node->fd < 0 ? KEPT : GRANTED;
	table.born--;
	unqueue_descriptor(node);
	node->handle = NULL; /* the copy's */
	return copy;
}

void free_adopted(struct node *node)
{
	free(node->handle);
	free(node->name);
	free(node);
}

struct node *table_adopt(uint64_t nodeid)
{
	pthread_mutex_lock(&lock);
	struct node *copy = adopted(find_number(nodeid));
	pthread_mutex_unlock(&lock);
	return copy;
}

struct node *table_adopt_identity(struct identity identity)
{
	pthread_mutex_lock(&lock);
	struct node *copy = adopted(find_identity(identity));
	pthread_mutex_unlock(&lock);
	return copy;
}

static bool seen(struct node *node, int64_t size, int64_t mtime_ns)
{
	bool same = !node->stamp.known || (node->stamp.size == size && node->stamp.mtime_ns == mtime_ns);
	node->stamp = (struct stamp){true, size, mtime_ns};
	return same;
}

/* 1 or 0 as table_seen, -1 when the node is not granted. */
int table_stamp(uint64_t nodeid, int64_t size, int64_t mtime_ns)
{
	pthread_mutex_lock(&lock);
	struct node *node = find_number(nodeid);
	int same = node && node->owner == GRANTED ? seen(node, size, mtime_ns) : -1;
	pthread_mutex_unlock(&lock);
	return same;
}

size_t table_born(void)
{
	pthread_mutex_lock(&lock);
	size_t born = table.born;
	pthread_mutex_unlock(&lock);
	return born;
}

/* ----------------------------------------------------------- threads' side */

struct node *table_use(uint64_t nodeid)
{
	pthread_mutex_lock(&lock);
	struct node *node = find_number(nodeid);
	if (node && (node->owner == KEPT || node->moved || node->fd < 0))
		node = NULL;
	if (node)
		node->uses++;
	pthread_mutex_unlock(&lock);
	return node;
}

void table_done(struct node *node)
{
	pthread_mutex_lock(&lock);
	if (!--node->uses && node->gone)
		destroy(node);
	pthread_mutex_unlock(&lock);
}

bool table_seen(struct node *node, const struct stat *status)
{
	pthread_mutex_lock(&lock);
	bool same = seen(node, status->st_size, status->st_mtim.tv_sec * 1000000000LL + status->st_mtim.tv_nsec);
	bool current = !node->gone && !node->moved;
	pthread_mutex_unlock(&lock);
	return same && current; /* what a node that was replaced meanwhile remembers is lost */
}

static struct node *birth(struct identity identity, const struct handle *handle)
{
	struct node *node = insert(table.last_number + 1, identity, BORN);
	if (!node)
		return NULL;
	table.last_number++;
	table.born++;
	node->handle = handle ? malloc(sizeof *handle + handle->bytes) : NULL;
	if (node->handle)
		memcpy(node->handle, handle, sizeof *handle + handle->bytes);
	return node;
}

static bool same_handle(const struct handle *one, const struct handle *other)
{
	return one && other && one->bytes == other->bytes && one->type == other->type &&
	       !memcmp(one->data, other->data, one->bytes);
}

/* Whether C may answer a lookup with a node that it knows. */
static bool answers(const struct node *node, const struct stat *status, uint64_t parent, const char *name)
{
	bool found = placed(node, parent, name) || placed_second(node, parent, name);
	return node->owner != KEPT && !node->moved && found && !((node->mode ^ status->st_mode) & S_IFMT);
}

static struct node *referenced(struct node *node)
{
	node->lookups++;
	node->uses++;
	return node;
}

struct node *table_found(const struct stat *status, uint64_t parent, const char *name, bool *wants_descriptor)
{
	struct node *found = NULL;
	pthread_mutex_lock(&lock);
	struct node *node = find_identity((struct identity){status->st_dev, status->st_ino});
	*wants_descriptor = !node || (node->owner == BORN && node->fd < 0);
	if (!*wants_descriptor && answers(node, status, parent, name))
		found = referenced(node);
	pthread_mutex_unlock(&lock);
	return found;
}

struct node *table_opened(const struct stat *status, uint64_t parent, const char *name, int fd,
			  const struct handle *handle)
{
	struct identity identity = {status->st_dev, status->st_ino};
	struct node *found = NULL;
	pthread_mutex_lock(&lock);
	struct node *node = find_identity(identity);
	if (node && node->fd >= 0) {
		found = answers(node, status, parent, name) ? referenced(node) : NULL; /* another thread was quicker */
	} else if (node) {
		if (answers(node, status, parent, name) && same_handle(node->handle, handle) && make_room()) {
			queue_descriptor(node, fd);
			found = referenced(node);
		}
	} else if (make_room() && (node = birth(identity, handle))) {
		node->mode = status->st_mode;
		if (place(node, parent, name)) {
			queue_descriptor(node, fd);
			found = referenced(node);
		} else {
			take_out(node);
		}
	}
	pthread_mutex_unlock(&lock);
	return found;
}

/* The reference that a lookup gave did not reach the kernel; also table_done. */
void table_not_sent(struct node *node)
{
	pthread_mutex_lock(&lock);
	/* Of a node that was taken back meanwhile the count went to Python: one reference too many is kept, never one
	 * too few. */
	if (!node->gone) {
		give_back(node, 1);
		if (!node->lookups && node->owner == BORN)
			take_out(node);
	}
	pthread_mutex_unlock(&lock);
	table_done(node);
}

bool table_forget(uint64_t nodeid, uint64_t count)
{
	pthread_mutex_lock(&lock);
	struct node *node = find_number(nodeid);
	bool ours = node && node->owner == BORN;
	if (ours) {
		give_back(node, count);
		if (!node->lookups)
			take_out(node);
	}
	pthread_mutex_unlock(&lock);
	return ours;
}

/* After many nodes are gone their memory goes back to the system: malloc(3) keeps it otherwise. */
void table_trim(void)
{
	pthread_mutex_lock(&lock);
	bool shrunk = table.shrunk;
	table.shrunk = false;
	pthread_mutex_unlock(&lock);
	if (shrunk)
		malloc_trim(0);
}

/* ------------------------------------------------------------------ marks */

/* Counting filters: a slot that another name shares sends that one to Python too, which is slower and not wrong. */
#define MARKS 16384u
static atomic_uint names[MARKS], directories[MARKS], threads[MARKS], handles[MARKS], owners[MARKS];

static size_t name_slot(uint64_t parent, const char *name)
{
	uint64_t hash = mix(parent);
	while (*name)
		hash = (hash ^ (unsigned char)*name++) * 0x100000001b3ULL;
	return mix(hash) & (MARKS - 1);
}

void mark_name(uint64_t parent, const char *name, int change)
{
	atomic_fetch_add(&names[name_slot(parent, name)], (unsigned)change);
}

void mark_directory(uint64_t nodeid, int change)
{
	atomic_fetch_add(&directories[mix(nodeid) & (MARKS - 1)], (unsigned)change);
}

void mark_thread(uint32_t tid, int change)
{
	atomic_fetch_add(&threads[mix(tid) & (MARKS - 1)], (unsigned)change);
}

void mark_handle(uint64_t fh, int change)
{
	atomic_fetch_add(&handles[mix(fh) & (MARKS - 1)], (unsigned)change);
}

void mark_owner(uint64_t owner, int change)
{
	atomic_fetch_add(&owners[mix(owner) & (MARKS - 1)], (unsigned)change);
}

bool name_marked(uint64_t parent, const char *name)
{
	return atomic_load(&names[name_slot(parent, name)]) != 0;
}

bool directory_marked(uint64_t nodeid)
{
	return atomic_load(&directories[mix(nodeid) & (MARKS - 1)]) != 0;
}

bool thread_marked(uint32_t tid)
{
	return atomic_load(&threads[mix(tid) & (MARKS - 1)]) != 0;
}

bool handle_marked(uint64_t fh)
{
	return atomic_load(&handles[mix(fh) & (MARKS - 1)]) != 0;
}

bool owner_marked(uint64_t owner)
{
	return atomic_load(&owners[mix(owner) & (MARKS - 1)]) != 0;
}

static atomic_uint flushes[MARKS];

void count_flush(uint32_t tid)
{
	atomic_fetch_add(&flushes[mix(tid) & (MARKS - 1)], 1);
}

unsigned flushes_of(uint32_t tid)
{
	return atomic_load(&flushes[mix(tid) & (MARKS - 1)]);
}

/* Nothing is taken away from it: who locks ranges of a file once does so again. */
static atomic_bool heard[MARKS], hears_all;

void hear_closes(const char *name)
{
	atomic_store(name ? &heard[name_slot(0, name)] : &hears_all, true);
}

bool hears_closes(const char *name)
{
	return atomic_load(&hears_all) || atomic_load(&heard[name_slot(0, name)]);
}

bool name_hidden(uint64_t parent, const char *name)
{
	return !strncmp(name, hot_settings.hidden, strlen(hot_settings.hidden)) ||
	       (parent == ROOT_NODEID && !strcmp(name, hot_settings.state));
}

/* ----------------------------------------------------------------- doubts */

/* Filled before the first thread starts, constant from then on. */
static struct {
	char **globs;
	size_t count;
} doubts;

bool doubts_add(const char *glob)
{
	char **longer = realloc(doubts.globs, (doubts.count + 1) * sizeof *longer);
	char *copy = strdup(glob);
	if (longer)
		doubts.globs = longer;
	if (!longer || !copy) {
		free(copy);
		return false;
	}
	doubts.globs[doubts.count++] = copy;
	return true;
}

static bool is_suffix_of(const char *suffix, const char *name, size_t length)
{
	size_t have = strlen(suffix);
	return have <= length && !memcmp(name + length - have, suffix, have);
}

bool name_doubtful(const char *name)
{
	size_t length = strlen(name);
	for (size_t i = 0; i < length; i++)
		if ((unsigned char)name[i] >= 0x80)
			return true; /* globs of ours match bytes, fnmatch(3) matches characters */
	for (size_t i = 0; i < doubts.count; i++) {
		const char *glob = doubts.globs[i];
		if (glob[0] == '*' && !strpbrk(glob + 1, "*?[")) {
			if (is_suffix_of(glob + 1, name, length))
				return true;
		} else if (fnmatch(glob, name, FNM_NOESCAPE) != FNM_NOMATCH) {
			return true;
		}
	}
	return false;
}
