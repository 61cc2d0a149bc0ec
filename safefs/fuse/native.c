/* What pyfuse3 leaves out, under pyfuse3.
 *
 * This module must be loaded RTLD_GLOBAL before pyfuse3, so that the symbols below stand before those of libfuse3:
 *
 *   fuse_session_new[_versioned]   keeps the session and adds request handlers of our own to the public, append-only
 *                                  fuse_lowlevel_ops table that pyfuse3 hands over;
 *   fuse_reply_entry, _create,     give the kernel a st_ino that differs from the nodeid: Python carries the st_ino
 *   fuse_add_direntry_plus         in the `generation` of pyfuse3.EntryAttributes;
 *   fuse_reply_open, _create       send open flags that libfuse has no name for (passthrough, no FLUSH), carried in
 *                                  the upper bits of the file handle number (see FH_*).
 *
 * Our handlers turn a request into a call of a Python object's method with a Request, which is answered later, once:
 * a Request that is dropped unanswered answers EIO, so no client hangs on a forgotten reply.
 *
 * The module also wraps the Linux system calls that Python has no function for.  They release the GIL.
 */
#define PY_SSIZE_T_CLEAN
#define FUSE_USE_VERSION 312
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <Python.h>
#include <structmember.h>
#include <fuse_lowlevel.h>
#include <linux/capability.h>
#include <linux/fuse.h>
#include <linux/fs.h>
#include "hot.h"
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/fsuid.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/xattr.h>
#include <unistd.h>

/* Bits of a file handle number on its way from Python to the kernel, which sees only FH_HANDLE. */
#define FH_PASSTHROUGH (1ULL << 63)
#define FH_NOFLUSH (1ULL << 62)
#define FH_BACKING_SHIFT 40
#define FH_BACKING_MASK ((uint64_t)MAX_BACKING_ID)
#define FH_HANDLE ((1ULL << FH_BACKING_SHIFT) - 1)

#ifndef FOPEN_NOFLUSH
#define FOPEN_NOFLUSH (1 << 5)
#endif
#define OPEN_PASSTHROUGH (1u << 7) /* FOPEN_PASSTHROUGH of linux/fuse.h since 6.9 */

/* struct fuse_open_out with the field that headers before Linux 6.9 call padding. */
struct open_out {
	uint64_t fh;
	uint32_t open_flags;
	int32_t backing_id;
};
_Static_assert(sizeof(struct open_out) == sizeof(struct fuse_open_out), "fuse_open_out");

static struct fuse_session *session;
static PyObject *handlers; /* the Python object whose methods get our requests */

void *libfuse_symbol(const char *name)
{
	static void *library;
	if (!library)
		library = dlopen("libfuse3.so.3", RTLD_NOW | RTLD_LOCAL);
	void *symbol = library ? dlsym(library, name) : NULL;
	if (!symbol) {
		fprintf(stderr, "safefs: libfuse3 has no %s\n", name);
		abort();
	}
	return symbol;
}

/* ---------------------------------------------------------------- Request */

typedef struct {
	PyObject_HEAD
	fuse_req_t req; /* NULL once answered */
	PyObject *on_interrupt; /* called when the client gets a signal while it waits; may be NULL */
	unsigned int uid, gid, umask;
	int pid;
} Request;

static PyTypeObject RequestType;

static Request *request_new(fuse_req_t req)
{
	Request *self = PyObject_New(Request, &RequestType);
	if (!self)
		return NULL;
	const struct fuse_ctx *context = fuse_req_ctx(req);
	self->req = req;
	self->on_interrupt = NULL;
	self->uid = context->uid;
	self->gid = context->gid;
	self->umask = context->umask;
	self->pid = context->pid;
	return self;
}

/* Hand out the libfuse request for its one reply; NULL if there was one. */
static fuse_req_t request_end(Request *self)
{
	fuse_req_t req = self->req;
	self->req = NULL;
	if (req && self->on_interrupt)
		fuse_req_interrupt_func(req, NULL, NULL);
	Py_CLEAR(self->on_interrupt);
	return req;
}

static void request_dealloc(Request *self)
{
	fuse_req_t req = request_end(self);
	if (req)
		fuse_reply_err(req, EIO);
	PyObject_Free(self);
}

static fuse_req_t request_take(Request *self)
{
	fuse_req_t req = request_end(self);
	if (!req)
		PyErr_SetString(PyExc_RuntimeError, "this request has been answered already");
	return req;
}

/* libfuse holds a lock of the request meanwhile: the Python function must not answer it, only see to it that it is
 * answered soon.  Called from fuse_session_process_buf, or at once from request_await_interrupt. */
static void request_interrupted(fuse_req_t req, void *data)
{
	Request *self = data;
	(void)req;
	PyObject *result = PyObject_CallNoArgs(self->on_interrupt);
	if (!result)
		PyErr_WriteUnraisable(self->on_interrupt);
	Py_XDECREF(result);
}

static PyObject *request_await_interrupt(Request *self, PyObject *function)
{
	if (!self->req || self->on_interrupt) {
		PyErr_SetString(PyExc_RuntimeError, "this request has been answered, or is watched already");
		return NULL;
	}
	self->on_interrupt = Py_NewRef(function);
	fuse_req_interrupt_func(self->req, request_interrupted, self);
	Py_RETURN_NONE;
}

