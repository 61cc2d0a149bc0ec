/* What Python calls of the hot requests.  See hot.h. */
#define PY_SSIZE_T_CLEAN
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <Python.h>
#include "hot.h"
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static struct timespec timespec_of(double seconds)
{
	time_t whole = (time_t)seconds;
	return (struct timespec){whole, (long)((seconds - (double)whole) * 1e9)};
}

static PyObject *hot_configure(PyObject *module, PyObject *args)
{
	(void)module;
	double entry, attr, directory;
	int impersonate, believes_misses, ceiling;
	Py_ssize_t max_born;
	const char *hidden, *state;
	PyObject *globs;
	if (!PyArg_ParseTuple(args, "dddppniyyO!", &entry, &attr, &directory, &impersonate, &believes_misses, &max_born,
			      &ceiling, &hidden, &state, &PyTuple_Type, &globs))
		return NULL;
	hot_settings = (struct hot_settings){timespec_of(entry), timespec_of(attr), timespec_of(directory),
					     impersonate,        believes_misses,   (size_t)max_born,
					     ceiling,            "",                ""};
	strncpy(hot_settings.hidden, hidden, sizeof hot_settings.hidden - 1);
	strncpy(hot_settings.state, state, sizeof hot_settings.state - 1);
	for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(globs); i++) {
		const char *glob = PyBytes_AsString(PyTuple_GET_ITEM(globs, i));
		if (!glob)
			return NULL;
		if (!doubts_add(glob))
			return PyErr_NoMemory();
	}
	Py_RETURN_NONE;
}

/* The only argument of a METH_O function; false with a Python error. */
static bool int_of(PyObject *arg, int *number)
{
	*number = (int)PyLong_AsLong(arg);
	return *number != -1 || !PyErr_Occurred();
}

static bool number_of(PyObject *arg, unsigned long long *number)
{
	*number = PyLong_AsUnsignedLongLong(arg);
	return *number != (unsigned long long)-1 || !PyErr_Occurred();
}

static PyObject *none_or_errno(int result)
{
	if (result < 0)
		return PyErr_SetFromErrno(PyExc_OSError);
	Py_RETURN_NONE;
}

static PyObject *module_prepare(PyObject *module, PyObject *ignored)
{
	(void)module, (void)ignored;
	return none_or_errno(hot_prepare());
}

static PyObject *module_start(PyObject *module, PyObject *arg)
{
	(void)module;
	int fd;
	if (!int_of(arg, &fd))
		return NULL;
	return none_or_errno(hot_start(fd));
}

static PyObject *module_stop(PyObject *module, PyObject *ignored)
{
	(void)module, (void)ignored;
	Py_BEGIN_ALLOW_THREADS hot_stop();
	Py_END_ALLOW_THREADS Py_RETURN_NONE;
}

static PyObject *counts(const atomic_ulong *counters)
{
	PyObject *result = PyDict_New();
	for (int i = 0; result && i < OPCODES; i++) {
		unsigned long count = atomic_load_explicit(&counters[i], memory_order_relaxed);
		PyObject *key = count ? PyLong_FromLong(i) : NULL, *value = count ? PyLong_FromUnsignedLong(count) : NULL;
		if (count && (!key || !value || PyDict_SetItem(result, key, value) < 0))
			Py_CLEAR(result);
		Py_XDECREF(key);
		Py_XDECREF(value);
	}
	return result;
}

static PyObject *module_counters(PyObject *module, PyObject *ignored)
{
	(void)module, (void)ignored;
	PyObject *answered = counts(hot_answered), *passed = counts(hot_passed);
	if (!answered || !passed) {
		Py_XDECREF(answered);
		Py_XDECREF(passed);
		return NULL;
	}
	return Py_BuildValue("{s:N,s:N,s:n,s:n}", "answered", answered, "passed", passed, "threads",
			     (Py_ssize_t)hot_threads(), "born", (Py_ssize_t)table_born());
}

/* ------------------------------------------------------------------- marks */

static PyObject *module_mark_name(PyObject *module, PyObject *args)
{
	(void)module;
	unsigned long long parent;
	const char *name;
	int change;
	if (!PyArg_ParseTuple(args, "Kyi", &parent, &name, &change))
		return NULL;
	mark_name(parent, name, change);
	mark_directory(parent, change);
	Py_RETURN_NONE;
}

static PyObject *module_mark_thread(PyObject *module, PyObject *args)
{
	(void)module;
	unsigned int tid;
	int change;
	if (!PyArg_ParseTuple(args, "Ii", &tid, &change))
		return NULL;
	mark_thread(tid, change);
	Py_RETURN_NONE;
}

