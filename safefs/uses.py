"""What owners have asked for, and through which open files of which files.

A close of a file ends the record locks of its process that are on this file, by whatever name it was locked; a name can
have been that of several files, one after the other, while they were open.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable

from safefs.locktable import Kind, Owner

Use = tuple[str, Kind, Owner]  # what an owner has of a name, or asks for


class Uses:
    """Those of one node; `mark` is told of each owner of record locks when there is one more or less."""

    def __init__(self, mark: Callable[[Owner, int], None]) -> None:
        self._mark = mark
        self._files: dict[int, int] = {}  # of open files: which file each is of
        self._of_handle: defaultdict[int, set[Use]] = defaultdict(set)
        self._through: dict[Use, dict[int, set[int]]] = {}  # by file the open files
        self._last: dict[Use, int] = {}  # one of these: through which it was asked last, if that is still there
        self._names: defaultdict[tuple[Owner, int], set[str]] = defaultdict(set)  # of record locks, by owner and file
        self._recorded: Counter[Owner] = Counter()  # on how many names an owner has record locks, or asks for some

    def __len__(self) -> int:
        return len(self._through)

    def add(self, use: Use, handle: int, file: int, *, anew: bool) -> None:
        """An owner asks through an open file; `anew`: it has nothing, so what it has asked before counts no more."""
        key, kind, owner = use
        if use not in self._through:
            self._through[use] = {}
            if kind is Kind.RECORD:
                self._recorded[owner] += 1
                if self._recorded[owner] == 1:
                    self._mark(owner, 1)
        elif anew:
            for each in self.handles(use):
                self.part(use, each)
        file = self._files.setdefault(handle, file)
        self._of_handle[handle].add(use)
        self._through[use].setdefault(file, set()).add(handle)
        self._last[use] = handle
        if kind is Kind.RECORD:
            self._names[owner, file].add(key)

    def of(self, handle: int) -> set[Use]:
        """What was asked for through an open file."""
        return self._of_handle.get(handle, set())

    def file(self, handle: int) -> int:
        return self._files[handle]

    def open_files(self) -> list[int]:
        return list(self._of_handle)

    def names(self, owner: Owner, file: int) -> list[str]:
        """By which an owner has locked records of a file."""
        return sorted(self._names.get((owner, file), ()))

    def files(self, use: Use) -> set[int]:
        return set(self._through.get(use, ()))

    def handles(self, use: Use, file: int | None = None) -> list[int]:
        """The open files through which it was asked for: those of one file, or all."""
        through = self._through.get(use, {})
        found = through.values() if file is None else [through.get(file, set())]
        return sorted(handle for handles in found for handle in handles)

    def part(self, use: Use, handle: int) -> None:
        """It is not asked for through this open file any more."""
        files, file = self._through.get(use, {}), self._files.get(handle, 0)
        if handle not in files.get(file, ()):
            return
        files[file].remove(handle)
        self._of_handle[handle].discard(use)
        key, kind, owner = use
        if not files[file]:
            del files[file]
            if kind is Kind.RECORD:
                self._names[owner, file].discard(key)
                if not self._names[owner, file]:
                    del self._names[owner, file]
        if files and self._last[use] == handle:
            self._last[use] = self.handles(use)[-1]

    def release(self, handle: int) -> list[Use]:
        """An open file is gone; what was asked for through it last, and of no other file by the same name."""
        last = []
        for use in list(self.of(handle)):
            is_last, file = self._last[use] == handle, self._files[handle]
            if is_last and self.files(use) == {file}:
                last.append(use)
            for each in self.handles(use, file) if is_last else [handle]:
                self.part(use, each)
        self._of_handle.pop(handle, None)
        self._files.pop(handle, None)
        return last

    def forget(self, use: Use) -> bool:
        """Whether it was known."""
        if use not in self._through:
            return False
        for handle in self.handles(use):
            self.part(use, handle)
        del self._through[use]
        self._last.pop(use, None)
        _, kind, owner = use
        if kind is Kind.RECORD:
            self._recorded[owner] -= 1
            if not self._recorded[owner]:
                del self._recorded[owner]
                self._mark(owner, -1)
        return True

    def forget_all(self, node: str | None = None) -> None:
        """All, or those of owners of every node but one."""
        for use in [use for use in self._through if use[2].node != node]:
            self.forget(use)
