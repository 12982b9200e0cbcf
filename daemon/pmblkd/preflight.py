"""Is the world as the config says? Looks, and changes nothing.

`serve` runs it before it touches anything, so that a start that cannot succeed leaves no file, no
socket and no mount behind; `check` runs nothing else; a reload looks at what is new. Each finding
is a ConfigError at its key.
"""

import os
import stat
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path

from pmblk import PmblkError
from pmblk.media import syscalls
from pmblk.media.opening import inspect
from pmblk.representations import KINDS
from pmblkd import leftovers, loop, mounts, rights
from pmblkd.config import (
    RUNTIME_DIRECTORY,
    Config,
    FuseConfig,
    NamespaceConfig,
    keys_of_places,
)
from pmblkd.errors import ConfigError
from pmblkd.listen import Address, UnixAddress, check_free
from pmblkd.mappers import MappedAs, on_mount, stays_open, who_maps_media


def check(file: Path, config: Config) -> None:
    """Raises ConfigError for the first thing that is not as it has to be."""
    _check_namespaces(file, config, {})
    _check_sockets(file, config, set())
    if config.fuse is not None:
        _check_mountpoint(file, Path(config.fuse.mountpoint))
        _check_writers(file, config)
        _check_owner(file, config.fuse)


def check_new(
    file: Path,
    config: Config,
    *,
    served: Mapping[str, Sequence[str]],
    listening: Collection[Address],
) -> None:
    """The same for what a reload adds; `served` are the places of this daemon by namespace.

    The tables of FUSE and of the control socket are no part of it: a reload leaves them alone.
    """
    _check_namespaces(file, config, served)
    _check_sockets(file, config, {*listening, UnixAddress(Path(config.control.socket))})
    _check_writers(file, config, served=served)


def _check_namespaces(file: Path, config: Config, served: Mapping[str, Sequence[str]]) -> None:
    owners = {_identity(place): name for name, places in served.items() for place in places}
    names = {namespace.name for namespace in config.namespace}
    for index, namespace in enumerate(config.namespace):
        if namespace.name in served:
            continue
        table = f"namespace[{index}]"
        leaves = False
        for key, place in keys_of_places(table, namespace):
            owner = _own(file, key, place, namespace.name, owners)
            if owner in served and owner not in names:
                leaves = True  # one that leaves has it still: that is the plan's to refuse
                continue
            _check_place(file, config, key, place, owner=owner, name=namespace.name)
        if namespace.raid is None and not leaves:
            _check_media(file, table, namespace)
            _check_mappers(file, table, namespace, config.fuse)


def _own(file: Path, key: str, place: str, name: str, owners: dict[object, str]) -> str:
    """Whose the place is: the namespace's from now on, or somebody else's already."""
    try:
        return owners.setdefault(_identity(place), name)
    except OSError as error:
        hint = "mend the path"
        raise ConfigError(file, key, f"{place}: {error.strerror}", hint=hint) from None


def _check_place(
    file: Path, config: Config, key: str, place: str, *, owner: str, name: str
) -> None:
    if owner != name:
        raise ConfigError(
            file,
            key,
            f"{place} already belongs to {owner}",
            hint="give each namespace a file of its own",
        )
    if not place.startswith("/"):
        return
    if config.fuse is not None and is_served_by_us(Path(place), Path(config.fuse.mountpoint)):
        raise ConfigError(
            file,
            key,
            f"{place} lies on a file system of this very daemon",
            hint="it could never be stopped; put the file elsewhere",
        )


def is_served_by_us(path: Path, mountpoint: Path) -> bool:
    """On our own mount, or on a loop device of a file there, or such a device itself."""
    try:
        status = path.stat() if path.is_block_device() else path.parent.stat()
    except OSError:
        return False  # the look at the media says what is wrong
    device = status.st_rdev if stat.S_ISBLK(status.st_mode) else status.st_dev
    mount = mounts.find(mountpoint)
    if mount is not None and (os.major(device), os.minor(device)) == (0, mount.minor):
        return True
    return loop.is_on(device, mountpoint)


def _check_sockets(file: Path, config: Config, listening: Collection[Address]) -> None:
    for key, address in config.sockets:
        if address in listening:
            continue
        if isinstance(address, UnixAddress) and _is_ours_to_make(address.path.parent):
            continue
        try:
            check_free(address)
        except PmblkError as error:
            raise ConfigError(file, key, error.message, hint=error.hint) from None


