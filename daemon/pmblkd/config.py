"""The config file: TOML to typed tables, and every rule about them. Pure but for reading the file.

An unknown key, a wrong type or a rule that is broken is a `ConfigError` with the file, the key and
a hint; what msgspec finds is worded in `config_words`. Whether the world is as the config says
(directories, sockets, mounts) is `preflight`'s.
"""

import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec.structs import replace

from pmblk.media.reserve import FILE_UNIT_BYTES, reserve_bytes
from pmblk.representations import KINDS, Representation, needs_reserve, parse_options
from pmblk.units import parse_size
from pmblkd import config_words
from pmblkd.errors import ConfigError, RepresentationError, did_you_mean
from pmblkd.links import without_links
from pmblkd.listen import Address, UnixAddress, parse_address
from pmblkd.overrides import apply_override

RUNTIME_DIRECTORY = Path("/run/pmblk")
STOP_SECONDS_MAX = 3600
SIZE_MAX = 64 << 40  # what one process can map
REQUEST_TIMEOUT_SECONDS_MAX = 65535  # the field has 16 bits
MOUNT_OPTIONS = ("noatime", "noexec", "ro")
MODE = re.compile(r"0?[0-7]{3}")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


Dax = Literal["auto", "fast", "off"]
FuseEngine = Literal["auto", "kernel", "pyfuse3"]


class _Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the config file; its fields are the keys."""


class NamespaceConfig(_Table, frozen=True):
    """`[[namespace]]`: one device.

    `reserve`: keep the last 1/64 of the file for a page table on the device, so that struct-page
    with memmap = "device" can be switched to. The device has 63/64 of `size` then.
    `dax`: whether clients of the FUSE file map the media themselves (`pmblkd.fuse.dax`).
    """

    name: str
    path: str
    size: str | int | None = None
    lba_size: int = 4096
    read_only: bool = False
    reserve: bool = False
    dax: Dax = "auto"
    representation: str | dict[str, Any] = "extent"

    @property
    def file(self) -> Path:
        return Path(self.path)

    @property
    def size_bytes(self) -> int | None:
        return None if self.size is None else parse_size(self.size)

    def served_bytes(self) -> int:
        """The device's size, as far as the config and its file tell; 0 while there is none."""
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


class NbdConfig(_Table, frozen=True):
    """`[nbd]`: every namespace is an export of its name."""

    listen: list[str]
    default: str | None = None
    max_connections: int = 64

    @property
    def addresses(self) -> list[Address]:
        return [parse_address(text) for text in self.listen]


class FuseConfig(_Table, frozen=True):
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


class ControlConfig(_Table, frozen=True):
    """`[control]`: the socket that `pmblk list` and `pmblk attach` talk to."""

    socket: str = str(RUNTIME_DIRECTORY / "control.sock")


class DaemonConfig(_Table, frozen=True):
    """`[daemon]`: the process itself."""

    stop_seconds: float = 20.0
    busy_poll_us: int = 30
    log_level: str = "info"


class Config(_Table, frozen=True):
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


_TABLES: dict[str, type[_Table]] = {
    "": Config,
    "namespace": NamespaceConfig,
    "nbd": NbdConfig,
    "fuse": FuseConfig,
    "control": ControlConfig,
    "daemon": DaemonConfig,
}


