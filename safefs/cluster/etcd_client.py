"""The little of etcd's API that locks need, through its HTTP/JSON gateway (etcd 3.4 and later), with h11 on trio.

Keys and values are bytes here, and base64 on the wire; numbers of 64 bits are strings there.  A call goes to the
endpoint that answered last; where that cannot be reached, to the next, as long as there is time, and so does the next
call after one that got no answer.  A call that changes something and of which it is not known whether it did is not
repeated: `BackendError` leaves that to the caller.
"""

from __future__ import annotations

import base64
import json
import ssl
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

import h11
import trio

from safefs.cluster.backend import BackendError

PORT = 2379
CALL_SECONDS = 5.0
CONNECT_SECONDS = 2.0
ATTEMPTS = 3  # at each endpoint: a connection that was kept, and the token, can both be too old
MAX_IDLE = 8  # connections that are kept
MOST_WATCHES = 200  # each has one of its own; whoever wants to watch more looks now and then
MAX_ANSWER_BYTES = 16 << 20
READ_BYTES = 1 << 16
# What etcd says where a token is too old for it, or missing.
SIGNED_OUT = ("invalid auth token", "auth store is old", "user name is empty")

# What etcd says to who may not come in -> what to do about it.
NOT_LET_IN = {
    "authentication failed": "look at -o etcd_user and etcd_password_file",
    "authentication is not enabled": "leave out -o etcd_user and etcd_password_file",
    "user name is empty": "it wants -o etcd_user and etcd_password_file",
    "permission denied": "it must let this user (-o etcd_user) read and write all keys below -o etcd_prefix",
}

# What a connection that is lost, or talks nonsense, comes out as.
LOST = (OSError, trio.BrokenResourceError, trio.ClosedResourceError, h11.ProtocolError, ValueError)

Answer = dict[str, Any]
T = TypeVar("T")