/* ENOENT from a reply means that the kernel gave the request up (an interrupted or killed client). */
static PyObject *replied(int result)
{
	if (result < 0 && result != -ENOENT && result != -ENODEV && result != -ENOTCONN)
		return errno = -result, PyErr_SetFromErrno(PyExc_OSError);
	Py_RETURN_NONE;
}

static PyObject *request_reply_err(Request *self, PyObject *arg)
{
	long error = PyLong_AsLong(arg);
	if (error == -1 && PyErr_Occurred())
		return NULL;
	fuse_req_t req = request_take(self);
	return req ? replied(fuse_reply_err(req, (int)error)) : NULL;
}

static PyObject *request_reply_count(Request *self, PyObject *arg)
{
	size_t count = PyLong_AsSize_t(arg);
	if (count == (size_t)-1 && PyErr_Occurred())
		return NULL;
	fuse_req_t req = request_take(self);
	return req ? replied(fuse_reply_write(req, count)) : NULL;
}

static PyObject *request_reply_offset(Request *self, PyObject *arg)
{
	long long offset = PyLong_AsLongLong(arg);
	if (offset == -1 && PyErr_Occurred())
		return NULL;
	fuse_req_t req = request_take(self);
	return req ? replied(fuse_reply_lseek(req, offset)) : NULL;
}

static PyObject *request_reply_buffer(Request *self, PyObject *arg)
{
	Py_buffer view;
	if (PyObject_GetBuffer(arg, &view, PyBUF_CONTIG_RO) < 0)
		return NULL;
	fuse_req_t req = request_take(self);
	PyObject *result = req ? replied(fuse_reply_buf(req, view.buf, (size_t)view.len)) : NULL;
	PyBuffer_Release(&view);
	return result;
}

static PyObject *request_reply_lock(Request *self, PyObject *args)
{
	int type, pid;
	long long start, length;
	if (!PyArg_ParseTuple(args, "iLLi", &type, &start, &length, &pid))
		return NULL;
	struct flock lock = {
		.l_type = (short)type, .l_whence = SEEK_SET, .l_start = start, .l_len = length, .l_pid = pid};
	fuse_req_t req = request_take(self);
	return req ? replied(fuse_reply_lock(req, &lock)) : NULL;
}

static void split_ns(long long ns, struct timespec *ts)
{
	ts->tv_sec = ns / 1000000000;
	ts->tv_nsec = ns % 1000000000;
	if (ts->tv_nsec < 0) {
		ts->tv_sec--;
		ts->tv_nsec += 1000000000;
	}
}

static PyObject *request_reply_attr(Request *self, PyObject *args)
{
	unsigned long long ino, size, blocks, rdev, nlink;
	unsigned int mode, uid, gid, blksize;
	long long atime_ns, mtime_ns, ctime_ns;
	double timeout;
	if (!PyArg_ParseTuple(args, "KIKIIKKIKLLLd", &ino, &mode, &nlink, &uid, &gid, &rdev, &size, &blksize, &blocks,
			      &atime_ns, &mtime_ns, &ctime_ns, &timeout))
		return NULL;
	struct stat st;
	memset(&st, 0, sizeof st);
	st.st_ino = ino;
	st.st_mode = mode;
	st.st_nlink = nlink;
	st.st_uid = uid;
	st.st_gid = gid;
	st.st_rdev = rdev;
	st.st_size = (off_t)size;
	st.st_blksize = blksize;
	st.st_blocks = (blkcnt_t)blocks;
	split_ns(atime_ns, &st.st_atim);
	split_ns(mtime_ns, &st.st_mtim);
	split_ns(ctime_ns, &st.st_ctim);
	fuse_req_t req = request_take(self);
	return req ? replied(fuse_reply_attr(req, &st, timeout)) : NULL;
}

static PyObject *request_answered(Request *self, void *closure)
{
	(void)closure;
	return PyBool_FromLong(self->req == NULL);
}

static PyMethodDef request_methods[] = {
	{"reply_err", (PyCFunction)request_reply_err, METH_O, "Answer with an errno, or 0 for success."},
	{"reply_count", (PyCFunction)request_reply_count, METH_O, "Answer with a number of bytes."},
	{"reply_offset", (PyCFunction)request_reply_offset, METH_O, "Answer with a file offset."},
	{"reply_buffer", (PyCFunction)request_reply_buffer, METH_O, "Answer with raw bytes."},
	{"reply_attr", (PyCFunction)request_reply_attr, METH_VARARGS, "Answer with the attributes of an inode."},
	{"reply_lock", (PyCFunction)request_reply_lock, METH_VARARGS, "Answer with a struct flock."},
	{"await_interrupt", (PyCFunction)request_await_interrupt, METH_O,
	 "Have a function called, which must not answer, when the client gets a signal while it waits."},
	{NULL}};

static PyMemberDef request_members[] = {
	{"uid", T_UINT, offsetof(Request, uid), READONLY, "fsuid of the caller"},
	{"gid", T_UINT, offsetof(Request, gid), READONLY, "fsgid of the caller"},
	{"umask", T_UINT, offsetof(Request, umask), READONLY, "umask of the caller"},
	{"pid", T_INT, offsetof(Request, pid), READONLY, "thread id of the caller, 0 when it has none here"},
	{NULL}};

static PyGetSetDef request_getset[] = {
	{"answered", (getter)request_answered, NULL, "whether the one reply has been sent", NULL},
	{NULL}};

