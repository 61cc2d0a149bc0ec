"""One mount from start to end: wiring, signals, status, and an orderly shutdown.

Order of the end: no new writers; publishes on their way are finished (at most `drain` seconds); what is still being
written goes to quarantine; the mount is taken away; the record of this daemon is removed; its locks are free, at once
if nothing is on its way to the backing any more.
"""

from __future__ import annotations

import atexit
import errno
import logging
import os
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, TypeVar

import trio

from safefs import __version__, backing
from safefs.agreement import require_one_state, require_same_etcd, require_same_settings, watch_seconds
from safefs.backing import Backing
from safefs.closing import Closing
from safefs.cluster.backend import BackendError, ProcessIdentity
from safefs.cluster.choice import lock_backend, shared_settings
from safefs.cluster.keeper import Keeper
from safefs.cluster.names import Names
from safefs.config import ETCD_SCHEME, Settings
from safefs.control import control_socket, find_mount, sd_notify, serve_control
from safefs.custody import name_of, warn_of_renames
from safefs.errors import SafefsError
from safefs.events import EventKind, EventLog
from safefs.family import REFUSED, Mounted, Reach, mounted_at
from safefs.files import Files
from safefs.filesystem import DIRECTORY_ATTR_SECONDS, FileSystem
from safefs.fuse import mount
from safefs.fuse.operations import Operations
from safefs.hot import Cold, Hot, doubtful_globs, locks_answered
from safefs.identity import DAEMON, SERVICE, Identities
from safefs.inplace import InPlace
from safefs.lease import Terms
from safefs.locking import Locking
from safefs.locks import Alone, Locks
from safefs.native import native
from safefs.probe import why_lease_files
from safefs.publisher import Publisher
from safefs.recovery import Recovery
from safefs.rules import Stale
from safefs.softlocks import SoftLocks, all_noted, remove_noted
from safefs.state import LOCK_FILES, DaemonRecord, StateDirectory, host_identity, known_dead
from safefs.tree import Tree
from safefs.verdict import probe_command, why_native

import pyfuse3  # isort: skip  (after the C extension: safefs/native.py)

log = logging.getLogger(__name__)

CAP_SYS_RESOURCE = 24
MNT_DETACH = 2
MIN_TASKS = 32
MAX_TASKS = 100_000
CLOSING_DESCRIPTORS = 16  # of this many parts of the limit one can wait to be closed
MOST_CLOSING = 65_536
CLOSING_SECONDS = 1.0  # for those that wait at the end; the process closes what is left
# Of this many parts of the limit one goes to the nodes of Python, as much to those of the C extension, the rest to open
# files and, of the other number of parts, one to the daemon's own work.
DESCRIPTORS_FOR_NODES = 4
DESCRIPTORS_FOR_WORK = 8
SMALLEST_NODE_CACHE = 32
LARGEST_NODE_CACHE = 262_144
WANTED_DESCRIPTORS = 1_048_576
EVENTS_SECONDS = 0.5  # between writes of the events that happened
HOUSEKEEPING_SECONDS = 3600.0
EVENTS_KEPT_SECONDS = 90 * 86400.0  # after the last of a daemon that is gone
SWEEP_SECONDS = 60.0
CONNECTION_SECONDS = 0.5  # between looks whether it is over
JOIN_SECONDS = 4.0  # for the first lease, and as long again as it takes to see which daemons live
SURVEY_SECONDS = 20.0  # to ask for the locks of all nodes

T = TypeVar("T")
RETAIN_SECONDS = 3600.0  # longer than it takes to load a model
BREAKS_DESCRIPTORS = frozenset({"fuse.glusterfs", "fuse.juicefs"})  # of a file that loses its last name
EXCLUDING = (Reach.NODE, Reach.CLUSTER)  # fcntl locks that keep out whoever else publishes under a name
NETWORK_NAME_CACHES = frozenset({"nfs", "nfs4"})


