"""The life of a pending write.  Decides; does no I/O and never waits.

A draft is what one family (the process that opened a name for writing, its threads and its descendants) writes until
its last close.  It lives in rounds: what a round wrote is published, put into quarantine or discarded, and whoever
still holds a descriptor after that and writes again starts the next round on top of what the round before left.

`TRANSITIONS` is the whole machine; `Draft.move` refuses everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING

from safefs.digest import Written
from safefs.hot import Cold
from safefs.model import Caller, Closer, Identity, Process
from safefs.rules import NameClass

if TYPE_CHECKING:
    from safefs.gate import Gate
    from safefs.namespace import Node


class DraftState(Enum):
    """Where a round stands."""

    WRITING = "writing"
    PUBLISHING = "publishing"
    PUBLISHED = "published"
    QUARANTINED = "quarantined"
    DISCARDED = "discarded"


class DraftEvent(Enum):
    """What can happen to a round."""

    SEAL = auto()  # a close, rename or link that publishes
    RENAMED = auto()  # the name shows it
    REFUSED = auto()  # a check failed: its bytes are kept, its name is not touched
    CANCELLED = auto()  # its own family unlinked it
    WRITTEN = auto()  # a descriptor that outlived the round wrote again


_S, _E = DraftState, DraftEvent
TRANSITIONS: dict[tuple[DraftState, DraftEvent], DraftState] = {
    (_S.WRITING, _E.SEAL): _S.PUBLISHING,
    (_S.WRITING, _E.REFUSED): _S.QUARANTINED,
    (_S.WRITING, _E.CANCELLED): _S.DISCARDED,
    (_S.PUBLISHING, _E.RENAMED): _S.PUBLISHED,
    (_S.PUBLISHING, _E.REFUSED): _S.QUARANTINED,
    (_S.PUBLISHED, _E.WRITTEN): _S.WRITING,
    (_S.PUBLISHED, _E.CANCELLED): _S.DISCARDED,
    (_S.QUARANTINED, _E.CANCELLED): _S.DISCARDED,
}


class InvalidTransitionError(RuntimeError):
    """A defect in safefs: an event that the state of a draft does not take."""


@dataclass(slots=True)
class Base:
    """The version that a draft started from, kept alive by a descriptor."""

    fd: int
    identity: Identity


@dataclass(slots=True)
class Gathered:
    """Small writes, each begun where the one before ended, that the private inode has not got yet."""

    offset: int = 0
    data: bytearray = field(default_factory=bytearray)

    def continues(self, offset: int) -> bool:
        return offset == self.offset + len(self.data)

    def add(self, offset: int, data: bytes) -> None:
        if not self.data:
            self.offset = offset
        self.data += data


@dataclass(slots=True, eq=False)
class Draft:
    """One pending write.  Descriptors are owned by the filesystem, which closes them when the draft ends."""

    write_id: str
    node: Node  # the nodeid that only the family sees
    directory: Node
    name: bytes
    name_class: NameClass
    caller: Caller
    opener: Process | None
    pidfd: int  # of the opener; -1 when it could not be had
    fd: int  # the private inode, open for reading and writing
    temp_name: bytes | None  # its hidden name, None for O_TMPFILE
    shown_ino: int  # st_ino while it is a draft (its base's, if any): descriptors are recognised by it
    gate: Gate
    base: Base | None = None
    created: bool = False  # by O_CREAT of a missing name
    exclusive: bool = False  # by O_CREAT|O_EXCL
    claim: Callable[[], object] | None = None  # gives up what that has claimed, on all nodes
    locked: bool = False  # something was locked through it
    fresh: bool = False  # started from nothing: O_CREAT or O_TRUNC
    append_only: bool = True  # whoever has opened it for writing did so with O_APPEND
    appends: bool = False  # somebody opened it with O_APPEND: the kernel writes at the end that it knows
    prepared: bool = False  # the private inode has the content; before that reads go to the base
    modified: bool = False  # there is something to publish
    closed: bool = False  # published by its provably last close: whoever opens the name from now on is a new writer
    flushed: bool = False  # a living or exiting process closed after the last write
    size: int = 0  # bytes that the file must have when it is sealed
    gathered: Gathered = field(default_factory=Gathered)  # guarded by the gate's `writing`
    written: Written = field(default_factory=Written)  # what the private inode was given; guarded likewise
    error: int = 0  # errno of the first write that failed
    fenced: bool = False  # what was locked through it is lost or broken: its error is EIO
    unseen: bool = False  # its writers pass through: the kernel writes to the private inode by itself
    mappable: bool = False  # a writer opened it for reading as well, so that it can be mapped
    may_have_capability: bool = False  # security.capability: nothing that safefs makes has one
    shown: Identity | None = None  # its own inode, if a name showed it while somebody could still write to it
    copied: bool = False  # what was published is a copy, because writers kept the private inode
    ending: bool = False  # its node is becoming a version's
    detaching: bool = False  # its published inode is being made private again
    flushes: int = 0  # closes of which it is not decided yet whether they publish
    unlinkable: bool = False  # a name showed the inode and no longer does: link(2) takes it no more
    closer: Closer = Closer.NOBODY
    writers: int = 0  # open handles that can write
    handles: int = 0  # open handles of any kind
    reserved: int = 0  # opens on their way: a LOOKUP was answered with the draft, its OPEN has not come yet
    listed: bool = False  # in the table of drafts
    spare_fds: list[int] = field(default_factory=list)  # given up within a round, until its publish
    version_fd: int = -1  # O_PATH, of the private inode once it is published: for its node to go on with
    state: DraftState = DraftState.WRITING

    def move(self, event: DraftEvent) -> None:
        """Take `event`, or raise InvalidTransitionError."""
        target = TRANSITIONS.get((self.state, event))
        if target is None:
            raise InvalidTransitionError(f"draft {self.write_id} is {self.state.value}: it cannot take {event.name}")
        self.state = target
        if self.claim is not None and target not in (DraftState.WRITING, DraftState.PUBLISHING):
            self.claim()
            self.claim = None
        if event is DraftEvent.WRITTEN and self.version_fd >= 0:
            self.spare_fds.append(self.version_fd)
            self.version_fd = -1

    @property
    def discarded(self) -> bool:
        return self.state is DraftState.DISCARDED

    @property
    def visible_to_family(self) -> bool:
        """Whether its family finds it under its name."""
        return self.state in (DraftState.WRITING, DraftState.PUBLISHING, DraftState.PUBLISHED)

    @property
    def found_by_family(self) -> bool:
        """Whether its family's lookups lead to it.

        What was published through the kernel is a version to everybody: its inode takes no further round.
        """
        over = self.closed or (self.unseen and self.state is DraftState.PUBLISHED and not self.writers)
        return self.visible_to_family and not over

    @property
    def pending(self) -> bool:
        """Whether this round has something that is neither published nor kept."""
        return self.modified and self.state is DraftState.WRITING

    @property
    def unpublished(self) -> bool:
        """The same, or it is being published now."""
        return self.pending or self.state is DraftState.PUBLISHING


class Decision(Enum):
    """What a FLUSH does."""

    PUBLISH = auto()
    WAIT = auto()  # not provably the last close: a later FLUSH or RELEASE decides
    LOOK_AGAIN = auto()  # a descendant has a copy, which it may be about to lose in execve


@dataclass(frozen=True, slots=True)
class FlushFacts:
    """What was seen when a FLUSH arrived."""

    closer: Closer
    is_opener: bool  # the process that opened this handle closes
    other_writers: bool  # another open handle of the draft can write
    holds_another: bool = False  # the process has another writable descriptor on the file
    descendant_holds: bool = False  # a descendant has one


def decide_flush(facts: FlushFacts) -> Decision:
    """Publish only when this is provably the last close that can write; everything unsure waits for RELEASE."""
    if facts.closer not in (Closer.ALIVE, Closer.EXITED) or not facts.is_opener or facts.other_writers:
        return Decision.WAIT
    if facts.holds_another:
        return Decision.WAIT
    return Decision.LOOK_AGAIN if facts.descendant_holds else Decision.PUBLISH


class DraftTable:
    """All live drafts, found by name and by directory."""

    def __init__(self, hot: Cold | None = None) -> None:
        self._hot = hot or Cold()
        self._by_name: dict[tuple[int, bytes], list[Draft]] = {}
        self._by_directory: dict[int, int] = {}

    def __iter__(self) -> Iterator[Draft]:
        for drafts in list(self._by_name.values()):
            yield from list(drafts)

    def __len__(self) -> int:
        return sum(map(len, self._by_name.values()))

    def add(self, draft: Draft) -> None:
        nodeid = draft.directory.nodeid
        self._hot.mark_name(nodeid, draft.name, 1)
        self._by_name.setdefault((nodeid, draft.name), []).append(draft)
        self._by_directory[nodeid] = self._by_directory.get(nodeid, 0) + 1

    def discard(self, draft: Draft) -> None:
        """Take a draft out; nothing happens when it is out already."""
        key = (draft.directory.nodeid, draft.name)
        drafts = self._by_name.get(key, [])
        if draft not in drafts:
            return
        drafts.remove(draft)
        self._hot.mark_name(*key, -1)
        if not drafts:
            del self._by_name[key]
        left = self._by_directory[key[0]] - 1
        if left:
            self._by_directory[key[0]] = left
        else:
            del self._by_directory[key[0]]

    def named(self, directory: Node, name: bytes) -> list[Draft]:
        return list(self._by_name.get((directory.nodeid, name), ()))

    def has(self, directory: Node, name: bytes) -> bool:
        return (directory.nodeid, name) in self._by_name

    def below(self, directory: Node) -> list[Draft]:
        """The drafts whose names are entries of `directory`."""
        if directory.nodeid not in self._by_directory:
            return []
        return [draft for draft in self if draft.directory is directory]

    def claims(self, directory: Node, name: bytes) -> bool:
        """Whether a live O_EXCL creation has claimed the name."""
        return any(draft.exclusive and draft.visible_to_family for draft in self.named(directory, name))