static PyTypeObject RequestType = {
	PyVarObject_HEAD_INIT(NULL, 0).tp_name = "safefs._native.Request",
	.tp_basicsize = sizeof(Request),
	.tp_dealloc = (destructor)request_dealloc,
	.tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
	.tp_methods = request_methods,
	.tp_members = request_members,
	.tp_getset = request_getset,
	.tp_doc = "A FUSE request, to be answered once; dropped unanswered it answers EIO.",
};

/* ------------------------------------------------------- our own handlers */

/* libfuse calls these from fuse_session_process_buf, which pyfuse3 calls with the GIL held. */
static void dispatch(fuse_req_t req, const char *method, const char *format, ...)
{
	Request *request = request_new(req);
	if (!request) {
		PyErr_Clear();
		fuse_reply_err(req, ENOMEM);
		return;
	}
	va_list args;
	va_start(args, format);
	PyObject *rest = Py_VaBuildValue(format, args);
	va_end(args);
	PyObject *all = NULL, *bound = NULL, *result = NULL;
	if (rest) {
		PyObject *first = PyTuple_Pack(1, (PyObject *)request);
		all = first ? PySequence_Concat(first, rest) : NULL;
		Py_XDECREF(first);
	}
	if (all)
		bound = PyObject_GetAttrString(handlers, method);
	if (bound)
		result = PyObject_CallObject(bound, all);
	if (!result)
		PyErr_WriteUnraisable(bound ? bound : handlers);
	Py_XDECREF(result);
	Py_XDECREF(bound);
	Py_XDECREF(all);
	Py_XDECREF(rest);
	Py_DECREF(request); /* the last reference of an unanswered request answers EIO */
}

/* Of fuse_file_info only flags, fh and lock_owner keep their place over libfuse 3.10 to 3.18. */
#define FH(fi) ((fi) ? (unsigned long long)(fi)->fh : 0ULL)

static void on_getattr(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	dispatch(req, "on_getattr", "(KKi)", (unsigned long long)ino, FH(fi), fi != NULL);
}

static void on_setattr(fuse_req_t req, fuse_ino_t ino, struct stat *st, int valid, struct fuse_file_info *fi)
{
	dispatch(req, "on_setattr", "(KiIIIKLLLLKi)", (unsigned long long)ino, valid, (unsigned)st->st_mode,
		 (unsigned)st->st_uid, (unsigned)st->st_gid, (unsigned long long)st->st_size,
		 (long long)st->st_atim.tv_sec, (long long)st->st_atim.tv_nsec, (long long)st->st_mtim.tv_sec,
		 (long long)st->st_mtim.tv_nsec, FH(fi), fi != NULL);
}

static void on_flush(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	count_flush((uint32_t)fuse_req_ctx(req)->pid);
	dispatch(req, "on_flush", "(KKK)", (unsigned long long)ino, FH(fi),
		 fi ? (unsigned long long)fi->lock_owner : 0ULL);
}

static void on_release(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	dispatch(req, "on_release", "(KK)", (unsigned long long)ino, FH(fi));
}

static void on_getlk(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi, struct flock *lock)
{
	dispatch(req, "on_getlk", "(KKKiLL)", (unsigned long long)ino, (unsigned long long)fi->fh,
		 (unsigned long long)fi->lock_owner, (int)lock->l_type, (long long)lock->l_start,
		 (long long)lock->l_len);
}

static void on_setlk(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi, struct flock *lock, int sleep)
{
	dispatch(req, "on_setlk", "(KKKiLLii)", (unsigned long long)ino, (unsigned long long)fi->fh,
		 (unsigned long long)fi->lock_owner, (int)lock->l_type, (long long)lock->l_start,
		 (long long)lock->l_len, (int)lock->l_pid, sleep);
}

static void on_flock(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi, int operation)
{
	dispatch(req, "on_flock", "(KKKi)", (unsigned long long)ino, (unsigned long long)fi->fh,
		 (unsigned long long)fi->lock_owner, operation);
}

static void on_readdir(fuse_req_t req, fuse_ino_t ino, size_t size, off_t off, struct fuse_file_info *fi)
{
	dispatch(req, "on_readdir", "(KKLn)", (unsigned long long)ino, FH(fi), (long long)off, (Py_ssize_t)size);
}

static void on_setxattr(fuse_req_t req, fuse_ino_t ino, const char *name, const char *value, size_t size, int flags)
{
	dispatch(req, "on_setxattr", "(Kyy#i)", (unsigned long long)ino, name, value, (Py_ssize_t)size, flags);
}

static void on_fallocate(fuse_req_t req, fuse_ino_t ino, int mode, off_t off, off_t length, struct fuse_file_info *fi)
{
	(void)ino;
	dispatch(req, "on_fallocate", "(KiLL)", FH(fi), mode, (long long)off, (long long)length);
}

static void on_lseek(fuse_req_t req, fuse_ino_t ino, off_t off, int whence, struct fuse_file_info *fi)
{
	(void)ino;
	dispatch(req, "on_lseek", "(KLi)", FH(fi), (long long)off, whence);
}

