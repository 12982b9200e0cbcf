"""Making a namespace a block device of this machine, and undoing it. Runs in the command line.

Never in the daemon: a process that opens a file of its own FUSE mount can hang for ever. Every
program has a time limit.

`loop`: losetup with direct I/O and the namespace's block size on its FUSE file. Where the engine
delivers no discard, discard is switched off on that loop device, because the kernel would report
the first one as done (and lose it). That switch belongs to the device, outlives the file and can
not be turned back (seen on Linux 6.18), so every attachment has a loop device of its own, which is
added for it and removed with it. `nbd`: nbd-client on one of the daemon's sockets.
"""

import contextlib
import fcntl
import json
import os
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pmblk import PmblkError
from pmblkd.errors import WorkFailed

Via = Literal["loop", "nbd"]

PROGRAM_SECONDS = 30
SETTLE_SECONDS = 5
LOOP_CONTROL = Path("/dev/loop-control")
LOOP_CTL_ADD, LOOP_CTL_REMOVE = 0x4C80, 0x4C81  # include/uapi/linux/loop.h


def attach(namespace: Mapping[str, Any], *, via: Via | None) -> Path:
    """The block device of the namespace (as the control socket describes it). Idempotent.

    `via` None: loop where the namespace has a FUSE file, else nbd.
    """
    if via == "nbd" or (via is None and namespace["fuse"] is None):
        return _attach_nbd(namespace)
    return _attach_loop(namespace)


def detach(namespace: Mapping[str, Any]) -> list[Path]:
    """Take every block device of the namespace away; the list of them. Raises PmblkError."""
    devices = []
    if namespace["fuse"] is not None:
        devices += detach_file(Path(namespace["fuse"]["path"]))
    for device, name in _nbd_devices():
        if name == namespace["name"]:
            _refuse_mounted(device)
            _run("nbd-client", "-d", str(device))
            devices.append(device)
    return devices


# ---- loop


def _attach_loop(namespace: Mapping[str, Any]) -> Path:
    fuse = namespace["fuse"]
    if fuse is None:
        raise PmblkError(
            f"{namespace['name']} has no FUSE file to attach",
            hint="add [fuse] with a mountpoint to the config, or use --via nbd",
        )
    file = Path(fuse["path"])
    for device in loop_devices(file):
        return device
    device = _add_loop_device()
    arguments = ["--direct-io=on", "--sector-size", str(namespace["lba_size"])]
    if namespace["read_only"]:
        arguments.append("--read-only")
    try:
        _run("losetup", *arguments, str(device), str(file))
        if not fuse["discards"]:
            _switch_discard_off(device)
    except PmblkError:
        _remove_loop_device(device)
        raise
    return device


def detach_file(file: Path) -> list[Path]:
    """Detach every loop device on `file`, which may be gone already."""
    devices = loop_devices(file)
    for device in devices:
        _refuse_mounted(device)
        _run("losetup", "--detach", str(device))
        _wait_detached(device, file)
        _remove_loop_device(device)
    return devices


def loop_devices(file: Path) -> list[Path]:
    """The loop devices on `file`, by name: the file itself is never touched."""
    listing = _run("losetup", "--list", "--json", "--output", "NAME,BACK-FILE")
    entries = json.loads(listing)["loopdevices"] if listing.strip() else []
    wanted = {str(file), f"{file} (deleted)"}
    return [Path(entry["name"]) for entry in entries if entry["back-file"] in wanted]


def _add_loop_device() -> Path:
    """A loop device that nobody had before (loop(4), LOOP_CTL_ADD)."""
    try:
        with LOOP_CONTROL.open() as control:
            return Path(f"/dev/loop{fcntl.ioctl(control, LOOP_CTL_ADD, -1)}")
    except OSError as error:
        raise PmblkError(
            f"cannot add a loop device: {error.strerror}", hint="it takes root and the loop driver"
        ) from error


def _remove_loop_device(device: Path) -> None:
    """Remove it, unless somebody else has it by now (LOOP_CTL_REMOVE says EBUSY)."""
    with contextlib.suppress(OSError), LOOP_CONTROL.open() as control:
        fcntl.ioctl(control, LOOP_CTL_REMOVE, int(device.name.removeprefix("loop")))


