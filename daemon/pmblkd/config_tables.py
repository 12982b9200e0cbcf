"""The tables of the config file, as types: what each key is, and what follows from it. Pure.

Which values are allowed is `pmblkd.config`'s to say.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

import msgspec

from pmblk.media.reserve import reserve_bytes
from pmblk.representations import KINDS, Representation, needs_reserve, parse_options
from pmblk.units import parse_size
from pmblkd import config_words
from pmblkd.errors import RepresentationError, did_you_mean
from pmblkd.listen import Address, UnixAddress, parse_address

RUNTIME_DIRECTORY = Path("/run/pmblk")

Dax = Literal["auto", "fast", "off"]
FuseEngine = Literal["auto", "kernel", "pyfuse3"]


class Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the config file; its fields are the keys."""


class RaidConfig(Table, frozen=True):
    """`[namespace.raid]`: the namespace is an array over `members`, paths or NBD URIs.

    `array` is its UUID, for devices of which some belong to another one. `degraded` lets it start
    with members missing, `force` also where parity may not fit. `sweep_max` and `sweep_min` are
    what a rebuild or a scrub may take in a second, and what it gets while clients are busy.
    """

    members: list[str]
    array: str | None = None
    degraded: bool = False
    force: bool = False
    member_timeout_seconds: float = 30.0
    sweep_max: str | int = "0"
    sweep_min: str | int = "10MiB"

    @property
    def uuid(self) -> UUID | None:
        return None if self.array is None else UUID(self.array)

    @property
    def sweep_max_bytes(self) -> int:
        """0 is no limit."""
        return parse_size(self.sweep_max)

    @property
    def sweep_min_bytes(self) -> int:
        return parse_size(self.sweep_min)


class NamespaceConfig(Table, frozen=True):
    """`[[namespace]]`: one device.

    `reserve`: keep the last 1/64 of the file for a page table on the device, so that struct-page
    with memmap = "device" can be switched to. The device has 63/64 of `size` then.
    `dax`: whether clients of the FUSE file map the media themselves (`pmblkd.fuse.dax`).
    `raid`: it is an array, and has members in place of `path` and all that is said of a file.
    """

    name: str
    path: str = ""
    size: str | int | None = None
    lba_size: int = 4096
    read_only: bool = False
    reserve: bool = False
    dax: Dax = "auto"
    representation: str | dict[str, Any] = "extent"
    raid: RaidConfig | None = None

    @property
    def file(self) -> Path:
        return Path(self.path)

    @property
    def places(self) -> list[str]:
        """Where its bytes are: its file, or the members of its array."""
        return [self.path] if self.raid is None else self.raid.members

    @property
    def size_bytes(self) -> int | None:
        return None if self.size is None else parse_size(self.size)

    def served_bytes(self) -> int:
        """The device's size, as far as the config and its file tell; 0 while there is none."""
        if self.raid is not None:
            return 0
        try:
            size = self.size_bytes or self.file.stat().st_size
        except OSError:
            return 0
        return size - reserve_bytes(size) if self.with_reserve else size

    @property
    def representation_kind(self) -> str:
        chosen = self.representation
        return chosen if isinstance(chosen, str) else str(chosen.get("kind", ""))

    @property
    def representation_options(self) -> dict[str, Any]:
        if isinstance(self.representation, str):
            return {}
        return {key: value for key, value in self.representation.items() if key != "kind"}

    @property
    def with_reserve(self) -> bool:
        """Whether the end of the file is kept for a page table: asked for, or needed at once."""
        return self.reserve or needs_reserve(representation_options(self))


class NbdConfig(Table, frozen=True):
    """`[nbd]`: every namespace is an export of its name."""

    listen: list[str]
    default: str | None = None
    max_connections: int = 64

    @property
    def addresses(self) -> list[Address]:
        return [parse_address(text) for text in self.listen]


class FuseConfig(Table, frozen=True):
    """`[fuse]`: every namespace is a file of its name below the mountpoint.

    `owner` is a user, or user:group, by name or number; None is whoever runs the daemon.
    """

    mountpoint: str
    engine: FuseEngine = "auto"
    allow_other: bool = False
    owner: str | None = None
    mode: str = "0600"
    options: list[str] = []
    punch: bool = False
    request_timeout_seconds: int = 0

    @property
    def mode_bits(self) -> int:
        return int(self.mode, 8)


class ControlConfig(Table, frozen=True):
    """`[control]`: the socket that `pmblk list` and `pmblk attach` talk to."""

    socket: str = str(RUNTIME_DIRECTORY / "control.sock")


class DaemonConfig(Table, frozen=True):
    """`[daemon]`: the process itself."""

    stop_seconds: float = 20.0
    busy_poll_us: int = 30
    log_level: str = "info"


class Config(Table, frozen=True):
    namespace: list[NamespaceConfig]
    nbd: NbdConfig | None = None
    fuse: FuseConfig | None = None
    control: ControlConfig = ControlConfig()
    daemon: DaemonConfig = DaemonConfig()

    @property
    def sockets(self) -> list[tuple[str, Address]]:
        """Every address to listen on, with its key."""
        found: list[tuple[str, Address]] = []
        if self.nbd is not None:
            found += [
                (f"nbd.listen[{index}]", address)
                for index, address in enumerate(self.nbd.addresses)
            ]
        return [*found, ("control.socket", UnixAddress(Path(self.control.socket)))]

    @property
    def needs_runtime_directory(self) -> bool:
        """Whether a socket or the mountpoint lies in /run/pmblk, which the daemon makes itself."""
        paths = [address.path for _, address in self.sockets if isinstance(address, UnixAddress)]
        if self.fuse is not None:
            paths.append(Path(self.fuse.mountpoint))
        return any(path.parent == RUNTIME_DIRECTORY for path in paths)

    @property
    def default_export(self) -> str:
        chosen = self.nbd.default if self.nbd else None
        return chosen or self.namespace[0].name


def representation_options(namespace: NamespaceConfig) -> Representation.Options:
    """The options of the namespace's representation. Raises RepresentationError."""
    return parse_representation(namespace.representation_kind, namespace.representation_options)


def parse_representation(
    kind: str, options: Mapping[str, Any], *, strict: bool = True
) -> Representation.Options:
    """The options as that kind's type; `strict` false takes numbers as text too.

    Raises RepresentationError with what the word was meant to be.
    """
    if kind not in KINDS:
        hint = did_you_mean(kind, list(KINDS))
        raise RepresentationError("", f'"{kind}" is no representation', hint=hint)
    try:
        return parse_options(kind, options, strict=strict)
    except msgspec.ValidationError as error:
        raise config_words.explain_options(kind, options, str(error)) from None