static void on_copy_file_range(fuse_req_t req, fuse_ino_t ino_in, off_t off_in, struct fuse_file_info *fi_in,
			       fuse_ino_t ino_out, off_t off_out, struct fuse_file_info *fi_out, size_t length,
			       int flags)
{
	(void)ino_in;
	(void)ino_out;
	dispatch(req, "on_copy_file_range", "(KLKLni)", FH(fi_in), (long long)off_in, FH(fi_out), (long long)off_out,
		 (Py_ssize_t)length, flags);
}

/* Answered here: no file behind the mount takes an ioctl, and Python's open() asks each one whether it is a tty. */
static void on_ioctl(fuse_req_t req, fuse_ino_t ino, unsigned int cmd, void *arg, struct fuse_file_info *fi,
		     unsigned flags, const void *in_buf, size_t in_size, size_t out_size)
{
	(void)ino, (void)cmd, (void)arg, (void)fi, (void)flags, (void)in_buf, (void)in_size, (void)out_size;
	fuse_reply_err(req, ENOTTY);
}

static void add_handlers(struct fuse_lowlevel_ops *ops)
{
	ops->getattr = on_getattr;
	ops->setattr = on_setattr;
	ops->flush = on_flush;
	ops->release = on_release;
	ops->getlk = on_getlk;
	ops->setlk = on_setlk;
	ops->flock = on_flock;
	ops->readdir = on_readdir;
	ops->setxattr = on_setxattr;
	ops->fallocate = on_fallocate;
	ops->lseek = on_lseek;
	ops->copy_file_range = on_copy_file_range;
	ops->ioctl = on_ioctl;
}

/* ------------------------------------------------------------ interposing */

#define EXPORT __attribute__((visibility("default")))

/* Our table is as long as the longer of the caller's and ours; what the caller does not know stays empty. */
static const struct fuse_lowlevel_ops *extended(const struct fuse_lowlevel_ops *op, size_t size, size_t *extended_size)
{
	static struct {
		struct fuse_lowlevel_ops ops;
		char later[512]; /* members that a libfuse newer than our headers has added */
	} table;
	memset(&table, 0, sizeof table);
	memcpy(&table, op, size < sizeof table ? size : sizeof table);
	if (handlers)
		add_handlers(&table.ops);
	*extended_size = size > sizeof table.ops ? size : sizeof table.ops;
	return &table.ops;
}

struct fuse_session *safefs_session_new(struct fuse_args *args, const struct fuse_lowlevel_ops *op, size_t size,
					void *userdata) __asm__("fuse_session_new");

EXPORT struct fuse_session *safefs_session_new(struct fuse_args *args, const struct fuse_lowlevel_ops *op,
					       size_t size, void *userdata)
{
	struct fuse_session *(*real)(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t, void *) =
		libfuse_symbol("fuse_session_new");
	op = extended(op, size, &size);
	return session = real(args, op, size, userdata);
}

struct fuse_session *safefs_session_new_versioned(struct fuse_args *args, const struct fuse_lowlevel_ops *op,
						  size_t size, void *version,
						  void *userdata) __asm__("fuse_session_new_versioned");

/* libfuse 3.17 and later. */
EXPORT struct fuse_session *safefs_session_new_versioned(struct fuse_args *args, const struct fuse_lowlevel_ops *op,
							 size_t size, void *version, void *userdata)
{
	struct fuse_session *(*real)(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t, void *, void *) =
		libfuse_symbol("fuse_session_new_versioned");
	op = extended(op, size, &size);
	return session = real(args, op, size, version, userdata);
}

static struct fuse_entry_param with_inode_number(const struct fuse_entry_param *entry)
{
	struct fuse_entry_param copy = *entry;
	copy.attr.st_ino = entry->generation;
	copy.generation = 0;
	return copy;
}

EXPORT int fuse_reply_entry(fuse_req_t req, const struct fuse_entry_param *entry)
{
	static int (*real)(fuse_req_t, const struct fuse_entry_param *);
	if (!real)
		real = libfuse_symbol("fuse_reply_entry");
	struct fuse_entry_param shown = with_inode_number(entry);
	return real(req, &shown);
}

EXPORT size_t fuse_add_direntry_plus(fuse_req_t req, char *buf, size_t size, const char *name,
				     const struct fuse_entry_param *entry, off_t off)
{
	static size_t (*real)(fuse_req_t, char *, size_t, const char *, const struct fuse_entry_param *, off_t);
	if (!real)
		real = libfuse_symbol("fuse_add_direntry_plus");
	struct fuse_entry_param shown = with_inode_number(entry);
	return real(req, buf, size, name, &shown, off);
}

static void fill_open(struct open_out *out, const struct fuse_file_info *fi)
{
	memset(out, 0, sizeof *out);
	out->fh = fi->fh & FH_HANDLE;
	if (fi->fh & FH_NOFLUSH)
		out->open_flags |= FOPEN_NOFLUSH;
	if (fi->fh & FH_PASSTHROUGH) {
		out->open_flags |= OPEN_PASSTHROUGH;
		out->backing_id = (int32_t)(fi->fh >> FH_BACKING_SHIFT & FH_BACKING_MASK);
		return; /* passthrough with FOPEN_KEEP_CACHE is refused by the kernel */
	}
	if (fi->direct_io)
		out->open_flags |= FOPEN_DIRECT_IO;
	if (fi->keep_cache)
		out->open_flags |= FOPEN_KEEP_CACHE;
	if (fi->nonseekable)
		out->open_flags |= FOPEN_NONSEEKABLE;
}

