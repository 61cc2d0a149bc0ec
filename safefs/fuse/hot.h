/* Hot requests: read requests that threads of this extension answer without the interpreter.
 *
 *   hot_table.c    what C may answer for: grants of nodes, marks, lookup counts (docs/decisions/0002-hot-requests.md)
 *   hot_answers.c  the answers
 *   opens.c        which open handles the kernel passes through
 *   walks.c        by which of its names a file was found
 *   loans.c        locks of flock(2) that Python has lent
 *   closer.c       the thread that closes descriptors of inodes
 *   hot_readers.c  the threads, the queue of what is left to Python, and the symbols of libfuse3 that hide both
 *   hot_module.c   what Python calls
 */
#ifndef SAFEFS_HOT_H
#define SAFEFS_HOT_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <time.h>

/* A file handle number with this bit is a descriptor that C has opened: handle and descriptor are the same number. */
#define FH_HOT (1ULL << 39)
#define ROOT_NODEID 1ULL
#define OPCODES 64

/* --------------------------------------------------------------- settings */

struct hot_settings {
	struct timespec entry_valid, attr_valid, directory_valid;
	bool impersonate; /* act with the caller's filesystem identity */
	bool believes_misses; /* a name that the backing does not find is answered with ENOENT */
	size_t max_born; /* descriptors of nodes that Python has not heard of */
	int ceiling;	 /* descriptors from this number on are for the daemon's own work, not for clients */
	char hidden[32], state[32]; /* prefix of names that are never shown; such a name in the root */
};
extern struct hot_settings hot_settings;

/* ------------------------------------------------------------------ table */

struct identity {
	uint64_t dev, ino;
};

struct stamp {
	bool known;
	int64_t size, mtime_ns; /* at the last open */
};

enum owner {
	BORN, /* looked up by C: its number, descriptor and references are C's until Python adopts it */
	KEPT, /* Python's; C only knows that this inode has a node */
	GRANTED, /* Python's; C may answer for it */
};

/* name_to_handle_at(2): tells an inode from a later one with the same number. */
struct handle {
	uint32_t bytes;
	int32_t type;
	unsigned char data[];
};
#define HANDLE_BYTES 128 /* MAX_HANDLE_SZ */

struct node {
	struct node *next_by_number, *next_by_identity;
	uint64_t nodeid, parent;
	struct identity identity;
	uint64_t lookups; /* references that replies of C have given to the kernel */
	struct stamp stamp;
	mode_t mode;
	int fd; /* O_PATH; Python's unless BORN.  -1 of a BORN node that has lost it to the budget */
	struct node *older, *newer; /* BORN nodes that can lose their descriptor, by when they got it */
	struct handle *handle; /* of BORN nodes, NULL where the backing makes none */
	unsigned uses; /* threads that work with it right now */
	uint8_t owner;
	bool in_place; /* a file that anybody may change at any time: nothing of it is kept, and Python opens it */
	bool moved; /* Python found it elsewhere: nobody begins to use it before the next offer */
	bool gone; /* not in the table any more: the last user frees it */
	bool close_fd; /* ... and closes its descriptor */
	uint16_t length;
	char *name;
	uint64_t second_parent; /* where it was found before, if it is written in place: it may be there, too */
	char *second_name;
};

/* Every function of the table takes its lock for a moment and does no I/O under it: descriptors go to the closer. */
uint64_t table_new_number(void);
uint64_t table_register(uint64_t nodeid, struct identity identity);
/* `in_place`: its name has a class whose files are written in place. */
bool table_offer(uint64_t nodeid, mode_t mode, int fd, uint64_t parent, const char *name, struct stamp stamp,
		 bool in_place);

/* What Python gets back when it takes a grant back; `descriptor_kept`: a thread uses the descriptor and closes it. */
struct settled {
	uint64_t lookups;
	struct stamp stamp;
	bool descriptor_kept;
};
bool table_withdraw(uint64_t nodeid, struct settled *settled);
void table_give_back(uint64_t nodeid, uint64_t count);
bool table_unregister(uint64_t nodeid, bool always, struct settled *settled);

struct node *table_adopt(uint64_t nodeid);
struct node *table_adopt_identity(struct identity identity);
int table_stamp(uint64_t nodeid, int64_t size, int64_t mtime_ns);
size_t table_born(void);
void free_adopted(struct node *node);

/* The node if C may answer for it, to be given back with table_done. */
struct node *table_use(uint64_t nodeid);
void table_done(struct node *node);
/* Note what an open saw; true when it is as the open before left it. */
bool table_seen(struct node *node, const struct stat *status);

/* A reference to the node that a lookup has found; NULL when only Python can tell, or when `*wants_descriptor` says
 * that it takes an O_PATH descriptor and its handle (NULL: the backing makes none). */
struct node *table_found(const struct stat *status, uint64_t parent, const char *name, bool *wants_descriptor);
/* The same with a descriptor.  Taken over, as `node->fd` tells, when a node is born or had lost its own. */
struct node *table_opened(const struct stat *status, uint64_t parent, const char *name, int fd,
			  const struct handle *handle);
void table_not_sent(struct node *node);
/* True when the references were C's alone. */
bool table_forget(uint64_t nodeid, uint64_t count);
void table_trim(void);

/* ------------------------------------------------------------------ marks */

