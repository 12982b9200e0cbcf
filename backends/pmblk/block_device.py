"""What front ends serve: the contract of a namespace, whether it lies in memory or is an array.

A front end hands `execute` a batch of commands, completes the rest of them with `complete`, and
gives every command to `release` when its reply has left. It asks nothing of what is behind. Who
needs more of one that lies in memory (a representation, media) asks `pmblk.namespace` for it.

Between two awaits everything here is atomic, since all of it runs on one event loop.
"""

import abc
import errno
from collections.abc import Iterable, Sequence

import trio

from pmblk.counters import Counters
from pmblk.media.faults import Health
from pmblk.nvme.command import FLUSH, Command

NONE: tuple[Command, ...] = ()


class BlockDevice(abc.ABC):
    """`lba_bytes` is the reported block size; any byte range may be read and written.

    `health.fault` is what became of the memory that reads are views of: who has copied out of them
    looks at it afterwards. `changing` is for whoever exchanges a part of it, or closes it.
    """

    name: str
    lba_bytes: int
    read_only: bool
    health: Health
    counters: Counters
    changing: trio.Lock
    remedy: str  # what to do about one that has failed

    # ---- what it is

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """Bytes; it may grow."""

    @property
    @abc.abstractmethod
    def description(self) -> str:
        """What its bytes lie in, in a few words."""

    @property
    @abc.abstractmethod
    def durability(self) -> tuple[str, str]:
        """How durable a completed flush is, in a word, and why."""

    @abc.abstractmethod
    def allocated_bytes(self) -> int:
        """How much of it takes space."""

    # ---- I/O

    @abc.abstractmethod
    def execute(self, commands: Sequence[Command]) -> Sequence[Command]:
        """Set `status` (and what was read) of every command that needs no waiting; return the rest.

        A command that arrives with a status keeps it: its front end has judged it already. Read
        segments stay valid until the command is given to `release`. Payloads are the caller's again
        when this returns.
        """

    @abc.abstractmethod
    async def complete(self, commands: Sequence[Command]) -> Sequence[Command]:
        """Finish one or more of what `execute` returned, in order; return those that still wait.

        The finished ones have their status. Send them, `release` them, and come again with the
        rest.
        """

    @abc.abstractmethod
    def release(self, commands: Iterable[Command]) -> None:
        """The replies have left: what these commands read may be looked at until the next await."""

    @property
    @abc.abstractmethod
    def has_windows(self) -> bool:
        """Whether `window` is worth asking for."""

    @abc.abstractmethod
    def window(self, command: Command) -> memoryview | None:
        """Memory for a write's payload beyond its `received` bytes, to receive into without a copy.

        Valid until the caller's next await. None: the bytes must go through `execute`, which also
        knows the error if there is one.
        """

    @abc.abstractmethod
    def received(self, command: Command, length: int) -> None:
        """The next `length` bytes of the command's payload are in its window."""

    @property
    @abc.abstractmethod
    def starved(self) -> int:
        """How many commands, or changes, wait for a `release`."""

    @property
    @abc.abstractmethod
    def starved_since(self) -> float:
        """Trio's clock when the first of them began to wait."""

    async def flush(self) -> None:
        """All that was completed is durable when this returns. Raises OSError."""
        flush = Command(FLUSH, 0, 0, 0)
        await self.complete(self.execute((flush,)))
        if flush.status:
            reason = self.failure() or "the flush failed"
            raise OSError(errno.EIO, f"namespace {self.name}: {reason}")

    # ---- failures

    @abc.abstractmethod
    def failure(self) -> str:
        """What became of it, empty while all is well; costs little."""

    @abc.abstractmethod
    def examine(self, views: Iterable[memoryview] = ()) -> bool:
        """Whether it has failed, with a closer look. A system call refused `views` (EFAULT)."""

    # ---- its life

    async def run(self) -> None:
        """Work that goes on behind the I/O, until it is cancelled; there may be none."""

    async def stop(self) -> None:
        """Nothing uses it any more, and `run` has ended: the last that takes waiting.

        Raises OSError when not all of it is durable; it can be closed all the same.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Let everything go. Whoever was cut off may hold memory: that goes with the process."""
