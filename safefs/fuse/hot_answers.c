/* The answers of C to hot requests.  Every doubt, and every error that Python could do better than (as the caller with
 * all his groups, by a refreshed directory, through the path again), leaves the request to Python.  See hot.h.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "hot.h"
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <stdio.h>
#include <string.h>
#include <sys/fsuid.h>
#include <sys/syscall.h>
#include <sys/xattr.h>
#include <unistd.h>

#ifndef FOPEN_NOFLUSH
#define FOPEN_NOFLUSH (1 << 5)
#endif
#ifndef FOPEN_PASSTHROUGH
#define FOPEN_PASSTHROUGH (1 << 7)
#endif
#define FMODE_EXEC 0x20 /* include/linux/fs.h: the open is for execve */
#define ONLY_PYTHON (O_ACCMODE | O_TRUNC | O_DIRECT | O_CREAT | FMODE_EXEC)

#define FD(fh) ((int)((fh) & (FH_HOT - 1)))

/* ---------------------------------------------------------------- identity */

void hot_reset_identity(struct reader *reader)
{
	reader->uid = (uid_t)-1;
	if (hot_settings.impersonate && syscall(SYS_setgroups, 0, NULL) == 0) {
		setfsgid(0);
		setfsuid(0);
		reader->uid = 0;
		reader->gid = 0;
	}
}

/* setfsuid(-1) changes nothing and returns the value in force: the only way to see a refusal. */
static bool act_as(struct reader *reader, uid_t uid, gid_t gid)
{
	if (!hot_settings.impersonate || (reader->uid == uid && reader->gid == gid))
		return true;
	setfsgid(gid);
	setfsuid(uid);
	bool done = (gid_t)setfsgid((gid_t)-1) == gid && (uid_t)setfsuid((uid_t)-1) == uid;
	reader->uid = done ? uid : (uid_t)-1;
	reader->gid = gid;
	return done;
}

static bool act_as_caller(struct reader *reader, const struct fuse_in_header *in)
{
	return act_as(reader, in->uid, in->gid);
}

static bool act_as_daemon(struct reader *reader)
{
	return act_as(reader, 0, 0);
}

/* --------------------------------------------------------------- attributes */

static void fill_attr(struct fuse_attr *attr, const struct stat *st)
{
	memset(attr, 0, sizeof *attr);
	attr->ino = st->st_ino;
	attr->size = (uint64_t)st->st_size;
	attr->blocks = (uint64_t)st->st_blocks;
	attr->atime = (uint64_t)st->st_atim.tv_sec;
	attr->mtime = (uint64_t)st->st_mtim.tv_sec;
	attr->ctime = (uint64_t)st->st_ctim.tv_sec;
	attr->atimensec = (uint32_t)st->st_atim.tv_nsec;
	attr->mtimensec = (uint32_t)st->st_mtim.tv_nsec;
	attr->ctimensec = (uint32_t)st->st_ctim.tv_nsec;
	attr->mode = st->st_mode;
	attr->nlink = (uint32_t)st->st_nlink;
	attr->uid = st->st_uid;
	attr->gid = st->st_gid;
	attr->rdev = (uint32_t)st->st_rdev;
	attr->blksize = (uint32_t)st->st_blksize;
}

/* Only files are checked when they are opened; and a further name of a file can change what this one shows. */
static struct timespec entry_validity(const struct node *node, const struct stat *st)
{
	bool kept = S_ISREG(st->st_mode) && st->st_nlink == 1 && !node->in_place;
	return kept ? hot_settings.entry_valid : (struct timespec){0, 0};
}

static struct timespec attr_validity(const struct node *node, const struct stat *st)
{
	if (S_ISDIR(st->st_mode))
		return hot_settings.directory_valid;
	return st->st_nlink != 1 || node->in_place ? (struct timespec){0, 0} : hot_settings.attr_valid;
}

/* The kernel takes no reply with an errno from 512 on, such as NFS clients let out, and its request would never end. */
#define MAX_ERRNO 511

static bool reply_error(const struct fuse_in_header *in, int error)
{
	hot_reply(in->unique, error > MAX_ERRNO ? EIO : error, NULL, 0, NULL, 0);
	return true;
}