static PyObject *mark_number(PyObject *args, void (*mark)(uint64_t number, int change))
{
	unsigned long long number;
	int change;
	if (!PyArg_ParseTuple(args, "Ki", &number, &change))
		return NULL;
	mark(number, change);
	Py_RETURN_NONE;
}

static PyObject *module_mark_handle(PyObject *module, PyObject *args)
{
	(void)module;
	return mark_number(args, mark_handle);
}

static PyObject *module_mark_owner(PyObject *module, PyObject *args)
{
	(void)module;
	return mark_number(args, mark_owner);
}

static PyObject *module_flushes_of(PyObject *module, PyObject *args)
{
	(void)module;
	unsigned int tid;
	if (!PyArg_ParseTuple(args, "I", &tid))
		return NULL;
	return PyLong_FromUnsignedLong(flushes_of(tid));
}

static PyObject *module_hear_closes(PyObject *module, PyObject *args)
{
	(void)module;
	const char *name;
	if (!PyArg_ParseTuple(args, "y", &name))
		return NULL;
	hear_closes(name);
	Py_RETURN_NONE;
}

static PyObject *module_hear_all_closes(PyObject *module, PyObject *args)
{
	(void)module;
	(void)args;
	hear_closes(NULL);
	Py_RETURN_NONE;
}

static PyObject *module_hears_closes(PyObject *module, PyObject *args)
{
	(void)module;
	const char *name;
	if (!PyArg_ParseTuple(args, "y", &name))
		return NULL;
	return PyBool_FromLong(hears_closes(name));
}

/* ------------------------------------------------------------------- walks */

static PyObject *module_note_walk(PyObject *module, PyObject *args)
{
	(void)module;
	unsigned tid;
	unsigned long long nodeid, parent;
	const char *name;
	if (!PyArg_ParseTuple(args, "IKKy", &tid, &nodeid, &parent, &name))
		return NULL;
	walk_note(tid, nodeid, parent, name);
	Py_RETURN_NONE;
}

static PyObject *module_last_walk(PyObject *module, PyObject *args)
{
	(void)module;
	unsigned tid;
	unsigned long long nodeid;
	struct place place;
	if (!PyArg_ParseTuple(args, "IK", &tid, &nodeid))
		return NULL;
	if (!walk_last(tid, nodeid, &place))
		Py_RETURN_NONE;
	return Py_BuildValue("Ky", (unsigned long long)place.parent, place.name);
}

static bool place_of(struct place *place, unsigned long long parent, const char *name)
{
	place->parent = parent;
	if (strlen(name) < sizeof place->name) {
		strcpy(place->name, name);
		return true;
	}
	PyErr_SetString(PyExc_ValueError, "a name that is too long");
	return false;
}

static PyObject *module_move_walks(PyObject *module, PyObject *args)
{
	(void)module;
	unsigned long long nodeid, parent, new_parent;
	const char *name, *new_name;
	struct place before, now;
	if (!PyArg_ParseTuple(args, "KKyKy", &nodeid, &parent, &name, &new_parent, &new_name) ||
	    !place_of(&before, parent, name) || !place_of(&now, new_parent, new_name))
		return NULL;
	walk_moved(nodeid, &before, &now);
	Py_RETURN_NONE;
}

/* ------------------------------------------------------------------- loans */

static PyObject *module_lend_lock(PyObject *module, PyObject *args)
{
	(void)module;
	unsigned long long fh, owner;
	struct loan loan;
	double until;
	if (!PyArg_ParseTuple(args, "KKiId", &fh, &owner, &loan.type, &loan.tid, &until))
		return NULL;
	/* Infinity is a node that has no lease to lose. */
	int64_t until_ns = until < (double)INT64_MAX / 1e9 ? (int64_t)(until * 1e9) : INT64_MAX;
	if (!loan_give(fh, owner, loan, until_ns))
		return PyErr_NoMemory();
	Py_RETURN_NONE;
}

static PyObject *module_take_lock_back(PyObject *module, PyObject *arg)
{
	(void)module;
	unsigned long long fh;
	struct loan loan;
	if (!number_of(arg, &fh))
		return NULL;
	if (!loan_take(fh, &loan))
		Py_RETURN_NONE;
	return Py_BuildValue("iI", (int)loan.type, (unsigned)loan.tid);
}

/* ------------------------------------------------------------------- nodes */

