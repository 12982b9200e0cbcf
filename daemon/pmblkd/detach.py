"""Taking block devices of namespaces away, with a living daemon, a dead one and one that hangs.

Runs in the command line. Without a daemon its config says where to look: a device is found in
/sys/block by the path of its file, or by the nbd-client behind it. What is in use is refused, and
the others go. A dead mount goes after its last device, which is found by the mount's path.
"""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from pmblk import PmblkError
from pmblkd import attach, control, fuse_connections, loop, mounts, report_of
from pmblkd.config import Config
from pmblkd.errors import WorkFailed
from pmblkd.mounts import State
from pmblkd.programs import run
from pmblkd.reports import DetachAllReport, NamespaceReport, Refusal


class Place(msgspec.Struct, frozen=True):
    """Where the devices of a daemon can be: its mountpoint; sizes and URIs by namespace."""

    mountpoint: Path | None
    sizes: dict[str, int]
    uris: dict[str, list[str]]


def place_of_daemon(socket: Path) -> Place:
    """As it says itself, with the namespaces that drain. Raises PmblkError."""
    try:
        namespaces = control.ask(socket, "list", list[NamespaceReport])
    except PmblkError as error:
        hint = "if it is dead or hangs: pmblk detach --all --config FILE"
        raise type(error)(error.message, hint=hint) from error
    return _place_of(namespaces)


def _place_of(namespaces: Sequence[NamespaceReport]) -> Place:
    paths = [Path(one.fuse.path) for one in namespaces if one.fuse is not None]
    return Place(
        paths[0].parent if paths else None,
        {one.name: one.size_bytes for one in namespaces},
        {one.name: one.nbd for one in namespaces},
    )


def place_of_config(config: Config) -> Place:
    addresses = config.nbd.addresses if config.nbd is not None else []
    return Place(
        Path(config.fuse.mountpoint) if config.fuse is not None else None,
        {one.name: one.served_bytes() for one in config.namespace},
        {
            one.name: [report_of.uri(address, one.name) for address in addresses]
            for one in config.namespace
        },
    )


def detach(namespace: NamespaceReport) -> list[Path]:
    """Take every block device of the namespace away; the list of them. Raises PmblkError."""
    place = _place_of([namespace])
    with loop.exclusive():
        devices = _clients(place.uris)
        if place.mountpoint is not None:
            devices += [
                device
                for device in loop.devices_below(place.mountpoint, place.sizes)
                if loop.file_name(device) == namespace.name
            ]
        for device in devices:
            use = loop.use_of(device)
            if use is not None:
                raise PmblkError(f"{device} {use[0]}", hint=use[1])
        for device in devices:
            _detach(device)
        return devices


def detach_all(place: Place, *, force: bool) -> DetachAllReport:
    """Every block device there, and the dead mount. Asks no daemon.

    `force`: a daemon that does not answer loses its mount, so that everybody who waits for it gets
    an error. Raises PmblkError where nothing can be done at all.
    """
    mountpoint = place.mountpoint
    aborted, unmounted, refused = [], [], []
    silent = _silent(mountpoint)
    if silent is not None:  # asked before the lock: who holds it may wait for this very daemon
        if not force:
            refused.append(Refusal(key=str(mountpoint), reason=str(mounts.silence(silent))))
            return DetachAllReport(devices=[], unmounted=[], aborted=[], refused=refused)
        _cut_off(silent)
        aborted.append(str(mountpoint))
    with loop.exclusive():
        devices = _clients(place.uris)
        if mountpoint is not None:
            devices += loop.devices_below(mountpoint, place.sizes)
        gone, refused = _detach_each(devices)
        if mountpoint is not None and not refused and _unmount(mountpoint):
            unmounted.append(str(mountpoint))
    return DetachAllReport(devices=gone, unmounted=unmounted, aborted=aborted, refused=refused)


def _detach_each(devices: Sequence[Path]) -> tuple[list[str], list[Refusal]]:
    gone, kept = [], []
    for device in devices:
        use = loop.use_of(device)
        if use is not None:
            kept.append(Refusal(key=str(device), reason=f"{use[0]}; {use[1]}"))
            continue
        try:
            _detach(device)
            gone.append(str(device))
        except PmblkError as error:
            kept.append(Refusal(key=str(device), reason=str(error)))
    return gone, kept


def _detach(device: Path) -> None:
    if device.name.startswith("nbd"):
        run("nbd-client", "-d", str(device))
    else:
        loop.detach(device)


def _clients(uris: dict[str, list[str]]) -> list[Path]:
    """The nbd devices of the exports."""
    return [
        device
        for device in attach.nbd_devices()
        if any(attach.is_client_of(device, name, of_name) for name, of_name in uris.items())
    ]


# ---- mounts


def _ours(mountpoint: Path) -> mounts.Mount | None:
    mount = mounts.find(mountpoint)
    return mount if mount is not None and mount.file_system == "fuse.pmblk" else None


def _silent(mountpoint: Path | None) -> mounts.Mount | None:
    """Our mount there, if it does not answer: who touches its devices may wait with the others."""
    mount = None if mountpoint is None else _ours(mountpoint)
    return mount if mount is not None and mounts.state_of(mount) is State.SILENT else None


def _cut_off(mount: mounts.Mount) -> None:
    """Everybody who waits for it gets an error. Raises PmblkError."""
    fuse_connections.abort(mount.minor)
    if mounts.state_of(mount) is State.SILENT:
        raise WorkFailed(f"the mount on {mount.path} was cut off and hangs", hint="end its daemon")


def _unmount(mountpoint: Path) -> bool:
    """The dead mounts that are ours, one upon the other; whether there was one."""
    found = False
    while _ours(mountpoint) is not None and mounts.is_dead(mountpoint):
        mounts.unmount(mountpoint)
        found = True
    return found
