"""What stands for the C extension where flock(2) is lent to it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from safefs.locktable import Held, Mode


@dataclass
class Loan:
    owner: int
    held: Held
    seconds: float  # for which it is still to be answered


@dataclass
class Extension:
    """Answers as the C extension does (safefs/fuse/loans.c); times are told from now, and it is moved on by hand."""

    loans: dict[int, Loan] = field(default_factory=dict)  # by file handle
    owners: Counter[int] = field(default_factory=Counter)  # of record locks

    def mark_owner(self, number: int, change: int) -> None:
        self.owners[number] += change

    def lend_lock(self, number: int, owner: int, held: Held, until: float) -> bool:
        self.loans[number] = Loan(owner, held, until)
        return True

    def take_lock_back(self, number: int) -> Held:
        return self.loans.pop(number).held

    def answers(self, number: int, owner: int) -> bool:
        """Whether a request would be answered now."""
        loan = self.loans.get(number)
        return loan is not None and loan.owner == owner and loan.seconds > 0

    def use(self, number: int, owner: int, mode: Mode | None, pid: int) -> bool:
        """Lock or unlock (None); False when that is not lent, or not any more."""
        answers = self.answers(number, owner)
        if answers:
            self.loans[number].held = Held(mode, pid)
        return answers

    def later(self, seconds: float) -> None:
        """So much time has gone by."""
        for loan in self.loans.values():
            loan.seconds = max(loan.seconds - seconds, 0)