def _identity(place: str) -> object:
    """The same for every name of a file: symbolic links, hard links, and files to be created.

    Of a block device, for each of its nodes; a URI is what it says.
    """
    if not place.startswith("/"):
        return place
    path = Path(place)
    try:
        status = path.stat()
    except FileNotFoundError:
        return path.resolve()
    if stat.S_ISBLK(status.st_mode):
        return "block device", status.st_rdev
    return status.st_dev, status.st_ino


def _check_media(file: Path, place: str, namespace: NamespaceConfig) -> None:
    path = namespace.file
    if path.exists():
        try:
            inspect(
                path,
                size=namespace.size_bytes,
                lba_bytes=namespace.lba_size,
                read_only=namespace.read_only,
                with_reserve=namespace.with_reserve,
            )
        except PmblkError as error:
            raise ConfigError(file, f"{place}.path", error.message, hint=error.hint) from None
        return
    if not path.parent.is_dir():
        raise ConfigError(
            file, f"{place}.path", f"no directory {path.parent}", hint="make it, or mend the path"
        )
    if namespace.size is None:
        raise ConfigError(
            file,
            f"{place}.size",
            f"missing, and there is no {path}",
            hint='give a size ("1GiB") to create it',
        )
    if namespace.read_only:
        raise ConfigError(
            file, f"{place}.path", f"there is no {path} to read", hint="leave read_only out"
        )
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(
            file,
            f"{place}.path",
            f"cannot create files in {path.parent}",
            hint="mend its rights, or name another path",
        )


def _check_mappers(
    file: Path, place: str, namespace: NamespaceConfig, fuse: FuseConfig | None
) -> None:
    """A client of a daemon that was killed may still store to the media themselves."""
    kind = namespace.representation_kind
    if not KINDS[kind].keeps_copies or not namespace.file.exists():
        return
    mount = None if fuse is None else mounts.find(Path(fuse.mountpoint))
    # It mapped a file of that name on the mount that is still there.
    mapped_as = None if mount is None else on_mount(mount.minor, namespace.name)
    user = _user_of(namespace.file, mapped_as)
    if user is not None:
        who, hint = user
        message = f"{who}, and {kind} keeps copies of it"
        raise ConfigError(file, f"{place}.path", message, hint=hint)


def _user_of(path: Path, mapped_as: MappedAs | None) -> tuple[str, str] | None:
    """Who may store to the file, and what to do about it. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        is_open = syscalls.is_open_elsewhere(fd)
        pids = who_maps_media(path, os.fstat(fd), is_open=is_open, mapped_as=mapped_as)
        if pids:
            hint = "end it first, or choose another representation"
            return f"process {pids[0]} maps {path}", hint
        # With the mount of a killed daemon the name is gone by which its clients could be known.
        if stays_open(partial(syscalls.is_open_elsewhere, fd)):
            hint = (
                "what a killed daemon served, perhaps: end it, or pmblk detach --all --config FILE"
            )
            return f"others have {path} open or mapped", hint
    finally:
        os.close(fd)
    return None


def _check_writers(file: Path, config: Config, *, served: Collection[str] = ()) -> None:
    """What was attached to a killed daemon's file may still write to the media itself."""
    if config.fuse is None:
        return
    new = [one for one in config.namespace if one.name not in served and one.raid is None]
    sizes = {namespace.name: namespace.served_bytes() for namespace in new}
    try:
        leftovers.check_writers(Path(config.fuse.mountpoint), sizes)
    except PmblkError as error:
        raise ConfigError(file, "fuse.mountpoint", error.message, hint=error.hint) from None


def _is_ours_to_make(directory: Path) -> bool:
    """/run/pmblk is ours, and is made at the start when it is missing."""
    return directory == RUNTIME_DIRECTORY and not directory.exists()


def _check_mountpoint(file: Path, mountpoint: Path) -> None:
    if _is_ours_to_make(mountpoint.parent):
        return
    try:
        mounts.check_mountpoint(mountpoint)
    except PmblkError as error:
        raise ConfigError(file, "fuse.mountpoint", error.message, hint=error.hint) from None


def _check_owner(file: Path, fuse: FuseConfig) -> None:
    try:
        rights.rights_of(fuse)
    except PmblkError as error:
        raise ConfigError(file, "fuse.owner", error.message, hint=error.hint) from None