void mark_name(uint64_t parent, const char *name, int change);
void mark_directory(uint64_t nodeid, int change);
void mark_thread(uint32_t tid, int change);
void mark_handle(uint64_t fh, int change);
void mark_owner(uint64_t owner, int change);
bool name_marked(uint64_t parent, const char *name);
bool directory_marked(uint64_t nodeid);
bool thread_marked(uint32_t tid);
bool handle_marked(uint64_t fh);
bool owner_marked(uint64_t owner);
bool name_hidden(uint64_t parent, const char *name);
/* How many FLUSHes a thread has sent, and those of which it shares a slot. */
void count_flush(uint32_t tid);
unsigned flushes_of(uint32_t tid);
/* Who only reads sends FLUSH as well, of files of this name in whatever directory (NULL: of all), until the daemon ends. */
void hear_closes(const char *name);
bool hears_closes(const char *name);

/* Names that a rule could give another class than private. */
bool doubts_add(const char *glob);
bool name_doubtful(const char *name);

/* ------------------------------------------------------------------ opens */

/* All open handles of a node agree: every one passes through, with the same backing id, or none does.  The first to
 * join decides, whichever side opened it; the id goes with the last to leave. */

#define MAX_BACKING_ID 0x3fffff /* what a handle of Python carries */

/* Take ids from this /dev/fuse descriptor, which negotiated FUSE_PASSTHROUGH; -1: take no more. */
void backing_enable(int fd);
/* A backing id for the file of a descriptor, or -1 with errno. */
int32_t backing_register(int fd);
void backing_close(int32_t backing_id);
/* What the handles of a node agree on, -1 when it has none. */
int32_t opens_agreed(uint64_t nodeid);
/* One more handle, which brings an id or 0; closed and replaced by what the others agree on.  False without memory. */
bool opens_join(uint64_t nodeid, int32_t *backing_id);
void opens_leave(uint64_t nodeid);
/* Whether an open node is a draft without security.capability, which the kernel asks every file for before its first
 * write.  Nothing happens when it has no handle. */
void opens_set_bare(uint64_t nodeid, bool bare);
bool opens_are_bare(uint64_t nodeid);

/* ------------------------------------------------------------------ walks */

struct place {
	uint64_t parent;
	char name[256]; /* NAME_MAX and a zero */
};
/* A thread has found a file with several names by this one. */
void walk_note(uint32_t tid, uint64_t nodeid, uint64_t parent, const char *name);
/* The last one by which it found the file; false when that is not known. */
bool walk_last(uint32_t tid, uint64_t nodeid, struct place *place);
/* A name of the file has become another. */
void walk_moved(uint64_t nodeid, const struct place *before, const struct place *now);

/* ------------------------------------------------------------------ loans */

/* A lock of flock(2): F_RDLCK, F_WRLCK or F_UNLCK, and the thread that asked for it last. */
struct loan {
	int32_t type;
	uint32_t tid;
};

/* Lend what an open file holds of a name that nobody else has to do with, until a moment of CLOCK_BOOTTIME; false
 * without memory. */
bool loan_give(uint64_t fh, uint64_t owner, struct loan loan, int64_t until_ns);
/* End a loan: what is held now; false when there was none. */
bool loan_take(uint64_t fh, struct loan *loan);
bool loan_stands(uint64_t fh);
/* Lock or unlock; false when that is not lent, or not any more. */
bool loan_use(uint64_t fh, uint64_t owner, struct loan wanted);

/* ----------------------------------------------------------------- closer */

/* Start the thread, for at most so many descriptors at a time; false where it does not start. */
bool closer_start(size_t most);
/* Have a descriptor closed by the thread.  False when it has too many already: they would be missing for open files. */
bool closer_takes(int fd);
/* The same; what it does not take, also before it was started, is closed here and now. */
void close_later(int fd);
size_t closer_waiting(void);
/* Wait until every descriptor is closed; false when it takes longer. */
bool closer_wait(struct timespec longest);

/* ---------------------------------------------------------------- answers */

struct reader {
	int epoll_fd;
	char *buffer; /* the request */
	char *answer; /* room for the data of a reply */
	uid_t uid; /* the filesystem identity that the thread has */
	gid_t gid;
};

#define ANSWER_BYTES (1u << 20)

/* Whether an answer by C can be tried; else the request goes to Python in its place in the order. */
bool hot_candidate(const char *request, size_t size);
/* False when the request is Python's after all. */
bool hot_answer(struct reader *reader, char *request, size_t size);
/* The end of a file handle that C has made, for who cannot wait for it. */
void hot_release(uint64_t nodeid, uint64_t fh);
/* Take from a FORGET what is C's; returns how long the rest is that Python must see, 0 for nothing. */
size_t hot_forget(char *request, size_t size);
/* The thread's identity is the daemon's, with no supplementary groups. */
void hot_reset_identity(struct reader *reader);

/* ---------------------------------------------------------------- readers */

extern atomic_ulong hot_answered[OPCODES], hot_passed[OPCODES];
/* A thread that gets no signals and ends with the process. */
bool start_thread(void *(*run)(void *), void *argument);
/* Send a reply; false when the kernel does not want it any more. */
bool hot_reply(uint64_t unique, int error, const void *head, size_t head_size, const void *data, size_t data_size);
int hot_prepare(void);
int hot_start(int device);
void hot_stop(void);
size_t hot_threads(void);
/* False: Python has been given every request that the kernel had queued before the call.  Never blocks. */
bool hot_requests_wait(int kernel_fd);

/* ------------------------------------------------------- shared with native.c */

void *libfuse_symbol(const char *name);
/* One READDIR answer in `out`; how long it is, or a negative errno. `buffer` has `size` bytes as well. */
ssize_t read_directory(int fd, int64_t offset, char *out, char *buffer, size_t size, const char *hidden,
		       const char *state);
int hot_add_to(void *module);

#endif
