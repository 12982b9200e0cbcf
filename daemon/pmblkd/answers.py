"""What the control socket answers about namespaces, and does to them.

The commands that change the whole service are `pmblkd.service`'s.
"""

from functools import partial
from pathlib import Path

import msgspec
import trio

from pmblk import Namespace, PmblkError, description, saving, switching
from pmblk.media.target import open_target
from pmblk.nvme.data_pointer import PrpList, Sgl
from pmblk.pages import PAGE_BYTES, span
from pmblk.representations import Representation
from pmblkd.config import Config, parse_representation
from pmblkd.control import Handler
from pmblkd.errors import RepresentationError, WorkFailed
from pmblkd.fuse.pyfuse3_engine import Pyfuse3Engine
from pmblkd.listen import Address, UnixAddress
from pmblkd.nbd.wire import PAYLOAD_BYTES_MAX
from pmblkd.questions import NamespaceQuestion, RangeQuestion, SaveQuestion, SwitchQuestion
from pmblkd.registry import Device, Registry
from pmblkd.reports import (
    DescriptionReport,
    FuseReport,
    NamespaceReport,
    PoisonReport,
    PrpReport,
    RepresentationReport,
    Run,
    SaveReport,
    SglReport,
    StatsReport,
    SwitchReport,
)

DESCRIBE_BYTES_MAX = PAYLOAD_BYTES_MAX  # the longest I/O that a client can ask for


class Answers:
    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def handlers(self) -> dict[str, Handler]:
        return {
            "stats": Handler(NamespaceQuestion, self._stats),
            "switch": Handler(SwitchQuestion, self._switch),
            "describe": Handler(RangeQuestion, self._describe),
            "poison": Handler(RangeQuestion, self._poison),
            "save": Handler(SaveQuestion, self._save),
        }

    async def _stats(self, question: NamespaceQuestion) -> StatsReport:
        namespace = self._find(question.name)
        representation = namespace.representation
        resident = await trio.to_thread.run_sync(representation.resident_bytes)
        counters = representation.costs()
        counters.metadata_resident_bytes = resident
        return StatsReport(
            name=namespace.name,
            representation=represented(representation),
            namespace_counters=namespace.counters,
            representation_counters=counters,
        )

    async def _switch(self, question: SwitchQuestion) -> SwitchReport:
        try:
            options = parse_representation(question.kind, question.options, strict=False)
        except RepresentationError as error:
            place = f"{question.kind}.{error.option}: " if error.option else ""
            raise PmblkError(f"{place}{error.message}", hint=error.hint) from None
        with self._registry.named(question.name).used() as namespace:
            return await switch(namespace, question.kind, options)

    async def _describe(self, question: RangeQuestion) -> DescriptionReport:
        namespace = self._find(question.name)
        if question.length > DESCRIBE_BYTES_MAX:
            raise PmblkError(
                f"{question.length} bytes are more than one I/O",
                hint=f"at most {DESCRIBE_BYTES_MAX >> 20}MiB",
            )
        return described(
            namespace, description.describe(namespace, question.offset, question.length)
        )

    async def _poison(self, question: RangeQuestion) -> PoisonReport:
        namespace = self._find(question.name)
        namespace.poison(question.offset, question.length)
        first, count = span(question.offset, question.length)
        end = min((first + count) * PAGE_BYTES, namespace.size)
        offset = first * PAGE_BYTES
        return PoisonReport(name=namespace.name, offset=offset, length=end - offset)

    async def _save(self, question: SaveQuestion) -> SaveReport:
        with self._registry.named(question.name).used() as namespace:
            # In a thread: the target may lie on our own mount, which this loop serves.
            opened = partial(open_target, needed_bytes=namespace.size)
            target = await trio.to_thread.run_sync(opened, Path(question.target))
            try:
                saved = await saving.save(namespace, target)
            except PmblkError as error:
                raise WorkFailed(error.message, hint=error.hint) from error
            finally:
                with trio.CancelScope(shield=True):  # a close that is lost is a descriptor lost
                    await trio.to_thread.run_sync(target.close)
        return SaveReport(
            name=question.name, target=question.target, **msgspec.structs.asdict(saved)
        )

    def _find(self, name: str) -> Namespace:
        return self._registry.named(name).namespace