def raise_descriptor_limit() -> int:
    """Raise RLIMIT_NOFILE as far as it goes; returns what it is then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < WANTED_DESCRIPTORS:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (WANTED_DESCRIPTORS, WANTED_DESCRIPTORS))
            return WANTED_DESCRIPTORS
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        return hard
    return soft


def node_cache_size(settings: Settings, limit: int) -> int:
    """How many descriptors nodes may keep; the rest of the limit is for open files."""
    if settings.max_descriptors is not None:
        return settings.max_descriptors
    return max(SMALLEST_NODE_CACHE, min(LARGEST_NODE_CACHE, limit // DESCRIPTORS_FOR_NODES))


def temp_kind(wanted: str, mounted: Mounted) -> str:
    """Which inodes drafts are.

    Shared filesystems that have O_TMPFILE at all are not relied on: JuiceFS 1.4 removes what was linked from such an
    inode as soon as its descriptor is closed, and says nothing.
    """
    return "hidden" if wanted == "auto" and not mounted.is_local else wanted


def existing(path: Path) -> Path:
    """The path, or the first of those above it that is there."""
    return path if path.exists() or path == path.parent else existing(path.parent)


def has_posix_acl(path: Path) -> bool:
    """Whether the backing answers for POSIX ACLs (ENODATA is an answer)."""
    try:
        os.getxattr(path, "system.posix_acl_access")
    except OSError as error:
        return error.errno == errno.ENODATA
    return True


async def _in_thread(function: Callable[..., T], *arguments: object) -> T:
    """Of what the end consists of, which comes also where no thread can be started."""
    try:
        return await trio.to_thread.run_sync(function, *arguments, abandon_on_cancel=True)
    except RuntimeError:
        return function(*arguments)


class Daemon:
    """One mount."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.started = time.time()
        self.mounted = mounted_at(settings.backing)
        self.type = self.mounted.kind
        limit = raise_descriptor_limit()
        # A read-only mount's state is a scratch directory of its own.
        service = None if settings.read_only else settings.service
        self.identities = Identities(impersonate=settings.privileged, service=service)
        self.backing = Backing(
            settings.backing,
            self.identities,
            max_threads=settings.max_threads,
            temp=temp_kind(settings.temp, self.mounted),
            ceiling=limit - limit // DESCRIPTORS_FOR_WORK,
        )
        if self._as_service(mounted_at, existing(settings.state)).kind in REFUSED:
            self._why_locks(existing(settings.state))  # before anything else is found wanting there
        with self.identities.acting(SERVICE):
            self.state = StateDirectory(self._scratch() if settings.read_only else settings.state, self.identities)
            self.locks_because = self._why_locks(self.state.path)
            cluster = self._agree()
            if settings.privileged:
                warn_of_renames(self.state.path)
        self.names, self.keeper = self._lock_backend(cluster)
        self.events = EventLog(self.state.events, self.backing.node_id)
        self.publisher = Publisher(
            self.backing, self.state, self.record, self.events, settings.verify, self._retain_seconds()
        )
        cache_size = node_cache_size(settings, limit)
        hot = self._configure_hot(cache_size) if settings.hot else Cold()
        self.locks = Locks(self.names or Alone(self.backing.node_id), hot)
        self.soft_locks = SoftLocks(self.backing, self.record, self.events)
        self.fs = FileSystem(settings, self.backing, self.publisher, self.locks, self.soft_locks, cache_size, hot)
        self.locks.fence = self.fs.fence
        self.locking = Locking(self.fs)
        if self.names is not None:
            self.locks.serve(self.names)
            self.fs.can_lose_locks = True
            self.fs.is_shared = not self.mounted.is_local
            self.fs.numbers_are_shared = self.mounted.shares_numbers
            if self._as_service(mounted_at, self.state.path).reach()[0] not in EXCLUDING:
                self.publisher.lock_name = self.fs.publishing
        if self._hears_readers():
            native.hear_all_closes()
        self.connection: mount.Connection | None = None
        self.stopping = self.terminated = False
        self.serving = False
        self.has_served = False

    def _retain_seconds(self) -> float:
        """By default versions are retained where readers on other nodes would lose theirs without it."""
        if self.settings.retain_seconds is not None:
            return self.settings.retain_seconds
        return RETAIN_SECONDS if self.type in BREAKS_DESCRIPTORS else 0.0

    def _why_locks(self, state: Path) -> str:
        """Why locks are kept where they are, in words; SafefsError where they cannot be kept there."""
        settings = self.settings
        if settings.read_only:
            if not self.mounted.is_local:
                log.warning("this mount is read-only: other nodes do not see locks that are taken through it")
            return "a read-only mount puts nothing on record, and other nodes do not see its locks"
        if settings.locks == "memory":
            return "as -o locks says: no other node uses this directory"
        if settings.locks.startswith(ETCD_SCHEME):
            return "as -o locks says"
        if settings.locks == "native":
            return why_native(state, mounted_at(state), probe_command(settings.backing, state))
        return why_lease_files(state, mounted_at(state), self.mounted)

    def _agree(self) -> str:
        """Join the nodes of the backing directory on record; what they call themselves together.

        SafefsError where they keep their locks otherwise: the two would not exclude each other.
        """
        settings = self.settings
        cluster = "" if settings.read_only else require_one_state(self.state, settings.backing)
        self.sharing = shared_settings(settings, cluster)
        self.record = DaemonRecord(self.state, self.backing.node_id, self.sharing)
        try:
            require_same_settings(self.record, self.sharing, self._known_dead)
        except BaseException:
            self._withdraw()
            raise
        return cluster

    def _known_dead(self, identity: ProcessIdentity) -> bool | None:
        return self.identities.call(DAEMON, known_dead, identity)

    def _lock_backend(self, cluster: str) -> tuple[Names | None, Keeper | None]:
        """What is shared with other nodes."""
        settings, state = self.settings, self.state
        try:
            backend = lock_backend(
                settings,
                state.path / LOCK_FILES,
                cluster,
                host_identity(),
                lambda identity: self._known_dead(identity) is True,
                locks_answered,
                self._as_service,
                self._admit,
            )
        except SafefsError:
            self._withdraw()
            raise
        if backend is None:
            return None, None
        names, terms = Names(backend), Terms(settings.lease_seconds)
        keeper = Keeper(backend, terms, self._on_joined, self._on_lost, names.problems)
        keeper.before_rejoin = self._agree_again
        keeper.has_ended = self._is_quiet
        return names, keeper

    async def _is_quiet(self) -> bool:
        """Whether all calls to the backing have come back, which is waited for a moment; nobody makes new ones."""
        with trio.move_on_after(CLOSING_SECONDS):
            await self.backing.workers.quiet()
        return not self.backing.workers.busy

    async def _agree_again(self) -> None:
        """Who was frozen for long counted as dead, and another may have been mounted with other settings meanwhile."""
        try:
            await self.backing.run(SERVICE, self.record.beat)  # there may be no record of it any more
            await self.backing.run(SERVICE, require_same_settings, self.record, self.sharing, self._known_dead)
        except SafefsError as error:
            raise BackendError(error.message, answered=True) from None
        except OSError as error:
            raise BackendError(f"how others share their locks cannot be seen: {error}", answered=True) from None

    async def _admit(self, etcd: str) -> None:
        """Before this node joins an etcd, and with no id where it has left one (cluster.backend.Admit)."""
        try:
            if etcd:
                lease_seconds = self.settings.lease_seconds
                await self.backing.run(SERVICE, require_same_etcd, self.record, etcd, self._known_dead, lease_seconds)
            else:
                await self.backing.run(SERVICE, self.record.note_etcd, etcd)
        except SafefsError as error:
            raise BackendError(error.message, answered=True, is_final=True) from None
        except OSError as error:
            raise BackendError(f"which etcd it is cannot be put on record: {error}", answered=True) from None

    def _as_service(self, function: Callable[..., T], /, *arguments: Any) -> T:
        return self.identities.call(SERVICE, function, *arguments)

    def _on_joined(self) -> None:
        assert self.names is not None
        self.locks.ask_again()
        self.soft_locks.joined(self.names.node)

    def _on_lost(self, reason: str) -> None:
        assert self.names is not None
        self.names.lose()
        fenced = self.locks.lose()
        self.fs.fence(fenced)
        self.fs.fence_claims()
        self.events.note(EventKind.LEASE_LOST, "", reason=reason, files=len(fenced))

    def _configure_hot(self, cache_size: int) -> Hot:
        """Tell the C extension what its answers depend on."""
        settings = self.settings
        native.hot_configure(
            settings.entry_timeout_seconds,
            settings.attr_timeout_seconds,
            max(settings.attr_timeout_seconds, DIRECTORY_ATTR_SECONDS),
            settings.privileged,
            not self._refreshes_misses(),
            cache_size,
            self.backing.ceiling,
            backing.HIDDEN_PREFIX,
            backing.STATE_NAME,
            doubtful_globs(settings.rules),
        )
        native.hot_prepare()
        return Hot()

    def _scratch(self) -> Path:
        """A read-only mount leaves the backing as it is; there is nothing to keep either."""
        directory = Path(tempfile.mkdtemp(prefix="safefs-"))
        atexit.register(shutil.rmtree, directory, ignore_errors=True)
        return directory

    async def run(self, ready: Callable[[], None]) -> None:
        """Mount, serve, and return once the mount is gone and everything is settled."""
        try:
            await self._run(ready)
        finally:
            if not self.has_served:
                self._withdraw()

    def _withdraw(self) -> None:
        """A start that failed leaves nothing that others would have to settle."""
        with suppress(OSError):
            self._as_service(self.record.remove)

    async def _run(self, ready: Callable[[], None]) -> None:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        native.closer_start(max(1, min(MOST_CLOSING, limit // CLOSING_DESCRIPTORS)))
        recovery = Recovery(self.backing, self.state, self.record, self.events)
        async with trio.open_nursery() as helpers:
            helpers.start_soon(recovery.beat)  # first: others that start may have to see that this daemon lives
            if self.names is not None and self.keeper is not None:
                await self._join(helpers, self.names, self.keeper)
            helpers.start_soon(recovery.run)
            helpers.start_soon(self.soft_locks.run)
            if self.names is not None:
                helpers.start_soon(recovery.watch_leases, self.names.gone)
            helpers.start_soon(self.fs.sweep_tickets)
            helpers.start_soon(self.fs.sweep_gathered)
            helpers.start_soon(self._write_events)
            helpers.start_soon(self._keep_house)
            helpers.start_soon(self._sweep_retained)
            with ExitStack() as session:
                async with trio.open_nursery() as requests:
                    await self._run_mount(helpers, requests, session, ready)

    async def _run_mount(
        self, helpers: trio.Nursery, requests: trio.Nursery, session: ExitStack, ready: Callable[[], None]
    ) -> None:
        """What is done to `session` at the end waits until no request is left, which could be answered yet."""
        locking = self.locking
        files, closing = Files(self.fs), Closing(self.fs, requests, locking.released)
        tree = Tree(self.fs, files, refresh_misses=self._refreshes_misses())
        await helpers.start(serve_control, control_socket(self.settings.mountpoint), self._answer)
        self._mount(Operations(self.fs, tree, files, InPlace(self.fs), closing, locking, requests))
        try:  # whatever fails from now on: there is a mount to be taken away
            await helpers.start(self._await_signals, closing)
            ready()
            sd_notify("READY=1")
            log.info("mounted %s on %s", self.settings.backing, self.settings.mountpoint)
            self.serving = self.has_served = True
            await self._serve(closing)
        finally:
            self.serving = False
            try:
                with trio.CancelScope(shield=True):
                    await self._end(closing, session)
            finally:
                # At once: a publish that is given up lets go of its locks, and others must not hear of it.
                closing.give_up()
                helpers.cancel_scope.cancel()

    async def _serve(self, closing: Closing) -> None:
        """Answer requests until the connection is over."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._give_up_requests, closing, nursery.cancel_scope)
            try:
                await pyfuse3.main(MIN_TASKS, MAX_TASKS)
            except BaseException:  # requests were given up: what their calls may yet make has to be found
                self.fs.publisher.has_left = True
                raise
            nursery.cancel_scope.cancel()

    async def _give_up_requests(self, closing: Closing, serving: trio.CancelScope) -> None:
        """Some hang in the backing when the connection is over: nobody waits for their answers, nor do we.

        Those that publish (a FLUSH, a rename) have the time that publishes have at the end, also who begins only now,
        because he has waited for another's.
        """
        assert self.connection is not None
        while True:
            await trio.sleep(CONNECTION_SECONDS)
            if self.terminated or self.connection.is_over:
                break
        await closing.finish_publishes(self.settings.drain_seconds, CLOSING_SECONDS)
        serving.cancel()

    async def _join(self, helpers: trio.Nursery, names: Names, keeper: Keeper) -> None:
        seconds = JOIN_SECONDS + watch_seconds(self.settings.lease_seconds)
        try:
            with trio.fail_after(seconds):
                await helpers.start(keeper.run)
        except BackendError as error:
            raise SafefsError(f"no lease: {error}", errno.EACCES) from None
        except trio.TooSlowError:
            problem = keeper.problem or BackendError("the lock backend does not answer")
            # Locks that others share are not done without because something in the options is wrong.
            hint = "; where no other node uses this directory, -o locks=memory does without"
            raise SafefsError(
                f"no lease within {seconds:g} s: {problem}{'' if problem.answered else hint}", errno.ETIMEDOUT
            ) from None
        helpers.start_soon(names.run)

    async def _write_events(self) -> None:
        while True:
            await trio.sleep(EVENTS_SECONDS)
            with suppress(OSError):  # there was no thread: they wait on
                await self.backing.run(SERVICE, self.events.write)

    async def _keep_house(self) -> None:
        """Now and then: what was kept for long enough goes."""
        settings = self.settings
        while not settings.read_only:
            try:
                purged = await self.backing.run(
                    SERVICE, self.state.prune, settings.quarantine_age_seconds, settings.quarantine_bytes
                )
                for kept in purged:
                    self.events.note(EventKind.PURGED, kept.path, write_id=kept.write_id, size=kept.size_bytes)
                await self.backing.run(SERVICE, self.state.prune_events, EVENTS_KEPT_SECONDS)
            except Exception as error:  # noqa: BLE001 - a boundary: nothing that others left there may end the mount
                log.warning("the state directory could not be tidied up: %r", error)
            await trio.sleep(HOUSEKEEPING_SECONDS)

    async def _sweep_retained(self) -> None:
        while True:
            await trio.sleep(SWEEP_SECONDS)
            try:
                await self.backing.run(SERVICE, self.state.retained.sweep)
            except Exception as error:  # noqa: BLE001 - the same boundary
                log.warning("versions whose time is over could not be removed: %r", error)

    def _refreshes_misses(self) -> bool:
        choice = self.settings.negative_refresh
        return choice == "on" or (choice == "auto" and self.type in NETWORK_NAME_CACHES)

    def _hears_readers(self) -> bool:
        """Whether each close of what is only read is heard of: little beside an open on a server (0005-locks.md)."""
        choice = self.settings.flush_readers
        return choice == "on" or (choice == "auto" and not self.mounted.is_local)

    def _mount(self, operations: Operations) -> None:
        settings = self.settings
        fd = mount.mount_as_root(settings) if settings.privileged else mount.mount_as_user(settings)
        try:
            acl = settings.default_permissions and has_posix_acl(settings.backing)
            features = mount.Features(posix_acl=acl, passthrough=self._wants_passthrough())
            self.connection = mount.connect(operations, fd, features)
            self._enable_passthrough(self.connection)
            if settings.hot:
                native.hot_start(self.connection.fd)
            mounted = find_mount(settings.mountpoint)
            if mounted is None:
                raise SafefsError(f"{settings.mountpoint} was unmounted while it was being mounted")
            self.fs.forget_attributes = mount.forget_attributes
            self.fs.device = f"{os.major(mounted.device)}:{os.minor(mounted.device)}"
            mount.widen_readahead(self.fs.device)
        except BaseException:
            mount.umount(settings.mountpoint, settings.privileged, MNT_DETACH)
            raise

    def _wants_passthrough(self) -> bool:
        return self.settings.passthrough != "off" and self.settings.privileged

    def _enable_passthrough(self, connection: mount.Connection) -> None:
        passthrough = self.fs.passthrough
        if self.settings.passthrough == "off":
            passthrough.reason = "switched off (-o passthrough=off)"
        elif not self.settings.privileged:
            passthrough.reason = "only root's daemon may pass files through"
        elif not connection.passthrough:
            passthrough.reason = "the kernel has no FUSE passthrough (it came with Linux 6.9)"
        else:
            passthrough.enable(connection.fd)
            self._as_service(self._probe_passthrough)
        if self.settings.passthrough == "on" and not passthrough.active:
            raise SafefsError(f"passthrough=on cannot be had: {passthrough.reason}", errno.EOPNOTSUPP)

    def _probe_passthrough(self) -> None:
        if os.stat(self.record.identity).st_dev == os.stat(self.settings.backing).st_dev:
            self.fs.passthrough.probe(self.record.identity)

    # -------------------------------------------------------------- the end

    async def _await_signals(
        self, closing: Closing, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
            task_status.started()
            async for number in signals:
                is_ending = self.stopping or (self.has_served and not self.serving)
                if number == signal.SIGHUP or is_ending:
                    continue
                log.info("%s: unmounting", signal.Signals(number).name)
                self.stopping = True
                sd_notify("STOPPING=1")
                await closing.drain(self.settings.drain_seconds, all_closed=False)
                await self._umount()
                if self.serving:  # open files keep the connection up after the mount is gone
                    pyfuse3.terminate()
                    self.terminated = True

    async def _umount(self) -> None:
        await _in_thread(mount.umount, self.settings.mountpoint, self.settings.privileged, MNT_DETACH)

    async def _end(self, closing: Closing, session: ExitStack) -> None:
        """The main loop has ended: by umount, by a signal, or because the connection was aborted."""
        unmounted = await _in_thread(find_mount, self.settings.mountpoint) is None
        await closing.drain(self.settings.drain_seconds, all_closed=unmounted and not self.stopping)
        if not unmounted:
            await self._umount()
        if self.settings.hot:
            await _in_thread(native.hot_stop)
        await _in_thread(native.closer_wait, CLOSING_SECONDS)
        if self.names is not None:
            await self.names.give_back()
        session.callback(pyfuse3.close, unmount=False)
        with trio.move_on_after(CLOSING_SECONDS), suppress(OSError):
            await self.backing.run(SERVICE, self.events.write)
        if await self._leaves_nothing(closing):
            with trio.move_on_after(CLOSING_SECONDS), suppress(OSError):
                await self.backing.run(SERVICE, self.record.remove)
        else:
            log.error("what could not be settled is for the next daemon on this directory")  # the journal says where
        log.info("unmounted %s", self.settings.mountpoint)

    async def _leaves_nothing(self, closing: Closing) -> bool:
        """Whether there is no hidden file, and none on its way: a call that hangs may make one yet."""
        with trio.move_on_after(2 * CLOSING_SECONDS):
            return await self._is_quiet() and await closing.drop_temps() and not self.fs.publisher.has_left
        return False

    # --------------------------------------------------------------- status

    async def _answer(self, question: dict[str, Any]) -> dict[str, Any]:
        operation = question.get("op")
        if operation == "rules":
            return dict(self.settings.rules.explain(os.fsencode(str(question.get("path")))))
        if operation == "locks":
            soft = await self.backing.run(SERVICE, all_noted, self.state)
            return {"locks": await self._bounded(self.locking.report()) + soft, "problem": self._lock_problem()}
        if operation == "break":
            return {"broken": await self._break(str(question.get("path")))}
        if operation != "status":
            raise SafefsError(f"unknown request {operation!r}", errno.EINVAL)
        return await self._status()

    async def _bounded(self, work: Awaitable[T]) -> T:
        """What the lock backend has to do with; SafefsError when that cannot be reached."""
        try:
            with trio.fail_after(SURVEY_SECONDS):
                return await work
        except (BackendError, trio.TooSlowError) as error:
            hint = "a node that hangs keeps its locks until its lease is over"
            reason = str(error) or f"no answer in {SURVEY_SECONDS:.0f} s: {hint}"
            raise SafefsError(f"the lock backend: {reason}", errno.ETIMEDOUT) from None

    async def _break(self, path: str) -> int:
        """Locks and soft locks: what keeps the ones from being broken does not keep the others."""
        broken, failures = 0, list[SafefsError]()
        try:
            for break_some in (self._break_locks, self._break_soft):
                try:
                    broken += await break_some(path)
                except OSError as error:  # no such directory, as a rule
                    text = f"{path}: {error.strerror}; `safefs locks` shows what is locked"
                    failures.append(SafefsError(text, error.errno or errno.EIO))
                except SafefsError as error:
                    failures.append(error)
        finally:
            if broken:
                self.events.note(EventKind.LOCK_BROKEN, path, locks=broken)
        if failures:
            done = f"{broken} broken, but not all: " if broken else ""
            raise SafefsError(done + "; ".join(error.message for error in failures), failures[0].errno)
        return broken

    async def _break_locks(self, path: str) -> int:
        return await self._bounded(self.locking.break_locks(os.fsencode(path)))

    async def _break_soft(self, path: str) -> int:
        return await self.backing.run(SERVICE, self._remove_soft, path)

    def _remove_soft(self, path: str) -> int:
        entries = [entry for entry in all_noted(self.state) if entry["path"] == path]
        return sum(remove_noted(self.backing, {**entry, "stale": str(Stale.DEAD)}) for entry in entries)

    def _locks_text(self) -> str:
        if self.names is None:
            return "memory: shared with no other node"
        etcd = self.settings.locks.startswith(ETCD_SCHEME)
        kind = "native" if self.settings.locks == "native" else "leasefile"
        place = self.settings.locks if etcd else f"{kind}: {self.state.path / LOCK_FILES}"
        return f"{place}, as node {self.names.node}"

    def _lock_problem(self) -> dict[str, Any] | None:
        return self.names.problems.report() if self.names is not None else None

    async def _status(self) -> dict[str, Any]:
        fs = self.fs
        hot = native.hot_counters() if self.settings.hot else None
        held, waiting = self.locks.counts()
        reach, by = self.mounted.reach()
        return {
            "version": __version__,
            "pid": os.getpid(),
            "backing": os.fspath(self.settings.backing),
            "mountpoint": os.fspath(self.settings.mountpoint),
            "filesystem": self.type,
            "node": self.backing.node_id,
            "uptime_seconds": round(time.time() - self.started, 1),
            "state": os.fspath(self.settings.state),
            "service_user": name_of(self.identities.service_uid),
            "draining": not fs.accepting,
            "temp": "tmpfile" if self.backing.uses_tmpfile else "hidden",
            "data_path": "kernel passthrough" if fs.passthrough.active else f"daemon: {fs.passthrough.reason}",
            "inodes": len(fs.nodes) + (hot["born"] if hot else 0),
            "descriptors": fs.nodes.open_descriptors,
            "closing": native.closer_waiting(),
            "descriptor_limit": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            "open_files": len(fs.handles),
            "drafts": len(fs.drafts),
            "publishing": len(fs.ordering),
            "locks": {
                "wanted": self.settings.locks,
                "backend": self._locks_text(),
                "because": self.locks_because,
                "backing": f"its fcntl locks keep out {reach.value} ({by})",
                "held": held,
                "waiting": waiting,
            },
            "lock_problem": self._lock_problem(),
            "hot": hot,
            "busy_threads": self.backing.workers.busy,
            "counters": dict(self.publisher.counts),
            "quarantine": await self.backing.run(SERVICE, self.state.count),
        }


def run(settings: Settings, ready: Callable[[], None]) -> None:
    """Serve one mount until it is unmounted; `ready` is called once clients can use it.  Raises SafefsError."""
    os.umask(0)
    signal.signal(signal.SIGIO, signal.SIG_IGN)  # sent when a lease of ours is broken (backing.is_mapped)
    daemon = Daemon(settings)
    if settings.privileged:
        # With it the daemon's writes would pass over the quotas of those it writes for.
        native.drop_capability(CAP_SYS_RESOURCE)
    try:
        trio.run(daemon.run, ready)
    except BaseExceptionGroup as group:
        error = _first(group)
        if isinstance(error, SafefsError):
            raise error from None
        if isinstance(error, OSError):
            where = error.filename or settings.backing
            raise SafefsError(f"{where}: {error.strerror}", error.errno or errno.EIO) from group
        raise


def _first(error: BaseException) -> BaseException:
    """What went wrong first, inside the groups that nurseries make."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