EXPORT int fuse_reply_open(fuse_req_t req, const struct fuse_file_info *fi)
{
	struct open_out out;
	fill_open(&out, fi);
	return fuse_reply_buf(req, (const char *)&out, sizeof out);
}

static void fill_timeout(double timeout, uint64_t *seconds, uint32_t *nanoseconds)
{
	if (!(timeout > 0))
		timeout = 0;
	if (timeout > 1e15)
		timeout = 1e15;
	*seconds = (uint64_t)timeout;
	*nanoseconds = (uint32_t)((timeout - (double)*seconds) * 1e9);
}

EXPORT int fuse_reply_create(fuse_req_t req, const struct fuse_entry_param *entry, const struct fuse_file_info *fi)
{
	struct {
		struct fuse_entry_out entry;
		struct open_out open;
	} out;
	memset(&out, 0, sizeof out);
	struct fuse_entry_param shown = with_inode_number(entry);
	const struct stat *st = &shown.attr;
	out.entry.nodeid = shown.ino;
	fill_timeout(shown.entry_timeout, &out.entry.entry_valid, &out.entry.entry_valid_nsec);
	fill_timeout(shown.attr_timeout, &out.entry.attr_valid, &out.entry.attr_valid_nsec);
	struct fuse_attr *attr = &out.entry.attr;
	attr->ino = st->st_ino;
	attr->mode = st->st_mode;
	attr->nlink = (uint32_t)st->st_nlink;
	attr->uid = st->st_uid;
	attr->gid = st->st_gid;
	attr->rdev = (uint32_t)st->st_rdev;
	attr->size = (uint64_t)st->st_size;
	attr->blksize = (uint32_t)st->st_blksize;
	attr->blocks = (uint64_t)st->st_blocks;
	attr->atime = (uint64_t)st->st_atim.tv_sec;
	attr->atimensec = (uint32_t)st->st_atim.tv_nsec;
	attr->mtime = (uint64_t)st->st_mtim.tv_sec;
	attr->mtimensec = (uint32_t)st->st_mtim.tv_nsec;
	attr->ctime = (uint64_t)st->st_ctim.tv_sec;
	attr->ctimensec = (uint32_t)st->st_ctim.tv_nsec;
	fill_open(&out.open, fi);
	return fuse_reply_buf(req, (const char *)&out, sizeof out);
}

/* ------------------------------------------------------- module functions */

static PyObject *native_install(PyObject *module, PyObject *object)
{
	(void)module;
	Py_INCREF(object);
	Py_XSETREF(handlers, object);
	Py_RETURN_NONE;
}

/* The INIT request waits on the session's descriptor: receive it and let libfuse and pyfuse3 answer. */
static PyObject *native_process_one(PyObject *module, PyObject *ignored)
{
	(void)module, (void)ignored;
	if (!session) {
		PyErr_SetString(PyExc_RuntimeError, "pyfuse3 did not call our fuse_session_new");
		return NULL;
	}
	struct fuse_buf buffer;
	memset(&buffer, 0, sizeof buffer);
	int result = fuse_session_receive_buf(session, &buffer);
	if (result > 0)
		fuse_session_process_buf(session, &buffer);
	free(buffer.mem);
	if (result < 0) {
		errno = -result;
		return PyErr_SetFromErrno(PyExc_OSError);
	}
	return PyLong_FromLong(result);
}

static PyObject *native_session_seen(PyObject *module, PyObject *ignored)
{
	(void)module, (void)ignored;
	return PyBool_FromLong(session != NULL);
}

static PyObject *native_libfuse_version(PyObject *module, PyObject *ignored)
{
	(void)module, (void)ignored;
	return PyUnicode_FromString(fuse_pkgversion());
}

static PyObject *result_or_errno(int result)
{
	if (result < 0)
		return PyErr_SetFromErrno(PyExc_OSError);
	return PyLong_FromLong(result);
}

static PyObject *native_mount(PyObject *module, PyObject *args)
{
	(void)module;
	const char *source, *target, *type, *data;
	unsigned long flags;
	if (!PyArg_ParseTuple(args, "yysky", &source, &target, &type, &flags, &data))
		return NULL;
	int result;
	Py_BEGIN_ALLOW_THREADS result = mount(source, target, type, flags, data);
	Py_END_ALLOW_THREADS return result_or_errno(result);
}

static PyObject *native_umount2(PyObject *module, PyObject *args)
{
	(void)module;
	const char *target;
	int flags, result;
	if (!PyArg_ParseTuple(args, "yi", &target, &flags))
		return NULL;
	Py_BEGIN_ALLOW_THREADS result = umount2(target, flags);
	Py_END_ALLOW_THREADS return result_or_errno(result);
}

/* A thread that acts for callers has a umask of its own (CLONE_FS ended) from its first call on. */
static __thread int own_umask;

static PyObject *native_private_umask(PyObject *module, PyObject *arg)
{
	(void)module;
	long mask = PyLong_AsLong(arg);
	if (mask == -1 && PyErr_Occurred())
		return NULL;
	if (!own_umask) {
		if (unshare(CLONE_FS) < 0)
			return PyErr_SetFromErrno(PyExc_OSError);
		own_umask = 1;
	}
	umask((mode_t)mask);
	Py_RETURN_NONE;
}