static bool reply_data(const struct fuse_in_header *in, const void *data, size_t size)
{
	hot_reply(in->unique, 0, NULL, 0, data, size);
	return true;
}

/* ------------------------------------------------------------------- names */

static bool reply_entry(const struct fuse_in_header *in, const char *name, struct node *node, const struct stat *st)
{
	struct timespec entry = entry_validity(node, st), attr = attr_validity(node, st);
	struct fuse_entry_out out = {
		.nodeid = node->nodeid,
		.entry_valid = (uint64_t)entry.tv_sec,
		.entry_valid_nsec = (uint32_t)entry.tv_nsec,
		.attr_valid = (uint64_t)attr.tv_sec,
		.attr_valid_nsec = (uint32_t)attr.tv_nsec,
	};
	fill_attr(&out.attr, st);
	if (S_ISREG(st->st_mode) && st->st_nlink > 1)
		walk_note(in->pid, node->nodeid, in->nodeid, name);
	if (hot_reply(in->unique, 0, &out, sizeof out, NULL, 0))
		table_done(node);
	else
		table_not_sent(node);
	return true;
}

static bool is_plain(const struct stat *st, const char *name)
{
	if (S_ISREG(st->st_mode))
		return !name_doubtful(name);
	return S_ISDIR(st->st_mode) || S_ISLNK(st->st_mode);
}

struct handle_room {
	struct handle head;
	unsigned char data[HANDLE_BYTES];
};
_Static_assert(sizeof(struct handle) == sizeof(struct file_handle), "file_handle");

static const struct handle *handle_of(int fd, struct handle_room *room)
{
	int mount_id;
	room->head.bytes = HANDLE_BYTES;
	bool made = name_to_handle_at(fd, "", (struct file_handle *)room, &mount_id, AT_EMPTY_PATH) == 0;
	return made ? &room->head : NULL;
}

