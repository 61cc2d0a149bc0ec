"""Files that are written in place, where each node is another client of the filesystem.

A client keeps to itself what it was told to write, and remembers bytes and sizes that it has read: on NFS until
close(2) and the next open(2), on others for a second and more, and a lock is no barrier for that (docs/decisions/0009).
So what was written is sent before the lock is given up under which it was written, and before close(2) returns; and who
opens a file, or gets a lock of it that may have been another node's, has everything asked for anew.

Not guaranteed: anything about a file that stays open while another file's lock is what excludes, or about mappings.
"""

from __future__ import annotations

from safefs import backing
from safefs.filesystem import FileSystem, Handle, failure
from safefs.identity import DAEMON


class InPlace:
    """Those files of one mount."""

    def __init__(self, filesystem: FileSystem) -> None:
        self.fs = filesystem

    def unsent(self, number: int) -> list[Handle]:
        """All through which was written to the file that is open here, and whose client may not have sent it."""
        handle = self.fs.handles.get(number)
        numbers = () if handle is None else self.fs.unsent.get(handle.node.nodeid, ())
        return [self.fs.handles[each] for each in numbers]

    async def send(self, handles: list[Handle]) -> None:
        """Have the server get what was written; a failure is kept for the handle's next close."""
        for handle in handles:
            self.fs.note_sent(handle)  # before: what is written meanwhile has to be sent again
            try:
                await self.fs.backing.run(DAEMON, backing.send, handle.fd)
            except OSError as error:
                handle.error = error.errno or 0

    def require_sent(self, number: int) -> None:
        """OSError for what could not be sent: a close of the handle says so, once."""
        handle = self.fs.handles.get(number)
        if handle is not None and handle.error:
            error, handle.error = handle.error, 0
            raise failure(error)

    async def look_anew(self, number: int) -> None:
        """A lock was granted that other nodes may have had: the file shows what they have left."""
        handle = self.fs.handles.get(number)
        if handle is None or not (handle.in_place and self.fs.is_shared):
            return
        for other in self.fs.handles.values():
            other.stale |= other.in_place and other.node is handle.node
        await self.fs.look_anew(handle)  # the others when they are used: by then they may be closed
