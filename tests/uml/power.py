"""In the guest: file systems on namespaces whose media lie on a disk, until the power is cut.

    python -m tests.uml.power BOOT CUTS

Boot 0 makes everything and writes with fsync; each later one first checks what came through, and
the one after the last cut ends there. /dev/ubda has the media of an honest daemon, /dev/ubdb those
of one that acknowledges flushes and does nothing (`tests.harness.forgetful`): the check has to
find loss there, or it would find none anywhere. `tests.e2e.test_kernel_power` cuts the power.
"""

import contextlib
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.harness import forgetful
from tests.harness.cases import perform
from tests.harness.daemon import PMBLK, Daemon, scratch
from tests.harness.file_systems import check, make, run
from tests.uml import writers
from tests.uml.devices import attached

OUT = Path("/run/w")  # the host's: what is written there is there after the power cut
HONEST, FORGETFUL = Path("/dev/ubda"), Path("/dev/ubdb")
NAMESPACE = """
[[namespace]]
name = "{name}"
path = "{directory}/{name}.img"
size = "320MiB"
"""
NBD = """
[nbd]
listen = ["unix:{dir}/nbd.sock"]
"""
STORES = Path("/run/store")
HONEST_NAMES = ("ext4", "xfs", "btrfs")
FORGETFUL_NAMES = ("forgetful",)
PROGRAMS = {HONEST: (PMBLK,), FORGETFUL: (sys.executable, forgetful.__file__)}


def kind_of(name: str) -> str:
    return "ext4" if name == "forgetful" else name


@contextlib.contextmanager
def served(disk: Path, names: tuple[str, ...], *, boot: int) -> Iterator[Daemon]:
    """A daemon whose media are files of the ext4 on the disk, which the first boot makes."""
    store = STORES / disk.name
    store.mkdir(parents=True)
    if boot == 0:
        make("ext4", disk)
    run("mount", str(disk), str(store))
    with scratch() as directory:
        namespaces = (NAMESPACE.format(name=name, directory=store) for name in names)
        config = "".join([*namespaces, NBD.format(dir=directory)])
        daemon = Daemon(directory, config, program=(*PROGRAMS[disk], "serve")).start()
        try:
            yield daemon
        finally:
            daemon.stop()
            run("umount", str(store))


def begin(daemon: Daemon, name: str, boot: int, stack: contextlib.ExitStack) -> None:
    """A writer on the namespace's file system. Nothing of this ends but by the power cut."""
    device = stack.enter_context(attached(daemon, name))
    directory = daemon.directory / name
    directory.mkdir(exist_ok=True)
    if boot == 0:
        make(kind_of(name), device)
    run("mount", str(device), str(directory))
    if name == "forgetful":
        # So that there is a file system to look for files in.
        run("sync", "--file-system", str(directory))
        run("sync", "--file-system", str(STORES / FORGETFUL.name))
    writers.start(directory, boot, OUT / f"{name}.promises")


def survived(daemon: Daemon, name: str) -> str:
    """What was checked of a namespace after a power cut. Raises FilesLost."""
    assert daemon.report(name).durability == "file"
    directory = daemon.directory / name
    directory.mkdir()
    with attached(daemon, name) as device:
        run("mount", str(device), str(directory))  # replays the journal
        try:
            words = writers.keeps_all(directory, OUT / f"{name}.promises")
        finally:
            run("umount", str(directory))
        check(kind_of(name), device)
    return words


def loss(daemon: Daemon, name: str) -> str:
    """What is lost there. Raises AssertionError when that is nothing.

    A mount that fails, or any other trouble, is no loss that the check has found.
    """
    try:
        words = survived(daemon, name)
    except writers.FilesLost as found:
        return str(found)
    raise AssertionError(f"nothing was flushed, and no loss was found: {words}")


def only_what_is_asked_for_reaches_a_disk() -> None:
    """No write-back of the kernel's own saves by chance what was not flushed."""
    Path("/proc/sys/vm/dirty_writeback_centisecs").write_text("0")
    Path("/proc/sys/vm/dirty_background_ratio").write_text("90")
    Path("/proc/sys/vm/dirty_ratio").write_text("95")


def look_back(daemons: dict[str, Daemon], cut: int) -> None:
    """A case for each namespace."""
    for name, daemon in daemons.items():
        look = survived if name in HONEST_NAMES else loss
        may_complain = name not in HONEST_NAMES
        perform(
            f"{name}, power cut {cut}",
            partial(look, daemon, name),
            kernel_may_complain=may_complain,
        )


def main() -> None:
    boot, cuts = (int(argument) for argument in sys.argv[1:])
    run("modprobe", "--all", "nbd", "loop", "crc32c_generic", "xfs", "btrfs")
    only_what_is_asked_for_reaches_a_disk()
    with contextlib.ExitStack() as stack:
        honest = stack.enter_context(served(HONEST, HONEST_NAMES, boot=boot))
        daemons = dict.fromkeys(HONEST_NAMES, honest)
        if boot <= 1:  # what it has lost once is enough
            other = stack.enter_context(served(FORGETFUL, FORGETFUL_NAMES, boot=boot))
            daemons |= dict.fromkeys(FORGETFUL_NAMES, other)
        if boot > 0:
            look_back(daemons, boot)
        if boot < cuts:
            for name, daemon in daemons.items():
                if boot == 0 or name in HONEST_NAMES:
                    begin(daemon, name, boot, stack)
            signal.pause()


if __name__ == "__main__":
    main()