static PyObject *module_new_nodeid(PyObject *module, PyObject *ignored)
{
	(void)module, (void)ignored;
	return PyLong_FromUnsignedLongLong(table_new_number());
}

static PyObject *module_register(PyObject *module, PyObject *args)
{
	(void)module;
	unsigned long long nodeid, dev, ino;
	if (!PyArg_ParseTuple(args, "KKK", &nodeid, &dev, &ino))
		return NULL;
	return PyLong_FromUnsignedLongLong(table_register(nodeid, (struct identity){dev, ino}));
}

static PyObject *stamp_object(struct stamp stamp)
{
	if (!stamp.known)
		Py_RETURN_NONE;
	return Py_BuildValue("(LL)", (long long)stamp.size, (long long)stamp.mtime_ns);
}

static PyObject *module_offer(PyObject *module, PyObject *args)
{
	(void)module;
	unsigned long long nodeid, parent;
	unsigned int mode;
	int fd, in_place;
	const char *name;
	PyObject *seen;
	if (!PyArg_ParseTuple(args, "KIiKyOp", &nodeid, &mode, &fd, &parent, &name, &seen, &in_place))
		return NULL;
	struct stamp stamp = {0};
	long long size, mtime_ns;
	if (seen != Py_None) {
		if (!PyArg_ParseTuple(seen, "LL", &size, &mtime_ns))
			return NULL;
		stamp = (struct stamp){true, size, mtime_ns};
	}
	return PyBool_FromLong(table_offer(nodeid, mode, fd, parent, name, stamp, in_place));
}

static PyObject *settled_object(const struct settled *settled)
{
	PyObject *stamp = stamp_object(settled->stamp);
	if (!stamp)
		return NULL;
	return Py_BuildValue("(KNO)", (unsigned long long)settled->lookups, stamp,
			     settled->descriptor_kept ? Py_True : Py_False);
}

static PyObject *module_withdraw(PyObject *module, PyObject *arg)
{
	(void)module;
	unsigned long long nodeid;
	if (!number_of(arg, &nodeid))
		return NULL;
	struct settled settled;
	if (!table_withdraw(nodeid, &settled))
		Py_RETURN_NONE;
	return settled_object(&settled);
}

static PyObject *module_give_back(PyObject *module, PyObject *args)
{
	(void)module;
	unsigned long long nodeid, count;
	if (!PyArg_ParseTuple(args, "KK", &nodeid, &count))
		return NULL;
	table_give_back(nodeid, count);
	Py_RETURN_NONE;
}

static PyObject *module_unregister(PyObject *module, PyObject *args)
{
	(void)module;
	unsigned long long nodeid;
	int always;
	if (!PyArg_ParseTuple(args, "Kp", &nodeid, &always))
		return NULL;
	struct settled settled;
	if (!table_unregister(nodeid, always, &settled))
		Py_RETURN_NONE;
	return settled_object(&settled);
}

static PyObject *adopted_object(struct node *node)
{
	if (!node)
		Py_RETURN_NONE;
	PyObject *stamp = stamp_object(node->stamp);
	const struct handle *handle = node->handle;
	Py_ssize_t handle_size = handle ? (Py_ssize_t)(sizeof *handle + handle->bytes) : 0;
	PyObject *result = stamp ? Py_BuildValue("(KKKIiKyNy#)", (unsigned long long)node->nodeid,
						 (unsigned long long)node->identity.dev,
						 (unsigned long long)node->identity.ino, (unsigned)node->mode, node->fd,
						 (unsigned long long)node->parent, node->name, stamp,
						 (const char *)handle, handle_size)
				 : NULL;
	free_adopted(node);
	return result;
}

static PyObject *module_adopt(PyObject *module, PyObject *arg)
{
	(void)module;
	unsigned long long nodeid;
	if (!number_of(arg, &nodeid))
		return NULL;
	return adopted_object(table_adopt(nodeid));
}

static PyObject *module_adopt_inode(PyObject *module, PyObject *args)
{
	(void)module;
	unsigned long long dev, ino;
	if (!PyArg_ParseTuple(args, "KK", &dev, &ino))
		return NULL;
	return adopted_object(table_adopt_identity((struct identity){dev, ino}));
}

static PyObject *module_stamp(PyObject *module, PyObject *args)
{
	(void)module;
	unsigned long long nodeid;
	long long size, mtime_ns;
	if (!PyArg_ParseTuple(args, "KLL", &nodeid, &size, &mtime_ns))
		return NULL;
	int same = table_stamp(nodeid, size, mtime_ns);
	if (same < 0)
		Py_RETURN_NONE;
	return PyBool_FromLong(same);
}

