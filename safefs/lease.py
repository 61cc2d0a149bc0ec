"""Lease arithmetic: how long a node may act on its locks, and when others may take them from it.

`now` is an argument everywhere, in seconds of CLOCK_BOOTTIME, which goes on while a machine sleeps.  Clocks of
different nodes are never compared, nor are time stamps of files: a node judges by what it saw itself and when.

Why two nodes never hold the same lock: a renewal that went well was sent at some time t of the holder.  Others saw the
change after t at the earliest, and take the lock no sooner than `lease_seconds + delay_seconds` after they saw it.  The
holder stops at t + `lease_seconds` by its own clock.  The delay covers clocks that run at different speeds and the time
between a check of the lease and what is done under it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

LEASE_SECONDS = 15.0
LONGEST_LEASE_SECONDS = 3600.0
DELAY_SECONDS = 3.0
RENEWALS = 3  # attempts within a lease


def boottime() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True)
class Terms:
    """What all nodes of a cluster have agreed on."""

    lease_seconds: float = LEASE_SECONDS
    delay_seconds: float = DELAY_SECONDS

    @property
    def renew_seconds(self) -> float:
        return self.lease_seconds / RENEWALS

    @property
    def gone_seconds(self) -> float:
        """A node that has not been seen to renew for so long has lost all that it had."""
        return self.lease_seconds + self.delay_seconds


@dataclass
class OwnLease:
    """The lease of this node."""

    terms: Terms
    renewed: float | None = None  # when the last renewal that went well was sent

    def renew(self, sent: float) -> None:
        self.renewed = sent

    def ends(self) -> float:
        return float("-inf") if self.renewed is None else self.renewed + self.terms.lease_seconds

    def holds(self, now: float) -> bool:
        return now < self.ends()


@dataclass
class Sightings:
    """The other nodes, as this one has seen them: the last value of their heartbeat and when it was new."""

    terms: Terms
    _seen: dict[str, tuple[object, float]] = field(default_factory=dict)

    def see(self, node: str, heartbeat: object, before: float, now: float) -> bool:
        """Note what a node's heartbeat was, read between `before` and `now`; whether the node is gone.

        A node without a heartbeat (None) is one whose record cannot be found: it is given the same time.
        """
        known = self._seen.get(node)
        if known is None or known[0] != heartbeat:
            self._seen[node] = heartbeat, now
            return False
        return before - known[1] >= self.terms.gone_seconds

    def forget(self, nodes: set[str]) -> None:
        """Nobody asks about these nodes any more."""
        for node in nodes & self._seen.keys():
            del self._seen[node]
