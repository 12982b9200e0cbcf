"""What a killed daemon leaves: a dead mount and the loop devices on its files. For the next start.

Nobody waits for a dead mount: whatever its users ask for is an error. But a loop device on a file
that was opened with `dax = "fast"` needs no daemon to read and write: the kernel goes to the media
itself, for as long as the device is there. While such a device is in use no daemon may serve the
media anew, or two file systems would write to them. Which way a device goes nobody says; but on a
dead mount only a fast one can be read.
"""

import time
from collections.abc import Mapping
from pathlib import Path

import structlog

from pmblk import PmblkError
from pmblkd import loop, mounts
from pmblkd.errors import WorkFailed
from pmblkd.mounts import State

# Then the kernel has to ask about a file again: more than ATTRIBUTE_SECONDS of `pmblkd.fuse.files`,
# which lies above this.
FORGET_SECONDS = 1.1

_log = structlog.get_logger(__name__)


def check_writers(mountpoint: Path, sizes: Mapping[str, int]) -> None:
    """Raises PmblkError if a device that is in use writes to our media past every daemon.

    `sizes` are the namespaces' by name.
    """
    for device in loop.devices_below(mountpoint, sizes):
        use = loop.use_of(device)
        if use is not None and is_dead(device, mountpoint) and loop.can_be_read(device):
            raise _still_writes(device, *use)


def take_away(mountpoint: Path, sizes: Mapping[str, int]) -> None:
    """The dead mounts there and the devices on their files, also when the mount is gone already.

    A device that is in use stays, and is dead, unless it still writes. Raises PmblkError.
    """
    for device in loop.devices_below(mountpoint, sizes):
        if is_dead(device, mountpoint):
            _take_device_away(device)
    while mounts.is_dead(mountpoint):
        _log.warning("a killed daemon's mount is in the way: unmounting", path=str(mountpoint))
        mounts.unmount(mountpoint)


def _take_device_away(device: Path) -> None:
    use = loop.use_of(device)
    if use is not None:
        _log.warning("dead, but in use", device=str(device), how=use[0])
        return  # when that has ended, pmblk detach finds it
    _log.warning("detaching what was attached to a killed daemon's file", device=str(device))
    goes_on = loop.can_be_read(device)
    loop.abandon(device)
    if goes_on and not loop.settled(device):
        raise _still_writes(device, f"is open{loop.users_of(device)}", "end what has it open")


def is_dead(device: Path, mountpoint: Path) -> bool:
    """Whether the file system of its file has lost its daemon. Raises NotEnded if that hangs."""
    number = loop.file_system_of(device)
    if not number:
        return True
    mount = mounts.find(mountpoint)
    if mount is not None and number == mount.number:
        return mounts.state_of(mount) is State.DEAD
    time.sleep(FORGET_SECONDS)  # a mount that we cannot ask: its daemon may just have died
    return not loop.file_system_of(device)


def _still_writes(device: Path, how: str, hint: str) -> PmblkError:
    return WorkFailed(
        f"{device} still writes to the media past every daemon, and {how}",
        hint=f'{hint}, then start again (its file was opened with dax = "fast")',
    )