def _switch_discard_off(device: Path) -> None:
    setting = Path("/sys/block") / device.name / "queue/discard_max_bytes"
    try:
        setting.write_text("0")
    except OSError as error:
        _run("losetup", "--detach", str(device))
        raise PmblkError(f"cannot switch discard off on {device}: {error.strerror}") from error


def _wait_detached(device: Path, file: Path) -> None:
    """The kernel detaches when the last user lets go, udev's probing included."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while device in loop_devices(file):
        if time.monotonic() > deadline:
            raise PmblkError(f"{device} is still in use", hint="close what has it open")
        time.sleep(0.02)


# ---- nbd


def _attach_nbd(namespace: Mapping[str, Any]) -> Path:
    if not namespace["nbd"]:
        raise PmblkError(
            f"{namespace['name']} has no NBD export", hint="add [nbd] with listen to the config"
        )
    for device, name in _nbd_devices():
        if name == namespace["name"]:
            return device
    device = _free_nbd_device()
    _run("nbd-client", *nbd_client_arguments(namespace, device))
    return device


def nbd_client_arguments(namespace: Mapping[str, Any], device: Path) -> Sequence[str]:
    """nbd-client(8)'s arguments; a unix socket is preferred."""
    uris = sorted(namespace["nbd"], key=lambda uri: not uri.startswith("nbd+unix"))
    if match := re.fullmatch(r"nbd\+unix:///.*\?socket=(.+)", uris[0]):
        server = ["-unix", match[1]]
    else:
        match = re.fullmatch(r"nbd://\[?(.+?)\]?:(\d+)/.*", uris[0])
        assert match is not None, uris[0]
        server = [match[1], match[2]]
    size = str(namespace["lba_size"])
    options = ["-name", namespace["name"], "-block-size", size]
    # With netlink nbd-client is gone at once, and nobody could say which export the device has.
    options.append("-nonetlink")
    if namespace["read_only"]:
        options.append("-readonly")
    return [*server, str(device), *options]


def _nbd_devices() -> list[tuple[Path, str]]:
    """Attached nbd devices with the export that nbd-client was told."""
    found = []
    for entry in sorted(Path("/sys/block").glob("nbd*")):
        try:
            pid = (entry / "pid").read_text().strip()
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
            found.append((Path("/dev") / entry.name, arguments[arguments.index("-name") + 1]))
        except (OSError, ValueError, IndexError):
            continue
    return found


def _free_nbd_device() -> Path:
    devices = sorted(Path("/sys/block").glob("nbd*"))
    if not devices:
        raise PmblkError(
            "this kernel has no nbd devices", hint="run: modprobe nbd; or attach through loop"
        )
    for entry in devices:
        if not (entry / "pid").exists():
            return Path("/dev") / entry.name
    raise PmblkError("every nbd device is in use", hint="detach one")


def _refuse_mounted(device: Path) -> None:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[fields.index("-") + 2] == str(device):
            raise PmblkError(f"{device} is mounted on {fields[4]}", hint=f"run: umount {fields[4]}")


def _run(program: str, *arguments: str) -> str:
    """The program's output. Raises PmblkError with its words, or when it takes too long."""
    try:
        done = subprocess.run(
            [program, *arguments],
            capture_output=True,
            text=True,
            timeout=PROGRAM_SECONDS,
            check=False,
            env={
                **os.environ,
                "LC_ALL": "C",
                "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin",
            },
        )
    except FileNotFoundError:
        raise PmblkError(f"{program} is not installed", hint=f"install {program}") from None
    except subprocess.TimeoutExpired:
        raise PmblkError(
            f"{program} did not end in {PROGRAM_SECONDS} s", hint="is the daemon alive?"
        ) from None
    if done.returncode != 0:
        words = done.stderr.strip() or f"exit status {done.returncode}"
        raise WorkFailed(words if words.startswith(program) else f"{program}: {words}")
    return done.stdout