/* The inode of a name has no node yet, or one without a descriptor: it gets them, if it is a plain thing. */
static bool answer_new_entry(const struct fuse_in_header *in, int directory, const char *name, const struct stat *seen)
{
	struct stat st;
	struct handle_room room;
	if (!is_plain(seen, name))
		return false;
	int fd = openat(directory, name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
	if (fd < 0)
		return false;
	struct node *node = NULL;
	if (fstat(fd, &st) == 0 && is_plain(&st, name))
		node = table_opened(&st, in->nodeid, name, fd, handle_of(fd, &room));
	if (!node || node->fd != fd)
		close(fd);
	return node && reply_entry(in, name, node, &st);
}

static bool answer_lookup(struct reader *reader, const struct fuse_in_header *in, const char *name)
{
	struct node *directory = table_use(in->nodeid);
	if (!directory)
		return false;
	struct stat st;
	bool answered = false, wants_descriptor;
	if (act_as_caller(reader, in)) {
		if (fstatat(directory->fd, name, &st, AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT) == 0) {
			struct node *node = table_found(&st, in->nodeid, name, &wants_descriptor);
			if (node)
				answered = reply_entry(in, name, node, &st);
			else if (wants_descriptor)
				answered = answer_new_entry(in, directory->fd, name, &st);
		} else if (errno == ENOENT && hot_settings.believes_misses) {
			answered = reply_error(in, ENOENT);
		}
	}
	table_done(directory);
	return answered;
}

static bool answer_getattr(struct reader *reader, const struct fuse_in_header *in)
{
	struct node *node = table_use(in->nodeid);
	if (!node)
		return false;
	struct stat st;
	bool answered = !name_marked(node->parent, node->name) && act_as_daemon(reader) && fstat(node->fd, &st) == 0;
	if (answered) {
		struct timespec valid = attr_validity(node, &st);
		struct fuse_attr_out out = {.attr_valid = (uint64_t)valid.tv_sec,
					    .attr_valid_nsec = (uint32_t)valid.tv_nsec};
		fill_attr(&out.attr, &st);
		hot_reply(in->unique, 0, &out, sizeof out, NULL, 0);
	}
	table_done(node);
	return answered;
}

static bool answer_readlink(struct reader *reader, const struct fuse_in_header *in)
{
	struct node *node = table_use(in->nodeid);
	if (!node)
		return false;
	ssize_t length = -1;
	if (S_ISLNK(node->mode) && act_as_caller(reader, in))
		length = readlinkat(node->fd, "", reader->answer, ANSWER_BYTES);
	table_done(node);
	return length >= 0 && reply_data(in, reader->answer, (size_t)length);
}

static bool answer_getxattr(struct reader *reader, const struct fuse_in_header *in, const char *body)
{
	const struct fuse_getxattr_in *arguments = (const void *)body;
	if (!strcmp(body + sizeof *arguments, "security.capability") && opens_are_bare(in->nodeid))
		return reply_error(in, ENODATA);
	struct node *node = table_use(in->nodeid);
	if (!node)
		return false;
	char path[32];
	snprintf(path, sizeof path, "/proc/self/fd/%d", node->fd);
	size_t room = arguments->size < ANSWER_BYTES ? arguments->size : ANSWER_BYTES;
	ssize_t length = -EIO;
	if (!name_marked(node->parent, node->name) && act_as_caller(reader, in)) {
		length = getxattr(path, body + sizeof *arguments, reader->answer, room);
		length = length < 0 ? -errno : length;
	}
	table_done(node);
	if (length == -ENODATA)
		return reply_error(in, ENODATA);
	if (length < 0)
		return false;
	struct fuse_getxattr_out out = {.size = (uint32_t)length};
	return arguments->size ? reply_data(in, reader->answer, (size_t)length) : reply_data(in, &out, sizeof out);
}

/* ---------------------------------------------------------------- contents */

/* The one place that tells the kernel of an open version.  `backing_id` is 0 without passthrough; false when the
 * kernel does not want to know any more. */
static bool reply_open(const struct fuse_in_header *in, int fd, uint32_t open_flags, int32_t backing_id)
{
	/* struct fuse_open_out, whose last field headers before Linux 6.9 call padding */
	struct {
		uint64_t fh;
		uint32_t open_flags;
		int32_t backing_id;
	} out = {FH_HOT | (uint64_t)fd, open_flags, backing_id};
	_Static_assert(sizeof out == sizeof(struct fuse_open_out), "fuse_open_out");
	return hot_reply(in->unique, 0, &out, sizeof out, NULL, 0);
}

/* Tell of a version, which passes through where the other open handles of its node do.  A reader has nothing to publish;
 * that it closes a copy of a descriptor matters for record locks alone (`flushes`). */
static bool reply_version(const struct fuse_in_header *in, int fd, bool unchanged, bool flushes)
{
	int32_t backing_id = opens_agreed(in->nodeid) < 0 ? backing_register(fd) : 0;
	backing_id = backing_id > 0 ? backing_id : 0;
	if (!opens_join(in->nodeid, &backing_id)) {
		close(fd);
		return reply_error(in, ENOMEM);
	}
	/* The kernel refuses a handle that passes through and keeps a cache as well. */
	uint32_t kind = backing_id ? FOPEN_PASSTHROUGH : unchanged ? FOPEN_KEEP_CACHE : 0;
	if (!reply_open(in, fd, (flushes ? 0 : FOPEN_NOFLUSH) | kind, backing_id)) {
		opens_leave(in->nodeid);
		close(fd);
	}
	return true;
}

/* Opened by its name, which must show this very inode: open() is never stale, however long the kernel believed the
 * name.  The kernel of the backing is told nothing that would make it wait for a lease or for the other end of a
 * FIFO that took the file's place in between. */
static int open_checked(const struct node *node, int directory, int flags, struct stat *st)
{
	flags = (flags & O_NOATIME) | O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY | O_CLOEXEC;
	int fd = openat(directory, node->name, flags);
	if (fd < 0)
		return -1;
	if (fstat(fd, st) == 0 && st->st_ino == node->identity.ino && st->st_dev == node->identity.dev &&
	    S_ISREG(st->st_mode) && st->st_nlink == 1)
		return fd;
	close(fd);
	return -1;
}

/* Whether the numbers below the ceiling have been used up: the kernel gives out the lowest one.  Then Python looks how
 * many are left, and refuses what clients want to open where too few are. */
static bool is_scarce(void)
{
	return fcntl(hot_settings.ceiling, F_GETFD) >= 0;
}

static bool answer_open(struct reader *reader, const struct fuse_in_header *in, int flags)
{
	struct node *node = table_use(in->nodeid);
	if (!node)
		return false;
	struct node *directory = NULL;
	struct stat st;
	int fd = -1;
	if (S_ISREG(node->mode) && !node->in_place && !name_marked(node->parent, node->name))
		directory = table_use(node->parent);
	if (directory && !is_scarce() && act_as_caller(reader, in))
		fd = open_checked(node, directory->fd, flags, &st);
	bool unchanged = fd >= 0 && table_seen(node, &st), flushes = hears_closes(node->name);
	if (directory)
		table_done(directory);
	table_done(node);
	return fd >= 0 && reply_version(in, fd, unchanged, flushes);
}

/* To a FUSE client a short answer means end of file, so short reads are continued. */
static bool answer_read(struct reader *reader, const struct fuse_in_header *in, const struct fuse_read_in *arguments)
{
	if (arguments->size > ANSWER_BYTES || !act_as_daemon(reader))
		return false;
	size_t have = 0;
	while (have < arguments->size) {
		ssize_t count = pread(FD(arguments->fh), reader->answer + have, arguments->size - have,
				      (off_t)(arguments->offset + have));
		if (count < 0 && errno != EINTR)
			return reply_error(in, errno);
		if (count == 0)
			break;
		have += count > 0 ? (size_t)count : 0;
	}
	return reply_data(in, reader->answer, have);
}

void hot_release(uint64_t nodeid, uint64_t fh)
{
	opens_leave(nodeid);
	close_later(FD(fh));
}

static bool answer_release(const struct fuse_in_header *in, uint64_t fh)
{
	reply_error(in, 0);
	if (in->opcode == FUSE_RELEASE)
		opens_leave(in->nodeid);
	close(FD(fh)); /* this thread may block */
	return true;
}

/* ------------------------------------------------------------------ locks */

/* Who may go on waiting and who only tries are the same here: nobody is in the way. */
static bool answer_flock(const struct fuse_in_header *in, const struct fuse_lk_in *arguments)
{
	struct loan wanted = {.type = (int32_t)arguments->lk.type, .tid = in->pid};
	return loan_use(arguments->fh, arguments->owner, wanted) && reply_error(in, 0);
}

/* ------------------------------------------------------------- directories */

static bool answer_opendir(struct reader *reader, const struct fuse_in_header *in)
{
	struct node *node = table_use(in->nodeid);
	if (!node)
		return false;
	int fd = -1;
	if (S_ISDIR(node->mode) && !is_scarce() && act_as_caller(reader, in))
		fd = openat(node->fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	table_done(node);
	if (fd >= 0 && !reply_open(in, fd, 0, 0))
		close(fd);
	return fd >= 0;
}

static bool answer_readdir(struct reader *reader, const struct fuse_in_header *in, const struct fuse_read_in *arguments)
{
	size_t size = arguments->size < ANSWER_BYTES / 2 ? arguments->size : ANSWER_BYTES / 2;
	if ((int64_t)arguments->offset < 0 || !act_as_daemon(reader))
		return false;
	ssize_t length = read_directory(FD(arguments->fh), (int64_t)arguments->offset, reader->answer,
					reader->answer + ANSWER_BYTES / 2, size, hot_settings.hidden,
					in->nodeid == ROOT_NODEID ? hot_settings.state : "");
	return length < 0 ? reply_error(in, (int)-length) : reply_data(in, reader->answer, (size_t)length);
}

/* ---------------------------------------------------------------- dispatch */

static const char *body_of(const char *request)
{
	return request + sizeof(struct fuse_in_header);
}

/* The handle of requests that begin with one. */
static uint64_t fh_of(const char *request)
{
	uint64_t fh;
	memcpy(&fh, body_of(request), sizeof fh);
	return fh;
}

static bool has_hot_handle(const char *request)
{
	return fh_of(request) & FH_HOT;
}

bool hot_candidate(const char *request, size_t size)
{
	const struct fuse_in_header *in = (const void *)request;
	size_t body = size - sizeof *in;
	switch (in->opcode) {
	case FUSE_LOOKUP:
		return in->pid && !thread_marked(in->pid) && !name_hidden(in->nodeid, body_of(request)) &&
		       !name_marked(in->nodeid, body_of(request));
	case FUSE_OPEN:
		return in->pid && !thread_marked(in->pid) && body >= sizeof(struct fuse_open_in) &&
		       !(((const struct fuse_open_in *)body_of(request))->flags & ONLY_PYTHON);
	case FUSE_GETATTR:
	case FUSE_READLINK:
	case FUSE_IOCTL:
		return true;
	case FUSE_GETXATTR:
		return body > sizeof(struct fuse_getxattr_in);
	case FUSE_OPENDIR:
		return !directory_marked(in->nodeid);
	case FUSE_READDIR:
		return body >= sizeof(struct fuse_read_in) && has_hot_handle(request) && !directory_marked(in->nodeid);
	case FUSE_READ:
		return body >= sizeof(struct fuse_read_in) && has_hot_handle(request);
	case FUSE_SETLK:
	case FUSE_SETLKW:
		return body >= sizeof(struct fuse_lk_in) &&
		       ((const struct fuse_lk_in *)body_of(request))->lk_flags & FUSE_LK_FLOCK &&
		       loan_stands(fh_of(request));
	case FUSE_FLUSH: /* of who has record locks somewhere it can unlock, and what was locked can be lost */
		return body >= sizeof(struct fuse_flush_in) && has_hot_handle(request) &&
		       !handle_marked(fh_of(request)) &&
		       !owner_marked(((const struct fuse_flush_in *)body_of(request))->lock_owner);
	case FUSE_RELEASE: /* it unlocks: only in its turn */
		return body >= sizeof(struct fuse_release_in) && has_hot_handle(request) &&
		       !handle_marked(fh_of(request));
	case FUSE_RELEASEDIR:
		return body >= sizeof(struct fuse_release_in) && has_hot_handle(request);
	default:
		return false;
	}
}

bool hot_answer(struct reader *reader, char *request, size_t size)
{
	const struct fuse_in_header *in = (const void *)request;
	const char *body = body_of(request);
	(void)size;
	switch (in->opcode) {
	case FUSE_LOOKUP:
		return answer_lookup(reader, in, body);
	case FUSE_GETATTR:
		return answer_getattr(reader, in);
	case FUSE_READLINK:
		return answer_readlink(reader, in);
	case FUSE_GETXATTR:
		return answer_getxattr(reader, in, body);
	case FUSE_OPEN:
		return answer_open(reader, in, (int)((const struct fuse_open_in *)body)->flags);
	case FUSE_READ:
		return answer_read(reader, in, (const void *)body);
	case FUSE_OPENDIR:
		return answer_opendir(reader, in);
	case FUSE_READDIR:
		return answer_readdir(reader, in, (const void *)body);
	case FUSE_RELEASE:
	case FUSE_RELEASEDIR:
		return answer_release(in, ((const struct fuse_release_in *)body)->fh);
	case FUSE_SETLK:
	case FUSE_SETLKW:
		return answer_flock(in, (const void *)body);
	case FUSE_FLUSH:
		count_flush(in->pid);
		return reply_error(in, 0);
	case FUSE_IOCTL:
		return reply_error(in, ENOTTY); /* as on_ioctl of native.c */
	default:
		return false;
	}
}

size_t hot_forget(char *request, size_t size)
{
	struct fuse_in_header *in = (void *)request;
	if (in->opcode == FUSE_FORGET) {
		const struct fuse_forget_in *one = (const void *)body_of(request);
		return table_forget(in->nodeid, one->nlookup) ? 0 : size;
	}
	struct fuse_batch_forget_in *batch = (void *)(request + sizeof *in);
	struct fuse_forget_one *items = (void *)(batch + 1);
	uint32_t kept = 0;
	for (uint32_t i = 0; i < batch->count; i++)
		if (!table_forget(items[i].nodeid, items[i].nlookup))
			items[kept++] = items[i];
	table_trim();
	batch->count = kept;
	in->len = (uint32_t)(sizeof *in + sizeof *batch + kept * sizeof *items);
	return kept ? in->len : 0;
}
