"""A small HTTP/1.1 server for downloads that go wrong on purpose.

It serves byte strings on the loopback interface with everything that resuming clients ask for (HEAD, Range, 206, 416,
If-Range, ETag, Last-Modified), and lets a test slow a response down, cut its connection, or hold it at a byte position
until the test lets it go.  Holds are what makes races reproducible: no test has to guess how long a sleep must be.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import formatdate
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self
from urllib.parse import unquote, urlsplit

# No response may outlive this, so that a lost test cannot keep a server thread for ever.
LONGEST_HOLD = 120.0
BLOCK = 64 * 1024
# 2024-01-01: a fixed Last-Modified, since wget and curl -R copy it to the file's mtime.
MODIFIED = 1_704_067_200.0


@dataclass(frozen=True)
class Request:
    """What a client asked for, as a hold, a cut or a test sees it."""

    method: str
    path: str
    first: int
    agent: str
    status: int = 0


Matcher = Callable[[Request], bool]


@dataclass
class Hold:
    """Stops the next matching response before body byte `position` until `release`.

    The position counts in the whole file; a response that starts after it (a Range) is held before its first byte.
    """

    match: Matcher
    position: int
    reached: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)
    taken: bool = False

    def wait_reached(self, client: subprocess.Popen[str] | None = None, seconds: float = 60.0) -> None:
        """Block until a response stands at the position; fails at once when the client ends before that."""
        end = time.monotonic() + seconds
        while not self.reached.wait(0.02):
            if client is not None and client.poll() is not None:
                raise AssertionError(f"the client ended ({client.returncode}) and did not come to byte {self.position}")
            if time.monotonic() > end:
                raise TimeoutError(f"no response was held at byte {self.position} within {seconds} s")

    def release(self) -> None:
        """Let the held response, or the one that will come, go on."""
        self.released.set()


@dataclass
class Cut:
    """Resets the connection of matching responses before body byte `position`, `times` times."""

    match: Matcher
    position: int
    times: int = 1


@dataclass(frozen=True)
class Answer:
    """A resource: body, entity tag (None: not a file, no Range) and further headers."""

    body: bytes
    etag: str | None = None
    headers: tuple[tuple[str, str], ...] = ()
    status: HTTPStatus = HTTPStatus.OK


class RangeServer:
    """The server: a context manager; `url` is its root.  Subclasses or `files` say what is served."""

    def __init__(self, files: dict[str, bytes] | None = None) -> None:
        self.files = dict(files or {})
        self.bytes_per_second: float | None = None
        self.requests: list[Request] = []
        self._sent: Counter[str] = Counter()
        self._holds: list[Hold] = []
        self._cuts: list[Cut] = []
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.owner = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        with self._lock:
            for hold in self._holds:
                hold.release()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, path: str, query: str) -> Answer | None:
        """The resource at a path; None is a 404."""
        body = self.files.get(path.removeprefix("/"))
        return None if body is None else Answer(body, etag=f"{len(body):x}-{zlib.crc32(body):08x}")

    def hold(self, position: int, match: Matcher | str = "", *, method: str = "GET") -> Hold:
        """Hold the next `method` response whose path contains `match` (or for which `match` is true)."""
        hold = Hold(_matcher(match, method), position)
        with self._lock:
            self._holds.append(hold)
        return hold

    def cut(self, position: int, match: Matcher | str = "", *, times: int = 1) -> None:
        """Cut the connection of GET responses at a byte position of the file."""
        with self._lock:
            self._cuts.append(Cut(_matcher(match, "GET"), position, times))

    def seen(self, match: Matcher | str = "", method: str = "GET") -> list[Request]:
        """The requests so far that match."""
        matches = _matcher(match, method)
        with self._lock:
            return [request for request in self.requests if matches(request)]

    def sent(self, path: str, size: int) -> None:
        """Count bytes of content that went out."""
        with self._lock:
            self._sent[path] += size

    def content_bytes(self, part: str = "") -> int:
        """How many bytes of content were sent of what has `part` in its path, whoever asked for it."""
        with self._lock:
            return sum(size for path, size in self._sent.items() if part in path)

    def take_hold(self, request: Request) -> Hold | None:
        with self._lock:
            for hold in self._holds:
                if not hold.taken and hold.match(request):
                    hold.taken = True
                    return hold
        return None

    def take_cut(self, request: Request) -> Cut | None:
        with self._lock:
            for cut in self._cuts:
                if cut.times > 0 and cut.position > request.first and cut.match(request):
                    cut.times -= 1
                    return cut
        return None

    def record(self, request: Request) -> None:
        with self._lock:
            self.requests.append(request)

    def pause(self, size: int) -> None:
        """Throttle: the time that `size` bytes take; ends at once when the server stops."""
        if self.bytes_per_second:
            self._stopped.wait(size / self.bytes_per_second)

    @property
    def stopped(self) -> bool:
        return self._stopped.is_set()


def _matcher(match: Matcher | str, method: str) -> Matcher:
    if isinstance(match, str):
        return lambda request: request.method == method and match in request.path
    return lambda request: request.method == method and match(request)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # A held thread must not keep the test process from leaving the with block.
    block_on_close = False
    request_queue_size = 128
    owner: RangeServer


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # A keep-alive connection that nobody uses ends its thread after this.
    timeout = LONGEST_HOLD

    def setup(self) -> None:
        super().setup()
        # Headers and body are separate writes: without this each answer waits for a delayed ACK.
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError, TimeoutError):
            super().handle()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name is the base class's
        """Keep the test's output quiet; `RangeServer.requests` has it all."""

    def do_GET(self) -> None:
        self._respond()

    def do_HEAD(self) -> None:
        self._respond()

    def _respond(self) -> None:
        assert isinstance(self.server, _Server)
        owner = self.server.owner
        address = urlsplit(self.path)
        path = unquote(address.path)
        agent = self.headers.get("User-Agent", "")
        answer = owner.answer(path, address.query)
        if answer is None:
            answer = Answer(b"no such thing\n", status=HTTPStatus.NOT_FOUND)
        size = len(answer.body)
        first, last, status = 0, size - 1, answer.status
        asked = self.headers.get("Range")
        if asked is not None and answer.etag is not None and self._range_is_current(answer):
            parsed = parse_range(asked, size)
            if parsed is None:
                status = HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE
            else:
                first, last = parsed
                status = HTTPStatus.PARTIAL_CONTENT
        request = Request(self.command, path, first, agent, int(status))
        owner.record(request)
        self.send_response(status)
        for name, value in answer.headers:
            self.send_header(name, value)
        if answer.etag is not None:
            self.send_header("ETag", f'"{answer.etag}"')
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Last-Modified", formatdate(MODIFIED, usegmt=True))
        if status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            self.send_header("Content-Range", f"bytes */{size}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if status == HTTPStatus.PARTIAL_CONTENT:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        if self.command == "GET":
            self._send_body(owner, request, answer.body, first, last + 1)

    def _range_is_current(self, answer: Answer) -> bool:
        condition = self.headers.get("If-Range")
        return condition is None or condition in {f'"{answer.etag}"', formatdate(MODIFIED, usegmt=True)}

    def _send_body(self, owner: RangeServer, request: Request, body: bytes, position: int, end: int) -> None:
        hold = owner.take_hold(request)
        cut = owner.take_cut(request)
        self.wfile.flush()
        while position < end or hold is not None:
            if hold is not None and position >= min(hold.position, end):
                hold.reached.set()
                hold.released.wait(LONGEST_HOLD)
                hold = None
                continue
            if cut is not None and position >= cut.position:
                self._reset()
                return
            if owner.stopped:
                self.close_connection = True
                return
            stop = min(position + BLOCK, end)
            if hold is not None:
                stop = min(stop, hold.position)
            if cut is not None:
                stop = min(stop, cut.position)
            self.wfile.write(memoryview(body)[position:stop])
            owner.sent(request.path, stop - position)
            owner.pause(stop - position)
            position = stop

    def _reset(self) -> None:
        """End the connection in the middle of a body."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


def parse_range(header: str, size: int) -> tuple[int, int] | None:
    """The first and last byte of a single `bytes=` range; None where it cannot be satisfied."""
    unit, _, spec = header.partition("=")
    start, dash, end = spec.strip().partition("-")
    if unit.strip() != "bytes" or not dash or "," in spec:
        return 0, size - 1
    if not start:
        length = min(int(end), size)
        return (size - length, size - 1) if length else None
    first = int(start)
    last = min(int(end), size - 1) if end else size - 1
    return (first, last) if first <= last else None
