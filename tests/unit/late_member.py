"""A member whose write is done by a thread, which goes on when nobody waits for it any more."""

from collections.abc import Sequence

import trio

from pmblk.raid.member import Request
from tests.unit.sim_member import SimMember


class LateMember(SimMember):
    """The next write after `hold` is done, and lands, when `go_on` is set."""

    nursery: trio.Nursery | None = None

    def hold(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.entered, self.go_on = trio.Event(), trio.Event()

    async def write(self, requests: Sequence[Request]) -> None:
        nursery, self.nursery = self.nursery, None
        if nursery is None:
            await super().write(requests)
            return
        landed = trio.Event()
        errors: list[OSError] = []
        nursery.start_soon(self._land, list(requests), landed, errors)
        self.entered.set()
        await landed.wait()
        for error in errors:
            raise error

    async def _land(
        self, requests: Sequence[Request], landed: trio.Event, errors: list[OSError]
    ) -> None:
        await self.go_on.wait()
        try:
            await super().write(requests)
        except OSError as error:
            errors.append(error)
        landed.set()
