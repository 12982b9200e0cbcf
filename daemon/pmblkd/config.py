"""The config file: TOML to typed tables, and every rule about them. Pure but for reading the file.

An unknown key, a wrong type or a rule that is broken is a `ConfigError` with the file, the key and
a hint; what msgspec finds is worded in `config_words`. Whether the world is as the config says
(directories, sockets, mounts) is `preflight`'s.
"""

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
from msgspec.structs import replace

from pmblk.media.reserve import FILE_UNIT_BYTES
from pmblk.units import parse_size
from pmblkd import config_words
from pmblkd.config_tables import (
    RUNTIME_DIRECTORY,
    Config,
    ControlConfig,
    DaemonConfig,
    Dax,
    FuseConfig,
    NamespaceConfig,
    NbdConfig,
    RaidConfig,
    Table,
    parse_representation,
    representation_options,
)
from pmblkd.errors import ConfigError, RepresentationError, did_you_mean
from pmblkd.links import without_links
from pmblkd.listen import UnixAddress, parse_address
from pmblkd.overrides import apply_override

__all__ = [
    "RUNTIME_DIRECTORY",
    "Config",
    "ControlConfig",
    "DaemonConfig",
    "Dax",
    "FuseConfig",
    "NamespaceConfig",
    "NbdConfig",
    "RaidConfig",
    "keys_of_places",
    "load",
    "parse_representation",
    "representation_options",
]

STOP_SECONDS_MAX = 3600
SIZE_MAX = 64 << 40  # what one process can map
REQUEST_TIMEOUT_SECONDS_MAX = 65535  # the field has 16 bits
MOUNT_OPTIONS = ("noatime", "noexec", "ro")
MODE = re.compile(r"0?[0-7]{3}")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MEMBER_TIMEOUT_SECONDS_MAX = 3600
# What is said of a file in memory, and has no meaning for an array.
OF_FILES = ("path", "size", "reserve", "representation", "dax")
NBD_SCHEMES = ("nbd://", "nbds://", "nbd+unix://", "nbds+unix://")

_TABLES: dict[str, type[Table]] = {
    "": Config,
    "namespace": NamespaceConfig,
    "namespace.raid": RaidConfig,
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
    _check_arrays(file, raw, config)
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
    if namespace.lba_size not in (512, 4096):
        raise wrong("lba_size", f"{namespace.lba_size} is no LBA size", "choose 512 or 4096")
    if namespace.raid is not None:
        _check_raid(file, f"{place}.raid", namespace.raid)
        return
    if not namespace.path.startswith("/") or "\0" in namespace.path:
        raise wrong("path", f"{namespace.path!r} is not an absolute path", "start it with /")
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


def _check_arrays(file: Path, raw: dict[str, Any], config: Config) -> None:
    """A namespace has a file, or members: what says both ways, or neither, means nothing."""
    for index, namespace in enumerate(config.namespace):
        keys = raw["namespace"][index]
        place = f"namespace[{index}]"
        if namespace.raid is None:
            if "path" not in keys:
                hint = "add path = ..., or a [namespace.raid] table with members"
                raise ConfigError(file, f"{place}.path", "missing", hint=hint)
            continue
        for key in OF_FILES:
            if key in keys:
                raise ConfigError(
                    file,
                    f"{place}.{key}",
                    "the namespace is an array",
                    hint=f"leave {key} out, or [namespace.raid]",
                )


def _check_raid(file: Path, place: str, raid: RaidConfig) -> None:
    def wrong(key: str, message: str, hint: str) -> ConfigError:
        return ConfigError(file, f"{place}.{key}", message, hint=hint)

    if not raid.members:
        raise wrong("members", "is empty", "name each member by its path or NBD URI")
    for index, member in enumerate(raid.members):
        if not member.startswith(("/", *NBD_SCHEMES)) or "\0" in member:
            hint = "an absolute path, or nbd://, nbds://, nbd+unix:// or nbds+unix://"
            raise wrong(f"members[{index}]", f"{member!r} is no place of a member", hint)
        if member in raid.members[:index]:
            raise wrong(f"members[{index}]", f"a second {member}", "name each member once")
    if raid.array is not None:
        try:
            UUID(raid.array)
        except ValueError:
            hint = "pmblk raid examine shows it"
            raise wrong("array", f"{raid.array!r} is no UUID", hint) from None
    if not 0 < raid.member_timeout_seconds <= MEMBER_TIMEOUT_SECONDS_MAX:
        raise wrong(
            "member_timeout_seconds",
            f"{raid.member_timeout_seconds:g} is out of range",
            f"more than 0, at most {MEMBER_TIMEOUT_SECONDS_MAX}",
        )
    _check_pace(file, place, raid)


def _check_pace(file: Path, place: str, raid: RaidConfig) -> None:
    for key in ("sweep_max", "sweep_min"):
        try:
            parse_size(getattr(raid, key))
        except ValueError as error:
            hint = 'a size for each second, e.g. "200MiB"'
            raise ConfigError(file, f"{place}.{key}", str(error), hint=hint) from None
    if 0 < raid.sweep_max_bytes < raid.sweep_min_bytes:
        raise ConfigError(
            file, f"{place}.sweep_max", "is less than sweep_min", hint="0 is no limit"
        )


def _check_representation(file: Path, place: str, namespace: NamespaceConfig) -> None:
    try:
        representation_options(namespace)
    except RepresentationError as error:
        key = f"{place}.{error.option}" if error.option else place
        raise ConfigError(file, key, error.message, hint=error.hint) from None


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


def keys_of_places(table: str, namespace: NamespaceConfig) -> list[tuple[str, str]]:
    """Where its bytes are, each with its key."""
    if namespace.raid is None:
        return [(f"{table}.path", namespace.path)]
    members = enumerate(namespace.raid.members)
    return [(f"{table}.raid.members[{number}]", member) for number, member in members]


def _check_paths(file: Path, config: Config) -> None:
    """One path, one thing: media, sockets and the mountpoint never share one."""
    paths = [
        (key, Path(place))
        for index, one in enumerate(config.namespace)
        for key, place in keys_of_places(f"namespace[{index}]", one)
        if place.startswith("/")
    ]
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