/* Take on (or, with the daemon's own numbers, lay off) a caller's filesystem identity, in this thread only: glibc's
 * setgroups() would change every thread.  setfsuid(2): leaving uid 0 drops the capabilities that override
 * permissions, going back restores them. */
static PyObject *native_become(PyObject *module, PyObject *args)
{
	(void)module;
	unsigned int uid, gid;
	PyObject *groups;
	if (!PyArg_ParseTuple(args, "IIO!", &uid, &gid, &PyTuple_Type, &groups))
		return NULL;
	Py_ssize_t count = PyTuple_GET_SIZE(groups);
	gid_t *list = PyMem_Calloc((size_t)count + 1, sizeof *list);
	if (!list)
		return PyErr_NoMemory();
	for (Py_ssize_t i = 0; i < count; i++)
		list[i] = (gid_t)PyLong_AsUnsignedLong(PyTuple_GET_ITEM(groups, i));
	if (PyErr_Occurred()) {
		PyMem_Free(list);
		return NULL;
	}
	int error = 0;
	if (syscall(SYS_setgroups, (size_t)count, list) < 0)
		error = errno;
	PyMem_Free(list);
	if (!error) {
		setfsgid(gid);
		setfsuid(uid);
		/* setfsuid(-1) changes nothing and returns the value in force: the only way to see a refusal. */
		if ((unsigned)setfsgid((gid_t)-1) != gid || (unsigned)setfsuid((uid_t)-1) != uid)
			error = EPERM;
	}
	if (error) {
		errno = error;
		return PyErr_SetFromErrno(PyExc_OSError);
	}
	Py_RETURN_NONE;
}

/* Leave a capability behind in this thread and those that it starts. */
static PyObject *native_drop_capability(PyObject *module, PyObject *arg)
{
	(void)module;
	long capability = PyLong_AsLong(arg);
	if (capability == -1 && PyErr_Occurred())
		return NULL;
	struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
	struct __user_cap_data_struct data[_LINUX_CAPABILITY_U32S_3];
	int result = (int)syscall(SYS_capget, &header, data);
	if (result == 0) {
		data[capability / 32].effective &= ~(1u << capability % 32);
		result = (int)syscall(SYS_capset, &header, data);
	}
	if (result < 0)
		return PyErr_SetFromErrno(PyExc_OSError);
	Py_RETURN_NONE;
}

static PyObject *native_linkat(PyObject *module, PyObject *args)
{
	(void)module;
	int old_dir, new_dir, flags, result;
	const char *old_path, *new_path;
	if (!PyArg_ParseTuple(args, "iyiyi", &old_dir, &old_path, &new_dir, &new_path, &flags))
		return NULL;
	Py_BEGIN_ALLOW_THREADS result = linkat(old_dir, old_path, new_dir, new_path, flags);
	Py_END_ALLOW_THREADS return result_or_errno(result);
}

static PyObject *native_renameat2(PyObject *module, PyObject *args)
{
	(void)module;
	int old_dir, new_dir, result;
	unsigned int flags;
	const char *old_path, *new_path;
	if (!PyArg_ParseTuple(args, "iyiyI", &old_dir, &old_path, &new_dir, &new_path, &flags))
		return NULL;
	Py_BEGIN_ALLOW_THREADS result = renameat2(old_dir, old_path, new_dir, new_path, flags);
	Py_END_ALLOW_THREADS return result_or_errno(result);
}

static PyObject *native_fallocate(PyObject *module, PyObject *args)
{
	(void)module;
	int fd, mode, result;
	long long off, length;
	if (!PyArg_ParseTuple(args, "iiLL", &fd, &mode, &off, &length))
		return NULL;
	Py_BEGIN_ALLOW_THREADS result = fallocate(fd, mode, off, length);
	Py_END_ALLOW_THREADS return result_or_errno(result);
}

static PyObject *native_link_count(PyObject *module, PyObject *arg)
{
	(void)module;
	struct statx status;
	long fd = PyLong_AsLong(arg);
	if (fd == -1 && PyErr_Occurred())
		return NULL;
	int result;
	Py_BEGIN_ALLOW_THREADS result =
		statx((int)fd, "", AT_EMPTY_PATH | AT_STATX_FORCE_SYNC, STATX_NLINK, &status);
	Py_END_ALLOW_THREADS if (result < 0) return PyErr_SetFromErrno(PyExc_OSError);
	return PyLong_FromUnsignedLong(status.stx_nlink);
}

static PyObject *native_birth_time(PyObject *module, PyObject *arg)
{
	(void)module;
	struct statx status;
	long fd = PyLong_AsLong(arg);
	if (fd == -1 && PyErr_Occurred())
		return NULL;
	int result;
	Py_BEGIN_ALLOW_THREADS result = statx((int)fd, "", AT_EMPTY_PATH, STATX_BTIME, &status);
	Py_END_ALLOW_THREADS if (result < 0) return PyErr_SetFromErrno(PyExc_OSError);
	if (!(status.stx_mask & STATX_BTIME))
		return PyLong_FromLong(0);
	return PyLong_FromLongLong(status.stx_btime.tv_sec * 1000000000LL + status.stx_btime.tv_nsec);
}

