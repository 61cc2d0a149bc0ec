"""What a place has to offer in which the nodes of a cluster keep their lock records.

Guaranteed by every backend (`tests/conformance` asks each of them):

- `swap` replaces exactly the record that was read, or nothing; of several that replace the same one, one succeeds.
- Whoever reads after a swap has succeeded, on any node, gets that record or a later one.
- A node is `gone` only when its own clock has told it before that its lease is over (safefs/lease.py).
- Notices can get lost, and changes can be reported that are none: who waits looks again now and then.

Every call is bounded in time and raises `BackendError` where the backend cannot be reached, or does not answer.  The
outcome of a swap that raises is not known; its caller reads again.  So does one whose swap has failed: a client of the
backing filesystem repeats what it got no answer to, and then this can be said of a swap that was carried out.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from safefs.cluster.record import NameRecord

T = TypeVar("T")

NAMELESS = "?"  # no name begins so


class BackendError(Exception):
    """The backend cannot be reached, or what it says makes no sense; the text is one line.

    `answered`: something is there, but what it says does not help.  `is_final`: it lets this node not in, and to ask
    again changes nothing unless somebody changes it there.
    """

    def __init__(self, text: str, *, answered: bool = False, is_final: bool = False) -> None:
        super().__init__(text)
        self.answered = answered
        self.is_final = is_final


class LeaseLostError(Exception):
    """This node has lost its lease, and with it all that it held; the text is one line."""


# Which process a node is, and whether a process that is described so is known to have died.
ProcessIdentity = Mapping[str, Any]
HasDied = Callable[[ProcessIdentity], bool]
# Told in which of several places a node is about to have its locks, by an id that is kept there, and "" once it has
# them nowhere any more; BackendError where other nodes have theirs elsewhere.
Admit = Callable[[str], Awaitable[None]]


class Act(Protocol):
    """Calls a function, in the calling thread, as whom the files of a backend belong to."""

    def __call__(self, function: Callable[..., T], /, *arguments: Any) -> T: ...


def plainly(function: Callable[..., T], /, *arguments: Any) -> T:
    """As whoever the process is."""
    return function(*arguments)


@dataclass(frozen=True)
class Stored:
    """A record as it was read: its version grows with every swap; 0 when there is none."""

    version: int = 0
    record: NameRecord = field(default_factory=NameRecord)
    token: str = field(default="", compare=False)  # the backend's own


class UnreadableError(BackendError):
    """There is a record, but not one that this version of safefs can read."""


class DamagedError(UnreadableError):
    """A record is not what was written, by this or another version: by the end of a machine, or of its disk.

    `stored` is what an operator can put into its place: all who could be on it hear that what they had is broken.
    `may_pass`: it may be readable at another time, or for another node, so nobody else puts anything there.
    """

    def __init__(self, text: str, stored: Stored, *, may_pass: bool = False) -> None:
        super().__init__(text)
        self.stored = stored
        self.may_pass = may_pass


class Follower(Protocol):
    """One record, for as long as a node has to do with it; for one task at a time."""

    async def next_change(self, seen: Stored, seconds: float, turns: int = 0) -> Stored | None:
        """The record once it is a later one than the one seen, if not the latest; None when the time is over.

        A wait can be cancelled at any moment, and the next one misses nothing by that.  Before something changes for
        this node others have so many turns: if it has to look for changes it can look so much less often.
        """

    async def aclose(self) -> None:
        """Nothing more is wanted for now.  Whoever asks again has what is told from then on."""


class LockBackend(Protocol):
    """The records of one cluster, as one node sees them."""

    @property
    def tells_changes(self) -> bool:
        """Whether who follows a record is told of changes, at no cost until there is one; else he looks for them."""

    @property
    def node(self) -> str:
        """This node's name, which no other has had or will have; another one after each lost lease."""

    async def join(self) -> None:
        """Become a node of the cluster, with a new name and a lease; with neither before it is done, or if it fails."""

    async def renew(self) -> None:
        """Renew the lease; LeaseLostError when it is over."""

    async def leave(self) -> None:
        """End the lease: what this node held is free at once."""

    async def read(self, name: str) -> Stored:
        """The record of a name."""

    async def swap(self, name: str, old: Stored, new: NameRecord) -> Stored | None:
        """Replace a record; None when it is not the one that was read any more.  An empty record is removed."""

    async def discard(self, name: str, stored: Stored) -> None:
        """An empty record will not be needed soon."""

    async def is_current(self, name: str, stored: Stored) -> bool:
        """Whether a record is still the one that was read, on the server, whatever a cache says."""

    def follow(self, name: str) -> Follower:
        """What becomes of a record."""

    async def notify(self, node: str, name: str) -> None:
        """Tell another node that somebody wants a name that is delegated to it."""

    def expect_notices(self) -> None:
        """A name that is delegated to this node has been used; so others may want it, too.  Called again and again."""

    def rest(self, rests: bool) -> None:
        """Whether this node has nothing that others can want or break: until it has, notices may take their time."""

    async def next_notice(self) -> str:
        """The next name of ours that somebody wants; waiting for it goes on when this node joins anew."""

    async def answer(self, question: str, text: str) -> None:
        """Leave something for who has asked this node, by a notice; `question` is a name of its own."""

    async def take_answer(self, node: str, question: str) -> str | None:
        """What another node has left, which is removed; None where there is nothing yet."""

    async def gone(self, nodes: Iterable[str]) -> set[str]:
        """Those of the nodes that have lost their leases; for a node that has one, others may get BackendError."""

    async def tidy_up(self) -> None:
        """Remove some of what nodes have left that are gone.  Called now and then."""

    async def all_names(self) -> list[str]:
        """The names that have records; where nobody can tell the name, `NAMELESS` and the place of the record."""

    async def some_names(self, most: int) -> list[str]:
        """Some of them, so many at most; asked again and again it comes to all that stay."""

    async def process_of(self, node: str) -> ProcessIdentity:
        """Which process a node is; empty when that is not known."""

    def lease_ends(self) -> float:
        """Until when this node may act on its locks (CLOCK_BOOTTIME)."""
