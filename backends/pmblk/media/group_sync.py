"""Group commit: however many ask for a sync at once, the media are synced as seldom as possible.

Whoever asks is served by a sync that *starts* after it asked; one that is under way may have
passed the bytes in question already. A failed sync is final: after an error the kernel may call
pages clean that never reached the disk (fsync(2), NOTES; Rebello et al., USENIX ATC 2020), so a
second sync that succeeds would prove nothing.
"""

import trio

from pmblk.media.durability import Durability


class GroupSync:
    """One for one media. `Durability.sync` runs in a worker thread, one at a time."""

    def __init__(self, durability: Durability) -> None:
        self._durability = durability
        self._started = 0
        self._finished = 0
        self._idle = trio.Event()
        self._idle.set()
        self.failure: OSError | None = None

    def try_now(self) -> bool:
        """Durable now, if that costs no wait; False: await a sync (which may have failed)."""
        if self.failure is not None or self._durability.sync_blocks:
            return False
        self._durability.fence()
        return True

    async def __call__(self) -> None:
        """Durable when it returns. Raises the OSError of the first sync that ever failed."""
        if self.try_now():
            return
        wanted = self._started + 1
        while self._finished < wanted:
            if self.failure is not None:
                raise OSError(self.failure.errno, self.failure.strerror)
            if not self._idle.is_set():
                await self._idle.wait()
                continue
            await self._run()

    async def _run(self) -> None:
        self._started += 1
        run = self._started
        self._idle = trio.Event()
        self._durability.fence()
        try:
            await trio.to_thread.run_sync(self._durability.sync)
            self._finished = run
        except OSError as error:
            self.failure = error
        finally:
            self._idle.set()
