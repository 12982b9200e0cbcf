"""Reports made of what they are about. Nothing is asked or changed here.

`pmblkd.reports` has the types; who asks for them is the control socket (`pmblkd.answers`), and a
reload that says what it did (`pmblkd.reloader`).
"""

from pathlib import Path

import msgspec

from pmblk import Namespace
from pmblk.description import LIST_ADDRESS, Description
from pmblk.nvme import data_pointer
from pmblk.nvme.data_pointer import PrpList, Sgl
from pmblk.representations import Representation
from pmblk.switching import Switched
from pmblkd.config import Config
from pmblkd.fuse.engine import Engine
from pmblkd.listen import Address, UnixAddress
from pmblkd.registry import Served
from pmblkd.reports import (
    DescriptionReport,
    FuseReport,
    NamespaceReport,
    PrpReport,
    RepresentationReport,
    Run,
    SglReport,
    SwitchReport,
)


def namespace(served: Served, config: Config, fuse: Engine | None) -> NamespaceReport:
    """`config` is the one in force; `fuse` None where nothing is mounted."""
    namespace, media = served.namespace, served.namespace.media
    addresses = config.nbd.addresses if config.nbd is not None else []
    return NamespaceReport(
        name=served.name,
        path=str(media.path),
        size_bytes=namespace.size,
        allocated_bytes=media.allocated_bytes(),
        lba_bytes=namespace.lba_bytes,
        read_only=namespace.read_only,
        reserve_bytes=media.reserve_bytes,
        representation=representation(namespace.representation),
        durability=media.durability.level,
        durability_reason=media.durability.reason,
        punches_holes=media.punches,
        nbd=[uri(address, served.name) for address in addresses],
        fuse=_fuse_report(served, config, fuse),
        users=served.users,
        draining=served.draining,
        failure=namespace.failure() or None,
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
