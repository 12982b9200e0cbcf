"""What waits in one turn of the event loop becomes one batch, whoever brought it.

The first who comes leads: the loop turns once, and then everything that has gathered is carried out
together. Who is cancelled takes nothing of the others' along: the batch has begun, and is finished.
What comes meanwhile is another batch, which does not wait for this one.
"""

from collections.abc import Awaitable, Callable, Sequence

import msgspec
import trio

from pmblk.nvme.command import Command


class _Batch(msgspec.Struct):
    commands: list[Command]
    done: trio.Event


class Gathering:
    """`carry_out` gives every command its status, and raises nothing."""

    def __init__(self, carry_out: Callable[[Sequence[Command]], Awaitable[None]]) -> None:
        self._carry_out = carry_out
        self._batch: _Batch | None = None

    async def join(self, commands: Sequence[Command]) -> None:
        """Returns when these have their status; they go in the order of their coming."""
        if self._batch is not None:
            self._batch.commands += commands
            await self._batch.done.wait()
            return
        batch = self._batch = _Batch(list(commands), trio.Event())
        # What bounds it is the patience with a member.
        with trio.CancelScope(shield=True):
            await trio.lowlevel.checkpoint()
            self._batch = None
            try:
                await self._carry_out(batch.commands)
            finally:
                batch.done.set()