def encode(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def decode(text: str) -> bytes:
    return base64.b64decode(text)


def prefix_end(prefix: bytes) -> bytes:
    """The `range_end` of all keys that begin with a prefix, which does not end in 0xff."""
    return prefix[:-1] + bytes([prefix[-1] + 1])


def reason(error: Exception, otherwise: str) -> str:
    """What an error says; trio's own say it in their causes."""
    return str(error) or str(error.__cause__ or "") or otherwise


@dataclass(frozen=True)
class Endpoint:
    """One member: http or https, host, port."""

    host: str
    port: int
    tls: bool

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """ValueError for what is no URL of a member."""
        with suppress(ValueError):
            parts = urlsplit(text if "//" in text else f"//{text}", scheme="http")
            port = PORT if parts.port is None else parts.port
            has_more = parts.path.strip("/") or parts.query or parts.fragment or "@" in parts.netloc
            if parts.scheme in ("http", "https") and parts.hostname and port and not has_more:
                return cls(parts.hostname, port, parts.scheme == "https")
        raise ValueError(f"{text!r} is no endpoint of etcd (write HOST:PORT or https://HOST:PORT, PORT up to 65535)")

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class Access:
    """How a cluster is reached."""

    endpoints: tuple[Endpoint, ...]
    tls: ssl.SSLContext | None = None
    user: str = ""
    password: str = field(default="", repr=False)


class UnreachableError(BackendError):
    """Nothing was sent: another endpoint may be asked."""


class RefusedError(BackendError):
    """etcd answered with an error."""

    def __init__(self, endpoint: Endpoint, status: int, message: str) -> None:
        remedy = next((f": {remedy}" for words, remedy in NOT_LET_IN.items() if words in message), "")
        super().__init__(f"etcd at {endpoint}: {message} (HTTP {status}){remedy}", answered=True, is_final=bool(remedy))
        self.status = status
        self.may_be_repeated = any(words in message for words in SIGNED_OUT)  # nothing was done: sign in first
        self.is_members_own = status >= 500  # this member has no leader, or no quorum; others may have


def lost(endpoint: Endpoint, error: Exception) -> BackendError:
    """What a connection that is lost, or talks nonsense, comes out as for whoever has asked."""
    text = reason(error, "the connection was lost")
    by_tls = isinstance(error.__cause__, ssl.SSLError)
    hint = " (does it take what -o etcd_cert names?)" if by_tls and "alert" in text else ""
    answered = by_tls or isinstance(error, (h11.ProtocolError, ValueError))
    return BackendError(f"etcd at {endpoint}: {text}{hint}", answered=answered)


def _parsed(status: int, body: bytes) -> Answer:
    """ValueError for what is none of etcd's answers: all that it grants say which cluster it is."""
    try:
        answer = json.loads(body)
        if status != 200 or (answer.get("header") or answer["result"]["header"])["cluster_id"]:
            return dict(answer)
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    raise ValueError(f"what is there answers HTTP {status}, and not as etcd does")


def _why(answer: Answer, otherwise: str) -> str:
    """What etcd says of a refusal; of what it would tell in a stream, one level down."""
    error = answer.get("error")
    return str(answer.get("message") or (error.get("message") if isinstance(error, dict) else error) or otherwise)


def _told(line: bytes) -> Answer:
    """One part of a stream.  ValueError for what etcd does not send."""
    answer = json.loads(line)
    if not isinstance(answer, dict) or not isinstance(answer.get("result", {}), dict):
        raise ValueError("what is there does not tell changes as etcd does")
    return answer


class _Connection:
    """One connection, for one request at a time."""

    def __init__(self, endpoint: Endpoint, stream: trio.abc.Stream) -> None:
        self.endpoint = endpoint
        self._has_answered = False
        self._stream = stream
        self._http = h11.Connection(h11.CLIENT)

    async def send(self, path: str, body: bytes, headers: Mapping[str, str]) -> int:
        """Send a POST; returns the status of the answer."""
        fields = {"Host": str(self.endpoint), "Content-Type": "application/json", "Content-Length": str(len(body))}
        request = h11.Request(method="POST", target=path, headers=list({**fields, **headers}.items()))
        data = b"".join(filter(None, map(self._http.send, (request, h11.Data(data=body), h11.EndOfMessage()))))
        await self._stream.send_all(data)
        try:
            while not isinstance(event := await self._next_event(), h11.Response):
                pass
        except h11.RemoteProtocolError as error:
            if self._has_answered:
                raise
            hint = "" if self.endpoint.tls else " (does it want https://HOST:PORT, or -o etcd_ca?)"
            raise h11.RemoteProtocolError(f"what is there does not answer HTTP{hint}") from error
        self._has_answered = True
        return event.status_code

    async def next_part(self) -> bytes | None:
        """The answer's body, as it comes; None at its end.  A wait for it can be cancelled, and nothing is lost."""
        while not isinstance(event := await self._next_event(), h11.EndOfMessage):
            if isinstance(event, h11.Data):
                return bytes(event.data)
        return None

    def start_next(self) -> bool:
        """Whether another request may follow."""
        if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
            return False
        self._http.start_next_cycle()
        return True

    async def _next_event(self) -> h11.Event:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            self._http.receive_data(bytes(await self._stream.receive_some(READ_BYTES)))
        if not isinstance(event, h11.Event) or isinstance(event, h11.ConnectionClosed):
            raise h11.RemoteProtocolError("the connection was closed")
        return event

    async def aclose(self) -> None:
        await trio.aclose_forcefully(self._stream)


class Watch:
    """What happens to some keys, told as long as it is open; for one task at a time."""

    def __init__(self, connection: _Connection, all_open: set[Watch]) -> None:
        self._connection = connection
        self._all_open = all_open
        self._rest = b""
        self._answers: deque[Answer] = deque()
        self.begins_after = 0  # this revision

    async def start(self, path: str, request: Mapping[str, Any], headers: Mapping[str, str]) -> None:
        """RefusedError where etcd does not want it."""
        endpoint = self._connection.endpoint
        try:
            status = await self._connection.send(path, json.dumps(request).encode(), headers)
        except LOST as error:
            raise self._broken(error) from None
        answer = await self._next()
        created = answer.get("result", {})
        if status != 200 or "header" not in created or created.get("canceled"):
            why = _why(answer, created.get("cancel_reason") or "the watch was refused")
            raise RefusedError(endpoint, status, why)
        self.begins_after = int(created["header"]["revision"])

    async def events(self) -> list[Answer]:
        """The next ones, all that have come.  A wait for them can be cancelled, and nothing is lost."""
        events: list[Answer] = []
        while not events or self._answers:
            result = (await self._next()).get("result", {})
            if not result or result.get("canceled"):
                raise BackendError(f"etcd at {self._connection.endpoint} has ended a watch")
            events += result.get("events", [])
        return events

    async def aclose(self) -> None:
        self._all_open.discard(self)
        await self._connection.aclose()

    async def _next(self) -> Answer:
        while not self._answers:
            try:
                part = await self._connection.next_part()
                if part is None:
                    raise h11.RemoteProtocolError("the answer has ended")
                *lines, self._rest = (self._rest + part).split(b"\n")
                if len(self._rest) > MAX_ANSWER_BYTES:
                    raise ValueError("it sends too much")
                self._answers.extend(_told(line) for line in lines if line)
            except LOST as error:
                raise self._broken(error) from None
        return self._answers.popleft()

    def _broken(self, error: Exception) -> BackendError:
        return lost(self._connection.endpoint, error)


class EtcdClient:
    """Calls to one cluster."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._idle: list[_Connection] = []
        self._watches: set[Watch] = set()  # which are open, each a connection,
        self._beginning = 0  # and so many that will be
        self._first = 0  # of the endpoints: who answered last
        self._token = ""

    async def call(self, path: str, request: Mapping[str, Any], *, changes: bool = True) -> Answer:
        """One request and its answer; BackendError when there is none in time."""
        return await self._ask_members(lambda endpoint: self._call_once(endpoint, path, request), changes=changes)

    def may_watch(self) -> bool:
        """Whether there is a connection left for one more watch."""
        return len(self._watches) + self._beginning < MOST_WATCHES

    async def watch(self, key: bytes, end: bytes = b"") -> Watch:
        """Watch a key, or all up to `end`, from now on: who has seen an older revision has to look once more.

        etcd can tell what has happened since an older one, but looks after such watches only ten times a second.
        """
        what = {"key": encode(key), **({"range_end": encode(end)} if end else {})}
        self._beginning += 1
        try:
            watch = await self._ask_members(lambda endpoint: self._watch_once(endpoint, what), changes=False)
        finally:
            self._beginning -= 1
        self._watches.add(watch)
        return watch

    async def aclose(self) -> None:
        while self._idle:
            await self._idle.pop().aclose()

    # ------------------------------------------------------------ internals

    def _endpoints(self) -> list[Endpoint]:
        """All, in the order in which they are asked."""
        endpoints = self._access.endpoints
        return [*endpoints[self._first :], *endpoints[: self._first]]

    async def _pass_over(self, endpoint: Endpoint) -> None:
        """An endpoint failed: others are asked first, and none of its connections is used again."""
        if self._endpoints()[0] == endpoint:
            self._first = (self._first + 1) % len(self._access.endpoints)
        failed = [connection for connection in self._idle if connection.endpoint == endpoint]
        self._idle = [connection for connection in self._idle if connection.endpoint != endpoint]
        for connection in failed:  # each close lets others run, who take connections out of `_idle`
            await connection.aclose()

    async def _ask_members(self, ask: Callable[[Endpoint], Awaitable[T]], *, changes: bool) -> T:
        """The answer of the first endpoint that gives one."""
        problem = BackendError("etcd does not answer")
        with trio.move_on_after(CALL_SECONDS):
            for endpoint in ATTEMPTS * self._endpoints():
                try:
                    return await self._attempt(endpoint, ask)
                except UnreachableError as error:
                    problem = error
                except RefusedError as error:
                    if not error.may_be_repeated and (changes or not error.is_members_own):
                        raise
                    problem = error
                except BackendError as error:
                    if changes:
                        raise
                    problem = error
        raise problem

    async def _attempt(self, endpoint: Endpoint, ask: Callable[[Endpoint], Awaitable[T]]) -> T:
        """At one endpoint, which gets its share of the time: it may take connections and never answer.

        Half of it at most, also where there is one alone: what was kept of its connections can all be dead, without a
        word (of a firewall that was started again), and a new one be answered.
        """
        try:
            with trio.fail_after(CALL_SECONDS / max(2, len(self._access.endpoints))):
                await self._sign_in(endpoint)
                return await ask(endpoint)
        except trio.TooSlowError:
            await self._pass_over(endpoint)
            raise BackendError(f"etcd at {endpoint} does not answer") from None
        except RefusedError as error:
            if error.may_be_repeated:
                self._token = ""
            if error.is_members_own:
                await self._pass_over(endpoint)
            raise
        except BackendError:
            await self._pass_over(endpoint)
            raise

    async def _sign_in(self, endpoint: Endpoint) -> None:
        """Where there are passwords; the token is good at every endpoint."""
        if self._access.user and not self._token:
            who = {"name": self._access.user, "password": self._access.password}
            self._token = (await self._call_once(endpoint, "/v3/auth/authenticate", who))["token"]

    def _headers(self) -> dict[str, str]:
        return {"Authorization": self._token} if self._token else {}

    async def _call_once(self, endpoint: Endpoint, path: str, request: Mapping[str, Any]) -> Answer:
        connection = await self._take(endpoint)
        try:
            status = await connection.send(path, json.dumps(request).encode(), self._headers())
            body = b""
            while (part := await connection.next_part()) is not None:
                body += part
                if len(body) > MAX_ANSWER_BYTES:
                    raise BackendError(f"etcd at {endpoint} sends too much")
            answer = _parsed(status, body)
            reusable = connection.start_next()
        except LOST as error:
            await connection.aclose()
            raise lost(endpoint, error) from None
        except BaseException:
            with trio.CancelScope(shield=True):
                await connection.aclose()
            raise
        if reusable and len(self._idle) < MAX_IDLE:
            self._idle.append(connection)
        else:
            await connection.aclose()
        if status != 200:
            raise RefusedError(endpoint, status, _why(answer, str(body[:200])))
        self._first = self._access.endpoints.index(endpoint)
        return answer

    async def _watch_once(self, endpoint: Endpoint, what: Mapping[str, str]) -> Watch:
        watch = Watch(await self._connect(endpoint), self._watches)
        try:
            await watch.start("/v3/watch", {"create_request": what}, self._headers())
        except BaseException as error:
            await watch.aclose()
            if isinstance(error, RefusedError) and self._access.user:
                error.may_be_repeated = True  # of a token that is too old etcd says here that it has no permission
            raise
        self._first = self._access.endpoints.index(endpoint)
        return watch

    async def _take(self, endpoint: Endpoint) -> _Connection:
        for connection in self._idle:
            if connection.endpoint == endpoint:
                self._idle.remove(connection)
                return connection
        return await self._connect(endpoint)

    async def _connect(self, endpoint: Endpoint) -> _Connection:
        try:
            with trio.fail_after(CONNECT_SECONDS):
                stream: trio.abc.Stream = await trio.open_tcp_stream(endpoint.host, endpoint.port)
                if endpoint.tls:
                    context = self._access.tls or ssl.create_default_context()
                    stream = trio.SSLStream(stream, context, server_hostname=endpoint.host, https_compatible=True)
                    with suppress(AttributeError):
                        await stream.do_handshake()
        except (OSError, trio.TooSlowError) as error:
            raise UnreachableError(f"etcd at {endpoint} cannot be reached: {reason(error, 'no answer')}") from None
        except UnicodeError:
            raise UnreachableError(f"etcd at {endpoint}: that is no name of a host", is_final=True) from None
        except trio.BrokenResourceError as error:
            known = isinstance(error.__cause__, ssl.SSLCertVerificationError)
            hint = "is it signed by what -o etcd_ca names?" if known else "does it want http://HOST:PORT?"
            text = f"etcd at {endpoint}: no TLS with it: {reason(error, 'no answer')} ({hint})"
            raise UnreachableError(text, answered=True) from None
        return _Connection(endpoint, stream)