/* ------------------------------------------------------------------- opens */

static PyObject *module_backing_enable(PyObject *module, PyObject *arg)
{
	(void)module;
	int fd;
	if (!int_of(arg, &fd))
		return NULL;
	backing_enable(fd);
	Py_RETURN_NONE;
}

static PyObject *module_backing_register(PyObject *module, PyObject *arg)
{
	(void)module;
	int fd;
	if (!int_of(arg, &fd))
		return NULL;
	int32_t backing_id;
	Py_BEGIN_ALLOW_THREADS backing_id = backing_register(fd);
	Py_END_ALLOW_THREADS if (backing_id < 0) return PyErr_SetFromErrno(PyExc_OSError);
	return PyLong_FromLong(backing_id);
}

static PyObject *module_backing_close(PyObject *module, PyObject *arg)
{
	(void)module;
	int backing_id;
	if (!int_of(arg, &backing_id))
		return NULL;
	backing_close(backing_id);
	Py_RETURN_NONE;
}

static PyObject *module_opens_agreed(PyObject *module, PyObject *arg)
{
	(void)module;
	unsigned long long nodeid;
	if (!number_of(arg, &nodeid))
		return NULL;
	int32_t backing_id = opens_agreed(nodeid);
	if (backing_id < 0)
		Py_RETURN_NONE;
	return PyLong_FromLong(backing_id);
}

static PyObject *module_opens_join(PyObject *module, PyObject *args)
{
	(void)module;
	unsigned long long nodeid;
	int backing_id;
	if (!PyArg_ParseTuple(args, "Ki", &nodeid, &backing_id))
		return NULL;
	if (!opens_join(nodeid, &backing_id))
		return PyErr_NoMemory();
	return PyLong_FromLong(backing_id);
}

static PyObject *module_opens_leave(PyObject *module, PyObject *arg)
{
	(void)module;
	unsigned long long nodeid;
	if (!number_of(arg, &nodeid))
		return NULL;
	opens_leave(nodeid);
	Py_RETURN_NONE;
}

static PyObject *module_opens_set_bare(PyObject *module, PyObject *args)
{
	(void)module;
	unsigned long long nodeid;
	int bare;
	if (!PyArg_ParseTuple(args, "Kp", &nodeid, &bare))
		return NULL;
	opens_set_bare(nodeid, bare);
	Py_RETURN_NONE;
}

static PyObject *module_requests_wait(PyObject *module, PyObject *arg)
{
	(void)module;
	int fd;
	if (!int_of(arg, &fd))
		return NULL;
	return PyBool_FromLong(hot_requests_wait(fd));
}

/* The end of a file handle that C has made, where C leaves its RELEASE to Python. */
static PyObject *module_release(PyObject *module, PyObject *args)
{
	(void)module;
	unsigned long long nodeid, fh;
	if (!PyArg_ParseTuple(args, "KK", &nodeid, &fh))
		return NULL;
	hot_release(nodeid, fh);
	Py_RETURN_NONE;
}

/* ------------------------------------------------------------------ closer */

static PyObject *module_closer_start(PyObject *module, PyObject *arg)
{
	(void)module;
	int most;
	if (!int_of(arg, &most))
		return NULL;
	errno = EAGAIN;
	return none_or_errno(closer_start((size_t)most) ? 0 : -1);
}

static PyObject *module_close_later(PyObject *module, PyObject *arg)
{
	(void)module;
	int fd;
	if (!int_of(arg, &fd))
		return NULL;
	if (!closer_takes(fd)) {
		Py_BEGIN_ALLOW_THREADS close(fd);
		Py_END_ALLOW_THREADS
	}
	Py_RETURN_NONE;
}

static PyObject *module_closer_waiting(PyObject *module, PyObject *ignored)
{
	(void)module, (void)ignored;
	return PyLong_FromSize_t(closer_waiting());
}

static PyObject *module_closer_wait(PyObject *module, PyObject *arg)
{
	(void)module;
	double seconds = PyFloat_AsDouble(arg);
	if (seconds == -1.0 && PyErr_Occurred())
		return NULL;
	bool done;
	Py_BEGIN_ALLOW_THREADS done = closer_wait(timespec_of(seconds));
	Py_END_ALLOW_THREADS return PyBool_FromLong(done);
}