static PyObject *native_utimensat(PyObject *module, PyObject *args)
{
	(void)module;
	const char *path;
	long long seconds[2], nanoseconds[2];
	int result;
	if (!PyArg_ParseTuple(args, "yLLLL", &path, &seconds[0], &nanoseconds[0], &seconds[1], &nanoseconds[1]))
		return NULL;
	struct timespec times[2];
	for (int i = 0; i < 2; i++) {
		times[i].tv_sec = seconds[i];
		times[i].tv_nsec = nanoseconds[i];
	}
	Py_BEGIN_ALLOW_THREADS result = utimensat(AT_FDCWD, path, times, 0);
	Py_END_ALLOW_THREADS return result_or_errno(result);
}

static PyObject *native_fchown(PyObject *module, PyObject *args)
{
	(void)module;
	int fd, result;
	unsigned int uid, gid;
	if (!PyArg_ParseTuple(args, "iII", &fd, &uid, &gid))
		return NULL;
	Py_BEGIN_ALLOW_THREADS result = fchownat(fd, "", uid, gid, AT_EMPTY_PATH | AT_SYMLINK_NOFOLLOW);
	Py_END_ALLOW_THREADS return result_or_errno(result);
}

static PyObject *native_name_to_handle(PyObject *module, PyObject *arg)
{
	(void)module;
	long fd = PyLong_AsLong(arg);
	if (fd == -1 && PyErr_Occurred())
		return NULL;
	struct {
		struct file_handle head;
		unsigned char bytes[MAX_HANDLE_SZ];
	} handle;
	handle.head.handle_bytes = MAX_HANDLE_SZ;
	int mount_id, result;
	Py_BEGIN_ALLOW_THREADS result = name_to_handle_at((int)fd, "", &handle.head, &mount_id, AT_EMPTY_PATH);
	Py_END_ALLOW_THREADS if (result < 0) return PyErr_SetFromErrno(PyExc_OSError);
	return PyBytes_FromStringAndSize((const char *)&handle, (Py_ssize_t)(sizeof handle.head + handle.head.handle_bytes));
}

static PyObject *native_open_by_handle(PyObject *module, PyObject *args)
{
	(void)module;
	int mount_fd, flags, result;
	Py_buffer handle;
	if (!PyArg_ParseTuple(args, "iy*i", &mount_fd, &handle, &flags))
		return NULL;
	Py_BEGIN_ALLOW_THREADS result = open_by_handle_at(mount_fd, handle.buf, flags);
	Py_END_ALLOW_THREADS PyBuffer_Release(&handle);
	return result_or_errno(result);
}

struct linux_dirent64 {
	uint64_t ino;
	int64_t off;
	unsigned short reclen;
	unsigned char type;
	char name[];
};

static size_t put_dirent(char *out, const struct linux_dirent64 *entry)
{
	size_t length = strlen(entry->name), whole = FUSE_DIRENT_ALIGN(FUSE_NAME_OFFSET + length);
	struct fuse_dirent dirent = {.ino = entry->ino,
				     .off = (uint64_t)entry->off,
				     .namelen = (uint32_t)length,
				     .type = entry->type};
	memcpy(out, &dirent, FUSE_NAME_OFFSET);
	memcpy(out + FUSE_NAME_OFFSET, entry->name, length);
	memset(out + FUSE_NAME_OFFSET + length, 0, whole - FUSE_NAME_OFFSET - length);
	return whole;
}

/* One READDIR answer: entries of the open directory `fd` from `offset` on, as struct fuse_dirent, at most `size`
 * bytes, without names that start with `hidden` and without the name `state`.  Offsets are
 * the backing filesystem's own cookies, so they stay valid as long as it promises (seekdir(3)). */
ssize_t read_directory(int fd, int64_t offset, char *out, char *buffer, size_t size, const char *hidden,
		       const char *state)
{
	size_t used = 0, hidden_length = strlen(hidden);
	if (lseek(fd, offset, SEEK_SET) < 0)
		return -errno;
	while (used == 0) { /* a chunk of nothing but hidden names is no end of the directory */
		/* A fuse_dirent takes up to 8 bytes more than the Linux dirent (24 bytes at least) it is made of, so
		 * what is asked for is so much less that all of it always fits: an entry once read must not be dropped. */
		long count = syscall(SYS_getdents64, fd, buffer, size / 4 * 3);
		if (count < 0)
			return -errno;
		if (count == 0)
			break;
		for (long at = 0; at < count;) {
			struct linux_dirent64 *entry = (struct linux_dirent64 *)(buffer + at);
			at += entry->reclen;
			if (strncmp(entry->name, hidden, hidden_length) && strcmp(entry->name, state))
				used += put_dirent(out + used, entry);
		}
	}
	return (ssize_t)used;
}

static PyObject *native_read_directory(PyObject *module, PyObject *args)
{
	(void)module;
	int fd;
	long long offset;
	Py_ssize_t size;
	const char *hidden, *state;
	if (!PyArg_ParseTuple(args, "iLnyy", &fd, &offset, &size, &hidden, &state))
		return NULL;
	PyObject *answer = PyBytes_FromStringAndSize(NULL, size);
	char *buffer = malloc((size_t)size);
	if (!answer || !buffer) {
		Py_XDECREF(answer);
		free(buffer);
		return PyErr_NoMemory();
	}
	ssize_t used;
	Py_BEGIN_ALLOW_THREADS used =
		read_directory(fd, offset, PyBytes_AS_STRING(answer), buffer, (size_t)size, hidden, state);
	Py_END_ALLOW_THREADS free(buffer);
	if (used < 0) {
		Py_DECREF(answer);
		errno = (int)-used;
		return PyErr_SetFromErrno(PyExc_OSError);
	}
	_PyBytes_Resize(&answer, used);
	return answer;
}