def namespace_report(device: Device, config: Config, fuse: Pyfuse3Engine | None) -> NamespaceReport:
    """`config` is the one in force; `fuse` None where nothing is mounted."""
    namespace, media = device.namespace, device.namespace.media
    addresses = config.nbd.addresses if config.nbd is not None else []
    return NamespaceReport(
        name=device.name,
        path=str(media.path),
        size=namespace.size,
        allocated=media.allocated_bytes(),
        lba_size=namespace.lba_bytes,
        read_only=namespace.read_only,
        reserve=media.reserve_bytes,
        representation=represented(namespace.representation),
        durability=media.durability.level,
        durability_reason=media.durability.reason,
        punches_holes=media.punches,
        nbd=[_uri(address, device.name) for address in addresses],
        fuse=_fuse_report(device, config, fuse),
        users=device.users,
        draining=device.draining,
    )


def _fuse_report(device: Device, config: Config, fuse: Pyfuse3Engine | None) -> FuseReport | None:
    if config.fuse is None or fuse is None:
        return None
    path = Path(config.fuse.mountpoint) / device.name
    return FuseReport(path=str(path), engine=fuse.name, discards=fuse.discards)


def _uri(address: Address, name: str) -> str:
    """The NBD URI of an export (doc/uri.md of the NBD project)."""
    if isinstance(address, UnixAddress):
        return f"nbd+unix:///{name}?socket={address.path}"
    host = f"[{address.host}]" if ":" in address.host else address.host
    return f"nbd://{host}:{address.port}/{name}"


async def switch(namespace: Namespace, kind: str, options: Representation.Options) -> SwitchReport:
    """Raises WorkFailed, and then the old representation serves on."""
    before = represented(namespace.representation)
    try:
        switched = await switching.switch(namespace, kind, options)
    except PmblkError as error:
        raise WorkFailed(error.message, hint=error.hint) from error
    return SwitchReport(
        name=namespace.name,
        before=before,
        after=represented(namespace.representation),
        build_seconds=switched.build_seconds,
        pause_seconds=switched.pause_seconds,
    )


def represented(representation: Representation) -> RepresentationReport:
    options = msgspec.to_builtins(representation.options)
    return RepresentationReport(kind=representation.kind, options=options)


def described(namespace: Namespace, found: description.Description) -> DescriptionReport:
    return DescriptionReport(
        name=namespace.name,
        representation=represented(namespace.representation),
        offset=found.offset,
        length=found.length,
        hole_bytes=found.hole_bytes,
        descriptors=found.descriptors,
        descriptor_bytes=found.descriptor_bytes,
        runs=[Run(address=run.address, length=run.length) for run in found.runs],
        list_address=description.LIST_ADDRESS,
        prps=None if found.prps is None else _prps(found.prps),
        prp_refusal=found.prp_refusal,
        sgl=None if found.sgl is None else _sgl(found.sgl),
        linux_uses_sgl=found.linux_uses_sgl,
    )


def _prps(prps: PrpList) -> PrpReport:
    return PrpReport(
        prp1=prps.prp1,
        prp2=prps.prp2,
        entries=prps.entries,
        data_pointer=prps.data_pointer.hex(),
        pages=[page.hex() for page in prps.pages],
    )


def _sgl(sgl: Sgl) -> SglReport:
    return SglReport(
        descriptors=[Run(address=run.address, length=run.length) for run in sgl.descriptors],
        data_pointer=sgl.data_pointer.hex(),
        segment=sgl.segment.hex(),
    )