def load(file: Path, overrides: Sequence[str] = ()) -> Config:
    """Read, override and check. `overrides` are `key=value` with a dotted key (`nbd.default=a`).

    Raises ConfigError for the first thing that is wrong.
    """
    try:
        with file.open("rb") as stream:
            raw = tomllib.load(stream)
    except OSError as error:
        raise ConfigError(file, "", f"cannot read it: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(file, "", f"not TOML: {error}") from error
    for override in overrides:
        apply_override(raw, override)
    try:
        config = msgspec.convert(raw, Config)
    except msgspec.ValidationError as error:
        raise config_words.explain(file, raw, _TABLES, str(error)) from None
    _check(file, config)
    if config.fuse is None:
        return config
    place = str(without_links(Path(config.fuse.mountpoint)))
    return replace(config, fuse=replace(config.fuse, mountpoint=place))


# ---- rules that types cannot say


def _check(file: Path, config: Config) -> None:
    def wrong(key: str, message: str, hint: str = "") -> ConfigError:
        return ConfigError(file, key, message, hint=hint)

    if not config.namespace:
        raise wrong("namespace", "there is none", "add a [[namespace]] table")
    names: dict[str, int] = {}
    for index, namespace in enumerate(config.namespace):
        place = f"namespace[{index}]"
        _check_namespace(file, place, namespace)
        if names.setdefault(namespace.name, index) != index:
            raise wrong(f"{place}.name", f'a second "{namespace.name}"', "names are unique")
    if config.nbd is None and config.fuse is None:
        raise wrong("", "nothing is exported", "add [nbd] with listen, or [fuse] with mountpoint")
    _check_daemon(file, config)
    _check_exports(file, config, list(names))


def _check_namespace(file: Path, place: str, namespace: NamespaceConfig) -> None:
    def wrong(key: str, message: str, hint: str = "") -> ConfigError:
        return ConfigError(file, f"{place}.{key}", message, hint=hint)

    if not NAME.fullmatch(namespace.name):
        raise wrong(
            "name",
            f'"{namespace.name}" cannot be a name',
            "letters, digits, dot, dash and underscore; it is also a file's name",
        )
    if not namespace.path.startswith("/") or "\0" in namespace.path:
        raise wrong("path", f"{namespace.path!r} is not an absolute path", "start it with /")
    if namespace.lba_size not in (512, 4096):
        raise wrong("lba_size", f"{namespace.lba_size} is no LBA size", "choose 512 or 4096")
    try:
        size = namespace.size_bytes
    except ValueError as error:
        raise wrong("size", str(error), 'e.g. "1GiB"') from None
    if size == 0:
        raise wrong("size", "0 is too small", f"at least {namespace.lba_size}, one block")
    if size is not None and size > SIZE_MAX:
        raise wrong("size", f"{namespace.size} is too large", "at most 64TiB")
    if size is not None and size % namespace.lba_size:
        nearest = size // namespace.lba_size * namespace.lba_size or namespace.lba_size
        raise wrong(
            "size",
            f"{size} bytes are no multiple of lba_size {namespace.lba_size}",
            f"{nearest} would be",
        )
    _check_representation(file, f"{place}.representation", namespace)
    if size is not None and namespace.with_reserve and size % FILE_UNIT_BYTES:
        raise wrong(
            "size",
            f"1/64 of {size} bytes, the reserve, is no whole number of pages",
            "choose a multiple of 256KiB",
        )


def _check_representation(file: Path, place: str, namespace: NamespaceConfig) -> None:
    try:
        representation_options(namespace)
    except RepresentationError as error:
        key = f"{place}.{error.option}" if error.option else place
        raise ConfigError(file, key, error.message, hint=error.hint) from None


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


def _check_exports(file: Path, config: Config, names: list[str]) -> None:
    nbd = config.nbd
    if nbd is not None:
        if not nbd.listen:
            raise ConfigError(
                file, "nbd.listen", "is empty", hint='e.g. ["unix:/run/pmblk/nbd.sock"]'
            )
        for index, text in enumerate(nbd.listen):
            try:
                parse_address(text)
            except ValueError as error:
                raise ConfigError(file, f"nbd.listen[{index}]", str(error)) from None
        if len(set(nbd.listen)) < len(nbd.listen):
            raise ConfigError(file, "nbd.listen", "names an address twice", hint="name each once")
        if nbd.default is not None and nbd.default not in names:
            raise ConfigError(
                file,
                "nbd.default",
                f"no namespace {nbd.default}",
                hint=did_you_mean(nbd.default, names),
            )
        if nbd.max_connections < 1:
            raise ConfigError(
                file,
                "nbd.max_connections",
                f"{nbd.max_connections} is too small",
                hint="64 is the default",
            )
    if config.fuse is not None:
        mountpoint = config.fuse.mountpoint
        if not mountpoint.startswith("/") or "\0" in mountpoint:
            raise ConfigError(
                file,
                "fuse.mountpoint",
                f"{mountpoint!r} is not an absolute path",
                hint="start it with /",
            )
        _check_fuse(file, config.fuse)
    _check_paths(file, config)


def _check_fuse(file: Path, fuse: FuseConfig) -> None:
    if not MODE.fullmatch(fuse.mode):
        raise ConfigError(
            file, "fuse.mode", f'"{fuse.mode}" is no file mode', hint='in octal, e.g. "0660"'
        )
    for index, option in enumerate(fuse.options):
        if option not in MOUNT_OPTIONS:
            raise ConfigError(
                file,
                f"fuse.options[{index}]",
                f'"{option}" is not known',
                hint="choose from " + ", ".join(MOUNT_OPTIONS),
            )
    if not 0 <= fuse.request_timeout_seconds <= REQUEST_TIMEOUT_SECONDS_MAX:
        raise ConfigError(
            file,
            "fuse.request_timeout_seconds",
            f"{fuse.request_timeout_seconds} cannot be",
            hint=f"0 (never) to {REQUEST_TIMEOUT_SECONDS_MAX}",
        )


def _check_paths(file: Path, config: Config) -> None:
    """One path, one thing: media, sockets and the mountpoint never share one."""
    paths = [(f"namespace[{i}].path", one.file) for i, one in enumerate(config.namespace)]
    paths += [(key, one.path) for key, one in config.sockets if isinstance(one, UnixAddress)]
    if config.fuse is not None:
        paths.append(("fuse.mountpoint", Path(config.fuse.mountpoint)))
    owners: dict[Path, str] = {}
    for key, path in paths:
        owner = owners.setdefault(path, key)
        if owner != key and not (owner.startswith("namespace") and key.startswith("namespace")):
            raise ConfigError(
                file, key, f"{path} is {owner} already", hint="give each a path of its own"
            )


def _check_daemon(file: Path, config: Config) -> None:
    daemon = config.daemon
    if not 0 < daemon.stop_seconds <= STOP_SECONDS_MAX:
        raise ConfigError(
            file,
            "daemon.stop_seconds",
            f"{daemon.stop_seconds:g} is out of range",
            hint=f"more than 0, at most {STOP_SECONDS_MAX}",
        )
    if not 0 <= daemon.busy_poll_us <= 1000:
        raise ConfigError(
            file,
            "daemon.busy_poll_us",
            f"{daemon.busy_poll_us} is out of range",
            hint="0 (off) to 1000",
        )
    levels = ("debug", "info", "warning", "error")
    if daemon.log_level not in levels:
        hint = did_you_mean(daemon.log_level, levels)
        raise ConfigError(file, "daemon.log_level", "no such level", hint=hint)
    try:
        parse_address(f"unix:{config.control.socket}")
    except ValueError:
        raise ConfigError(
            file,
            "control.socket",
            f"{config.control.socket} cannot be a socket's path",
            hint="an absolute path of at most 107 bytes",
        ) from None