/* The number behind `name` in the text of /proc/PID/fdinfo/N; -1 where there is none. */
static long long fdinfo_number(const char *text, const char *name, int base)
{
	const char *found = strstr(text, name);
	return found ? strtoll(found + strlen(name), NULL, base) : -1;
}

/* Mount ids of the writable descriptors that a process has on files with this st_ino.  In C, because a process can
 * have thousands of descriptors and all of them are looked at for one close.  The files read here are safe to read of
 * a process in execve (safefs/processes.py). */
static PyObject *native_writable_mounts(PyObject *module, PyObject *args)
{
	(void)module;
	int tgid, count = 0;
	unsigned long long ino;
	if (!PyArg_ParseTuple(args, "iK", &tgid, &ino))
		return NULL;
	long long mounts[64]; /* more copies than these tell nothing new */
	char path[64], text[1024];
	snprintf(path, sizeof path, "/proc/%d/fdinfo", tgid);
	Py_BEGIN_ALLOW_THREADS DIR *directory = opendir(path);
	struct dirent *entry;
	while (directory && count < 64 && (entry = readdir(directory))) {
		int fd = openat(dirfd(directory), entry->d_name, O_RDONLY | O_CLOEXEC);
		if (fd < 0)
			continue;
		ssize_t length = read(fd, text, sizeof text - 1);
		close(fd);
		if (length <= 0)
			continue;
		text[length] = 0;
		if ((unsigned long long)fdinfo_number(text, "\nino:", 10) == ino &&
		    (fdinfo_number(text, "\nflags:", 8) & O_ACCMODE) != O_RDONLY)
			mounts[count++] = fdinfo_number(text, "\nmnt_id:", 10);
	}
	if (directory)
		closedir(directory);
	Py_END_ALLOW_THREADS PyObject *list = PyList_New(count);
	for (int i = 0; list && i < count; i++)
		PyList_SET_ITEM(list, i, PyLong_FromLongLong(mounts[i]));
	return list;
}

static PyMethodDef native_methods[] = {
	{"install", native_install, METH_O, "Set the object whose on_* methods get our requests, before pyfuse3.init."},
	{"process_one", native_process_one, METH_NOARGS, "Receive and process one waiting request."},
	{"session_seen", native_session_seen, METH_NOARGS, "Whether pyfuse3 made its session through this module."},
	{"libfuse_version", native_libfuse_version, METH_NOARGS, "Version of the libfuse3 in use."},
	{"mount", native_mount, METH_VARARGS, "mount(2)"},
	{"umount2", native_umount2, METH_VARARGS, "umount2(2)"},
	{"private_umask", native_private_umask, METH_O, "Set the umask of this thread alone."},
	{"become", native_become, METH_VARARGS, "Set fsuid, fsgid and groups of this thread alone."},
	{"drop_capability", native_drop_capability, METH_O, "Drop one capability from the effective set."},
	{"linkat", native_linkat, METH_VARARGS, "linkat(2)"},
	{"renameat2", native_renameat2, METH_VARARGS, "renameat2(2)"},
	{"fallocate", native_fallocate, METH_VARARGS, "fallocate(2)"},
	{"birth_time", native_birth_time, METH_O, "When a descriptor's inode was made (ns), 0 where that is not known."},
	{"link_count", native_link_count, METH_O, "st_nlink of a descriptor, asked of the server (AT_STATX_FORCE_SYNC)."},
	{"utimensat", native_utimensat, METH_VARARGS, "utimensat(2), with UTIME_NOW and UTIME_OMIT"},
	{"fchown", native_fchown, METH_VARARGS, "fchownat(2) of a descriptor, O_PATH and symbolic links included"},
	{"name_to_handle", native_name_to_handle, METH_O, "name_to_handle_at(2) of a descriptor"},
	{"open_by_handle", native_open_by_handle, METH_VARARGS, "open_by_handle_at(2)"},
	{"writable_mounts", native_writable_mounts, METH_VARARGS, "Mounts of a process's writable copies of a file."},
	{"read_directory", native_read_directory, METH_VARARGS, "One READDIR answer from getdents64(2)."},
	{NULL}};

static struct PyModuleDef native_module = {
	PyModuleDef_HEAD_INIT, .m_name = "safefs._native", .m_size = -1, .m_methods = native_methods};

PyMODINIT_FUNC PyInit__native(void)
{
	PyObject *module = PyModule_Create(&native_module);
	if (!module || PyType_Ready(&RequestType) < 0)
		return NULL;
	Py_INCREF(&RequestType);
	if (PyModule_AddObject(module, "Request", (PyObject *)&RequestType) < 0)
		return NULL;
	if (hot_add_to(module) < 0)
		return NULL;
	if (PyModule_AddObject(module, "FH_PASSTHROUGH", PyLong_FromUnsignedLongLong(FH_PASSTHROUGH)) < 0 ||
	    PyModule_AddObject(module, "FH_NOFLUSH", PyLong_FromUnsignedLongLong(FH_NOFLUSH)) < 0 ||
	    PyModule_AddIntConstant(module, "FH_BACKING_SHIFT", FH_BACKING_SHIFT) < 0)
		return NULL;
	return module;
}
