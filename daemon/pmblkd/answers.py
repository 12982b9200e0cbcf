"""What the control socket answers about namespaces, and does to them.

The commands that change the whole service are `pmblkd.service`'s.
"""

from functools import partial
from pathlib import Path

import msgspec
import trio

from pmblk import Namespace, PmblkError, description, saving
from pmblk.media.target import Target, open_target
from pmblk.namespace import in_memory, memory_of
from pmblk.pages import PAGE_BYTES, span
from pmblkd import loop, report_of, switches
from pmblkd.config import parse_representation
from pmblkd.control import Handler
from pmblkd.errors import RepresentationError, WorkFailed
from pmblkd.nbd.wire import PAYLOAD_BYTES_MAX
from pmblkd.questions import NamespaceQuestion, RangeQuestion, SaveQuestion, SwitchQuestion
from pmblkd.registry import Registry
from pmblkd.reports import (
    DescriptionReport,
    PoisonReport,
    SaveReport,
    StatsReport,
    SwitchReport,
)

CLOSE_SECONDS = 5  # then the device has it
DESCRIBE_BYTES_MAX = PAYLOAD_BYTES_MAX  # the longest I/O that a client can ask for


class Answers:
    """`mountpoint` is where the files of the daemon are, if anywhere."""

    def __init__(self, registry: Registry, *, mountpoint: Path | None = None) -> None:
        self._registry = registry
        self._mountpoint = mountpoint

    def handlers(self) -> dict[str, Handler]:
        return {
            "stats": Handler(NamespaceQuestion, self._stats),
            "switch": Handler(SwitchQuestion, self._switch),
            "describe": Handler(RangeQuestion, self._describe),
            "poison": Handler(RangeQuestion, self._poison),
            "save": Handler(SaveQuestion, self._save),
        }

    async def _stats(self, question: NamespaceQuestion) -> StatsReport:
        device = self._registry.named(question.name).namespace
        namespace = in_memory(device)
        if namespace is None:
            return report_of.array_stats(device)
        representation = namespace.representation
        costs = representation.costs()  # before the thread: afterwards another one may serve
        resident = await trio.to_thread.run_sync(representation.resident_bytes)
        costs.metadata_resident_bytes = resident
        return StatsReport(
            name=namespace.name,
            representation=report_of.representation(representation),
            namespace_counters=namespace.counters,
            representation_counters=costs,
        )

    async def _switch(self, question: SwitchQuestion) -> SwitchReport:
        try:
            options = parse_representation(question.kind, question.options, strict=False)
        except RepresentationError as error:
            place = f"{question.kind}.{error.option}: " if error.option else ""
            raise PmblkError(f"{place}{error.message}", hint=error.hint) from None
        self._find(question.name, "representation to switch")
        served = self._registry.named(question.name)
        with served.used():
            try:
                return await switches.switch(served, question.kind, options)
            except PmblkError as error:
                raise WorkFailed(error.message, hint=error.hint) from error

    async def _describe(self, question: RangeQuestion) -> DescriptionReport:
        namespace = self._find(question.name, "memory to describe")
        if question.length > DESCRIBE_BYTES_MAX:
            raise PmblkError(
                f"{question.length} bytes are more than one I/O",
                hint=f"at most {DESCRIBE_BYTES_MAX >> 20}MiB",
            )
        found = description.describe(namespace, question.offset, question.length)
        return report_of.description(namespace, found)

    async def _poison(self, question: RangeQuestion) -> PoisonReport:
        namespace = self._find(question.name, "memory that could fail")
        namespace.poison(question.offset, question.length)
        first, count = span(question.offset, question.length)
        end = min((first + count) * PAGE_BYTES, namespace.size)
        offset = first * PAGE_BYTES
        return PoisonReport(name=namespace.name, offset=offset, length=end - offset)

    async def _save(self, question: SaveQuestion) -> SaveReport:
        with self._registry.named(question.name).used() as device:
            namespace = memory_of(device, "memory to save from")
            # In a thread: the target may lie on our own mount, which this loop serves.
            opened = partial(open_target, needed_bytes=namespace.size)
            target = await trio.to_thread.run_sync(
                opened, Path(question.target), abandon_on_cancel=True
            )
            try:
                self._refuse_ourselves(target)
                saved = await saving.save(namespace, target)
            except PmblkError as error:
                raise WorkFailed(error.message, hint=error.hint) from error
            finally:
                with trio.move_on_after(CLOSE_SECONDS, shield=True):
                    await trio.to_thread.run_sync(target.close, abandon_on_cancel=True)
        return SaveReport(
            name=question.name, target=question.target, **msgspec.structs.asdict(saved)
        )

    def _refuse_ourselves(self, target: Target) -> None:
        """A device of our own would have us wait for ourselves."""
        if self._mountpoint is not None and loop.is_on(target.device, self._mountpoint):
            raise PmblkError(
                f"{target.path} is served by this very daemon", hint="choose another target"
            )

    def _find(self, name: str, wanted: str) -> Namespace:
        """Raises PmblkError for a namespace that has no such thing, being an array."""
        return memory_of(self._registry.named(name).namespace, wanted)
