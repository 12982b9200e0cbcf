"""Reports made of what they are about. Nothing is asked or changed here.

`pmblkd.reports` has the types; who asks for them is the control socket (`pmblkd.answers`), and a
reload that says what it did (`pmblkd.reloader`).
"""

from pathlib import Path

import msgspec

from pmblk import BlockDevice, Namespace
from pmblk.description import LIST_ADDRESS, Description
from pmblk.namespace import in_memory
from pmblk.nvme import data_pointer
from pmblk.nvme.data_pointer import PrpList, Sgl
from pmblk.raid.status import ArrayStatus
from pmblk.representations import Representation
from pmblk.switching import Switched
from pmblk.volume import array_of, running_of
from pmblkd.config import Config
from pmblkd.fuse.engine import Engine
from pmblkd.listen import Address, UnixAddress
from pmblkd.registry import Served
from pmblkd.reports import (
    ArrayReport,
    DescriptionReport,
    FuseReport,
    NamespaceReport,
    PrpReport,
    RepresentationReport,
    Run,
    SglReport,
    StatsReport,
    SwitchReport,
)


def namespace(served: Served, config: Config, fuse: Engine | None) -> NamespaceReport:
    """`config` is the one in force; `fuse` None where nothing is mounted."""
    namespace = served.namespace
    memory = in_memory(namespace)
    level, reason = namespace.durability
    addresses = config.nbd.addresses if config.nbd is not None else []
    return NamespaceReport(
        name=served.name,
        path="" if memory is None else str(memory.media.path),
        size_bytes=namespace.size,
        allocated_bytes=namespace.allocated_bytes(),
        lba_bytes=namespace.lba_bytes,
        read_only=namespace.read_only,
        reserve_bytes=0 if memory is None else memory.media.reserve_bytes,
        representation=None if memory is None else representation(memory.representation),
        durability=level,
        durability_reason=reason,
        punches_holes=memory is None or memory.media.punches,
        nbd=[uri(address, served.name) for address in addresses],
        fuse=_fuse_report(served, config, fuse),
        users=served.users,
        draining=served.draining,
        failure=namespace.failure() or None,
        array=array(namespace),
    )


def array(device: BlockDevice) -> ArrayReport | None:
    """None for a namespace in memory."""
    running = array_of(device)
    return None if running is None else _array(running.status())


def _array(status: ArrayStatus) -> ArrayReport:
    slots = [member for member in status.members if member.slot is not None]
    return ArrayReport(
        level=status.level,
        layout=status.layout,
        members=len(slots),
        absent=sum(member.state != "active" for member in slots),
        state=status.state,
    )


def _fuse_report(served: Served, config: Config, fuse: Engine | None) -> FuseReport | None:
    if config.fuse is None or fuse is None:
        return None
    path = Path(config.fuse.mountpoint) / served.name
    way, reason = fuse.dax(served)
    return FuseReport(
        path=str(path),
        engine=fuse.name,
        discards=fuse.discards,
        dax=way.value,
        dax_reason=reason,
    )


def uri(address: Address, name: str) -> str:
    """The NBD URI of an export (doc/uri.md of the NBD project)."""
    if isinstance(address, UnixAddress):
        return f"nbd+unix:///{name}?socket={address.path}"
    host = f"[{address.host}]" if ":" in address.host else address.host
    return f"nbd://{host}:{address.port}/{name}"


def representation(representation: Representation) -> RepresentationReport:
    options = msgspec.to_builtins(representation.options)
    return RepresentationReport(kind=representation.kind, options=options)


def array_stats(device: BlockDevice) -> StatsReport:
    """What an array did, and what that was for its members."""
    status = running_of(device).status()
    return StatsReport(
        name=device.name,
        representation=None,
        namespace_counters=device.counters,
        representation_counters=None,
        array=_array(status),
        member_read_bytes=status.member_read_bytes,
        member_write_bytes=status.member_write_bytes,
    )


def switch(namespace: Namespace, before: RepresentationReport, switched: Switched) -> SwitchReport:
    """After a switch; `before` is what served until then."""
    return SwitchReport(
        name=namespace.name,
        before=before,
        after=representation(namespace.representation),
        **msgspec.structs.asdict(switched),
    )


def description(namespace: Namespace, found: Description) -> DescriptionReport:
    fields = msgspec.structs.asdict(found)
    fields["runs"] = _runs(found.runs)
    fields["prps"] = None if found.prps is None else _prps(found.prps)
    fields["sgl"] = None if found.sgl is None else _sgl(found.sgl)
    return DescriptionReport(
        name=namespace.name,
        representation=representation(namespace.representation),
        list_address=LIST_ADDRESS,
        **fields,
    )


def _runs(runs: list[data_pointer.Run]) -> list[Run]:
    return [Run(**msgspec.structs.asdict(run)) for run in runs]


def _prps(prps: PrpList) -> PrpReport:
    fields = msgspec.structs.asdict(prps)
    fields["pages"] = [page.hex() for page in prps.pages]
    return PrpReport(data_pointer=prps.data_pointer.hex(), **fields)


def _sgl(sgl: Sgl) -> SglReport:
    return SglReport(
        descriptors=_runs(sgl.descriptors),
        data_pointer=sgl.data_pointer.hex(),
        segment=sgl.segment.hex(),
    )
