"""What the daemon says on its control socket: one type an answer, for both ends and for `--json`.

The reports of attaching and detaching are the command line's own: the daemon knows of neither.

Sizes are bytes, times are seconds. A field that is added is no break; one that changes is.
"""

from typing import Any

import msgspec

from pmblk.counters import Counters
from pmblk.representations import RepresentationCounters


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """An answer; JSON objects have its fields as keys."""


class RepresentationReport(Report, frozen=True):
    """Which kind serves a namespace, and with which options (all of them, defaults too)."""

    kind: str
    options: dict[str, Any]


class FuseReport(Report, frozen=True):
    """The namespace's file. `discards`: whether the engine delivers them.

    `dax`: the way of its bytes when it is opened next ("dax", "fast", "off"), and why not another.
    """

    path: str
    engine: str
    discards: bool
    dax: str
    dax_reason: str


class ArrayReport(Report, frozen=True):
    """What `pmblk list` says of an array; `pmblk raid status` says the rest.

    `state` is clean, active, degraded or failed; `absent` counts slots with no member to read from.
    """

    level: int
    layout: str
    members: int
    absent: int
    state: str


class NamespaceReport(Report, frozen=True):
    """One namespace, as `pmblk list` shows it. `nbd` are URIs.

    An array has no `path` (it is empty) and no `representation`; the others have no `array`.
    `users` are NBD connections and open files; a `draining` namespace takes no new ones. `failure`
    is what became of its media; null while all is well.
    """

    name: str
    path: str
    size_bytes: int
    allocated_bytes: int
    lba_bytes: int
    read_only: bool
    reserve_bytes: int
    representation: RepresentationReport | None
    durability: str
    durability_reason: str
    punches_holes: bool
    nbd: list[str]
    fuse: FuseReport | None
    users: int
    draining: bool
    failure: str | None
    array: ArrayReport | None = None


class StatsReport(Report, frozen=True):
    """Counters since the namespace was opened, and since its representation took over.

    An array has what went over its members in place of a representation.
    """

    name: str
    representation: RepresentationReport | None
    namespace_counters: Counters
    representation_counters: RepresentationCounters | None
    array: ArrayReport | None = None
    member_read_bytes: int = 0
    member_write_bytes: int = 0


class SwitchReport(Report, frozen=True):
    """A representation has taken over. Clients waited for `pause_seconds`, and for no more."""

    name: str
    before: RepresentationReport
    after: RepresentationReport
    build_seconds: float
    pause_seconds: float


class Run(Report, frozen=True):
    """Contiguous memory; the address is one of the daemon's address space."""

    address: int
    length: int


class PrpReport(Report, frozen=True):
    """The data pointer of an I/O as PRP entries; the list's pages as hex, as a controller reads."""

    prp1: int
    prp2: int
    entries: int
    data_pointer: str
    pages: list[str]


class SglReport(Report, frozen=True):
    """The data pointer of an I/O as SGL descriptors; `segment` and `data_pointer` are hex."""

    descriptors: list[Run]
    data_pointer: str
    segment: str


class DescriptionReport(Report, frozen=True):
    """How the representation describes the memory under one I/O (`pmblk.description`).

    `list_address` is the made-up one of the PRP list or the SGL segment. `prps` is None where PRPs
    cannot express it, and then `prp_refusal` says why.
    """

    name: str
    representation: RepresentationReport
    offset: int
    length: int
    hole_bytes: int
    descriptors: int
    descriptor_bytes: int
    runs: list[Run]
    list_address: int
    prps: PrpReport | None
    prp_refusal: str
    sgl: SglReport | None
    linux_uses_sgl: bool


class PoisonReport(Report, frozen=True):
    """The whole pages that are bad now because of this command."""

    name: str
    offset: int
    length: int


class SaveReport(Report, frozen=True):
    """A namespace was copied. `copied_bytes` are what its representation copied on the way."""

    name: str
    target: str
    written_bytes: int
    hole_bytes: int
    copied_bytes: int
    seconds: float


class AttachReport(Report, frozen=True):
    """A namespace is a block device of this machine."""

    name: str
    device: str


class DetachReport(Report, frozen=True):
    """The block devices of a namespace that are gone now; none where it was not attached."""

    name: str
    devices: list[str]


class Refusal(Report, frozen=True):
    """What was not done, and why: a change of the config, by its key; a device that was kept."""

    key: str
    reason: str


class DetachAllReport(Report, frozen=True):
    """The block devices that are gone now, and those that are not, with what to do about them.

    `unmounted` are dead mounts that were taken away, `aborted` those of a daemon that hung.
    """

    devices: list[str]
    unmounted: list[str]
    aborted: list[str]
    refused: list[Refusal]


class ReloadReport(Report, frozen=True):
    """What a reload did, by namespace or by key of the config.

    `removed` are gone; `draining` take no new users and go when their last one leaves.
    """

    added: list[str]
    removed: list[str]
    draining: list[str]
    switched: list[SwitchReport]
    grown: list[str]
    changed: list[str]
    refused: list[Refusal]
