"""What the control socket answers about arrays in service, and does to their members.

Stopping and assembling change the service: they are `pmblkd.service`'s.
"""

import contextlib
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path

import trio

from pmblk import PmblkError
from pmblk.array_face import Growable, Running
from pmblk.volume import array_of, running_of
from pmblkd import preflight
from pmblkd.control import Handler
from pmblkd.errors import WorkFailed
from pmblkd.questions import (
    GrowQuestion,
    MemberQuestion,
    RaidStatusQuestion,
    ReplaceQuestion,
    ScrubQuestion,
)
from pmblkd.raid_reports import RaidReport
from pmblkd.registry import Registry, Served


class RaidAnswers:
    """`mountpoint` is where the files of the daemon are, if anywhere.

    `resized` is told of an array that has another size. Changes are made one at a time.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        resized: Callable[[Served], None],
        mountpoint: Path | None = None,
    ) -> None:
        self._registry = registry
        self._resized = resized
        self._mountpoint = mountpoint
        self._one_at_a_time = trio.Lock()

    def handlers(self) -> dict[str, Handler]:
        return {
            "raid-status": Handler(RaidStatusQuestion, self._status),
            "raid-fail": Handler(MemberQuestion, self._fail),
            "raid-remove": Handler(MemberQuestion, self._remove),
            "raid-add": Handler(MemberQuestion, self._add),
            "raid-replace": Handler(ReplaceQuestion, self._replace),
            "raid-scrub": Handler(ScrubQuestion, self._scrub),
            "raid-grow": Handler(GrowQuestion, self._grow),
        }

    async def _status(self, question: RaidStatusQuestion) -> list[RaidReport]:
        if question.name is None:
            return [report_of(one) for one in self._registry if array_of(one.namespace) is not None]
        return [report_of(self._registry.named(question.name))]

    async def _fail(self, question: MemberQuestion) -> RaidReport:
        async with self._changing(question.name) as (served, running):
            await running.fail(question.member)
        return report_of(served)

    async def _remove(self, question: MemberQuestion) -> RaidReport:
        async with self._changing(question.name) as (served, running):
            await running.remove(question.member)
        return report_of(served)

    async def _add(self, question: MemberQuestion) -> RaidReport:
        async with self._changing(question.name) as (served, running):
            await self._refuse_ourselves(question.member)
            await running.add(question.member)
        return report_of(served)

    async def _replace(self, question: ReplaceQuestion) -> RaidReport:
        async with self._changing(question.name) as (served, running):
            await self._refuse_ourselves(question.new)
            await running.replace(question.old, question.new)
        return report_of(served)

    async def _scrub(self, question: ScrubQuestion) -> RaidReport:
        async with self._changing(question.name) as (served, running):
            if question.stop:
                running.stop_scrub()
            else:
                running.scrub(repair=question.repair)
        return report_of(served)

    async def _grow(self, question: GrowQuestion) -> RaidReport:
        async with self._changing(question.name) as (served, running):
            if not isinstance(running, Growable):
                raise PmblkError(
                    f"{served.name} cannot grow",
                    hint="make a larger array, and copy what is on this one",
                )
            for place in question.add:
                await self._refuse_ourselves(place)
            running.resized = partial(self._resized, served)  # if data have to move first
            await running.grow(size=question.size, add=question.add)
            self._resized(served)
        return report_of(served)

    @contextlib.asynccontextmanager
    async def _changing(self, name: str) -> AsyncIterator[tuple[Served, Running]]:
        """A member that fails at what is asked is work that failed; a refusal is a wrong use."""
        served = self._registry.named(name)
        running = running_of(served.namespace)
        with served.used():
            async with self._one_at_a_time:
                try:
                    yield served, running
                except PmblkError as error:
                    if isinstance(error.__cause__, OSError):
                        raise WorkFailed(error.message, hint=error.hint) from error
                    raise

    async def _refuse_ourselves(self, place: str) -> None:
        """A member of our own would have us wait for ourselves. Raises PmblkError."""
        if self._mountpoint is None or not place.startswith("/"):
            return
        # In a thread: the path may lie on our own mount, which this loop serves.
        ours = await trio.to_thread.run_sync(
            preflight.is_served_by_us, Path(place), self._mountpoint, abandon_on_cancel=True
        )
        if ours:
            raise PmblkError(f"{place} is served by this very daemon", hint="choose another one")


def report_of(served: Served) -> RaidReport:
    """Raises PmblkError for a namespace that is no array."""
    return RaidReport(name=served.name, status=running_of(served.namespace).status())
