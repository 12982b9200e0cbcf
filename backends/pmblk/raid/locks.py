"""One at a time for a row: a write that computes parity, a read that makes up what is missing.

Rows are locked together and in order, so no circle of waiters can form.
"""

import contextlib
from collections.abc import AsyncIterator, Collection

import trio


class RowLocks:
    """Locks by number, made when they are wanted and gone when nobody has them."""

    def __init__(self) -> None:
        self._locks: dict[int, trio.Lock] = {}
        self._users: dict[int, int] = {}

    @contextlib.asynccontextmanager
    async def hold(self, rows: Collection[int]) -> AsyncIterator[None]:
        ordered = sorted(rows)
        for row in ordered:
            self._locks.setdefault(row, trio.Lock())
            self._users[row] = self._users.get(row, 0) + 1
        held = []
        try:
            for row in ordered:
                lock = self._locks[row]
                try:
                    lock.acquire_nowait()  # a sweep takes many: no turn of the loop for each
                except trio.WouldBlock:
                    await lock.acquire()
                held.append(lock)
            yield
        finally:
            for lock in held:
                lock.release()
            for row in ordered:
                self._users[row] -= 1
                if not self._users[row]:
                    del self._users[row], self._locks[row]