static PyMethodDef hot_methods[] = {
	{"closer_start", module_closer_start, METH_O, "Start the thread that closes, for so many descriptors at a time."},
	{"close_later", module_close_later, METH_O, "Have a descriptor closed without waiting for it."},
	{"closer_waiting", module_closer_waiting, METH_NOARGS, "How many descriptors are still to be closed."},
	{"closer_wait", module_closer_wait, METH_O, "Wait so many seconds until none is; whether none is."},
	{"backing_enable", module_backing_enable, METH_O, "Take backing ids from this /dev/fuse descriptor; -1: none."},
	{"backing_register", module_backing_register, METH_O, "A backing id for the file of a descriptor."},
	{"backing_close", module_backing_close, METH_O, "Give a backing id back."},
	{"opens_agreed", module_opens_agreed, METH_O, "The backing id of a node's open handles; None: it has none."},
	{"opens_join", module_opens_join, METH_VARARGS, "One more handle, with a backing id or 0; what all agree on."},
	{"opens_leave", module_opens_leave, METH_O, "One handle less."},
	{"opens_set_bare", module_opens_set_bare, METH_VARARGS, "Whether an open draft is known to have no capability."},
	{"hot_configure", hot_configure, METH_VARARGS, "Set what answers depend on, before anything else."},
	{"hot_prepare", module_prepare, METH_NOARGS, "Have pyfuse3 wait for the queue, before pyfuse3.init."},
	{"hot_start", module_start, METH_O, "Read requests from the kernel's descriptor, after INIT."},
	{"hot_stop", module_stop, METH_NOARGS, "End the threads, before pyfuse3.close."},
	{"hot_counters", module_counters, METH_NOARGS, "Requests answered and passed on by opcode, threads, nodes."},
	{"hot_requests_wait", module_requests_wait, METH_O, "Whether the kernel has queued what Python did not get yet."},
	{"hot_mark_name", module_mark_name, METH_VARARGS, "Add to the marks of a name and of its directory."},
	{"hot_mark_thread", module_mark_thread, METH_VARARGS, "Add to the marks of a thread."},
	{"flushes_of", module_flushes_of, METH_VARARGS, "How many FLUSHes a thread has sent, and those that share its slot."},
	{"hear_closes", module_hear_closes, METH_VARARGS, "Who opens a file of this name to read sends FLUSH from now on."},
	{"hear_all_closes", module_hear_all_closes, METH_NOARGS, "Who opens any file to read sends FLUSH from now on."},
	{"hears_closes", module_hears_closes, METH_VARARGS, "Whether who opens a file of this name to read sends FLUSH."},
	{"hot_mark_handle", module_mark_handle, METH_VARARGS, "Add to the marks of a file handle that C has made."},
	{"hot_mark_owner", module_mark_owner, METH_VARARGS, "Add to the marks of an owner of record locks."},
	{"note_walk", module_note_walk, METH_VARARGS, "A thread has found a file with several names by this one."},
	{"last_walk", module_last_walk, METH_VARARGS, "Where it found the file last; None: that is not known."},
	{"move_walks", module_move_walks, METH_VARARGS, "A name of a file has become another."},
	{"hot_lend_lock", module_lend_lock, METH_VARARGS, "Let C lock and unlock an open file, until a moment."},
	{"hot_take_lock_back", module_take_lock_back, METH_O, "What an open file holds that was lent; None: it was not."},
	{"hot_release", module_release, METH_VARARGS, "End a file handle that C has made, with its node."},
	{"hot_new_nodeid", module_new_nodeid, METH_NOARGS, "A nodeid that nobody has had."},
	{"hot_register", module_register, METH_VARARGS, "Claim an inode for a node (0: a new one); 0 when it has one."},
	{"hot_offer", module_offer, METH_VARARGS, "Let C answer for a node; whether it will."},
	{"hot_withdraw", module_withdraw, METH_O, "Take the descriptor of a node back."},
	{"hot_give_back", module_give_back, METH_VARARGS, "The kernel gave references of C back."},
	{"hot_unregister", module_unregister, METH_VARARGS, "Take a node out, unless C has given references to it."},
	{"hot_adopt", module_adopt, METH_O, "Take over a node that C has made."},
	{"hot_adopt_inode", module_adopt_inode, METH_VARARGS, "Take over the node that C has made of an inode."},
	{"hot_stamp", module_stamp, METH_VARARGS, "Whether an open sees what the one before saw; None: ask the node."},
	{NULL}};

int hot_add_to(void *module)
{
	return PyModule_AddFunctions(module, hot_methods) < 0 ||
			       PyModule_AddObject(module, "FH_HOT", PyLong_FromUnsignedLongLong(FH_HOT)) < 0
		       ? -1
		       : 0;
}
