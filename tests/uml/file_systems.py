"""In the guest: file systems on the kernel's NBD client and on its FUSE client, in one boot.

    python -m tests.uml.file_systems ENGINE...

`tests.e2e.test_kernel_file_systems` has a test for every case; the engines are those of `[fuse]`.
"""

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from pmblk.representations import KINDS
from pmblkd.compare import fio
from tests.harness import nbd_netlink
from tests.harness.cases import perform
from tests.harness.daemon import PMBLK, Daemon, running
from tests.harness.file_systems import (
    TREE,
    ProgramError,
    check,
    checksums,
    copy_tree,
    guarded,
    make,
    mounted,
    run,
)
from tests.harness.guests import ROOT
from tests.harness.programs import assert_no_complaints, wait_for
from tests.uml.devices import (
    attached,
    await_gone,
    connected,
    disconnect,
    size_bytes,
    sysfs,
)

LIFE = str(ROOT / "tests/harness/fs-life.sh")
LIFE_SECONDS = 90
MIB = 1 << 20
WRITES_A_KIND = 300  # at least, from one switch to the next
VERIFY = (
    *("--rw=randwrite", "--bsrange=4k-64k", "--blockalign=4k", "--size=16m", "--fsync=64"),
    *("--direct=1", "--ioengine=libaio", "--iodepth=8"),
    *("--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0"),
)
NBD = """
[[namespace]]
name = "small"
path = "{dir}/small.img"
size = "4MiB"
lba_size = 512

[[namespace]]
name = "life"
path = "{dir}/life.img"
size = "400MiB"

[[namespace]]
name = "grows"
path = "{dir}/grows.img"
size = "64MiB"

[[namespace]]
name = "switches"
path = "{dir}/switches.img"
size = "128MiB"

[nbd]
listen = ["unix:{dir}/nbd.sock"]
"""
FUSE = """
[[namespace]]
name = "life"
path = "{dir}/life.img"
size = "400MiB"

[fuse]
mountpoint = "{dir}/mnt"
engine = "ENGINE"
punch = true
"""


# ---- attach and detach


def command_line(daemon: Daemon) -> str:
    device = run(*daemon.command("attach", "small", "--via", "nbd")).strip()
    assert run(*daemon.command("attach", "small")).strip() == device
    asked = run("blockdev", "--getss", "--getsize64", device).split()
    assert asked == ["512", str(4 * MIB)], asked
    make("ext4", Path(device))
    directory = daemon.directory / "small"
    with mounted(Path(device), directory):
        assert f"{device} is mounted on {directory}" in _refusal(*daemon.command("detach", "small"))
    assert run(*daemon.command("detach", "small")).strip() == device
    await_gone(Path(device))
    for place in ("--socket", str(daemon.socket)), ("--config", str(daemon.config)):
        assert run(*daemon.command("attach", "small")).strip() == device
        assert run(PMBLK, "detach", "--all", *place).strip() == device
        await_gone(Path(device))
    return device


def _refusal(*command: str) -> str:
    try:
        words = run(*command)
    except ProgramError as refusal:
        return str(refusal)
    raise AssertionError(f"{' '.join(command)} succeeded: {words}")


# ---- lives


def life(daemon: Daemon, kind: str) -> str:
    with attached(daemon, "life") as device, guarded(daemon, seconds=LIFE_SECONDS):
        assert sysfs(device, "queue/write_cache").read_text() == "write back\n"
        assert sysfs(device, "queue/fua").read_text() == "1\n"
        words = run("bash", LIFE, kind, str(device), seconds=LIFE_SECONDS).strip()
        freed = _empty(daemon, kind, device)
    return f"{words}; {freed >> 20} MiB of memory given back"


def _empty(daemon: Daemon, kind: str, device: Path) -> int:
    """Remove all that a life leaves, and trim: how many bytes of memory came back."""
    before = daemon.report("life").allocated_bytes
    with mounted(device, daemon.directory / "life") as directory:
        run("find", str(directory), "-mindepth", "1", "-delete")
        run("sync", "--file-system", str(directory))
        run("fstrim", str(directory))
    check(kind, device)
    freed = before - daemon.report("life").allocated_bytes
    assert freed >= 32 * MIB, f"there were 40 MiB of files, and {freed} bytes came back"
    return freed


def connections(daemon: Daemon) -> str:
    device = Path("/dev/nbd0")
    server = ("-unix", str(daemon.directory / "nbd.sock"), "-name", "life")
    run("nbd-client", *server, str(device), "-block-size", "4096", "-connections", "3")
    fio.run([f"--filename={device}", *VERIFY], seconds=60)
    users = daemon.report("life").users
    assert users == 3, users
    queues = len(list(sysfs(device, "mq").iterdir()))
    disconnect(0)
    wait_for(lambda: daemon.report("life").users == 0)
    return f"{users} connections, {queues} in use"


# ---- changes under a mounted file system


def growth(daemon: Daemon) -> str:
    with connected(daemon, "grows", 0) as device:
        make("ext4", device)
        directory = daemon.directory / "grown"
        with mounted(device, directory):
            copy_tree(directory)
            _grow(daemon, device)
            # More than there was: some of it lies in the new part.
            big = f"of={directory}/big"
            run("dd", "if=/dev/urandom", big, "bs=1M", "count=80", "oflag=direct", "conv=fsync")
            before = checksums(directory)
        check("ext4", device)
        with mounted(device, directory):
            assert checksums(directory) == before
            assert checksums(directory / TREE.name) == checksums(TREE)
    return f"{len(before)} files are the same"


def _grow(daemon: Daemon, device: Path) -> None:
    reloaded = daemon.reload(NBD.replace('"64MiB"', '"160MiB"'))
    assert reloaded.grown == ["grows"], reloaded
    assert size_bytes(device) == 64 * MIB, "the kernel asks nobody for the size"
    nbd_netlink.resize(0, 160 * MIB)
    assert size_bytes(device) == 160 * MIB
    run("resize2fs", str(device))


def switches(daemon: Daemon) -> str:
    with attached(daemon, "switches") as device:
        make("ext4", device)
        with mounted(device, daemon.directory / "switched") as directory:
            copy_tree(directory)
            words = _switch_under_load(daemon, directory)
            kept = checksums(directory / TREE.name)
        check("ext4", device)
    assert kept == checksums(TREE)
    stats = daemon.stats("switches")
    assert stats.namespace_counters.errors == 0
    return words


def _switch_under_load(daemon: Daemon, directory: Path) -> str:
    enough = threading.Event()

    def verify_again_and_again() -> int:
        ios = 0
        while not enough.is_set():
            ios += fio.run([f"--directory={directory}", *VERIFY], seconds=60).read.ios
        return ios

    with ThreadPoolExecutor() as executor, guarded(daemon, seconds=LIFE_SECONDS):
        load = executor.submit(verify_again_and_again)
        try:
            pauses = [_switch(daemon, kind, load.done) for kind in KINDS]
        finally:
            enough.set()
        verified = load.result()
    return (
        f"{len(pauses)} kinds, {verified} reads verified, longest pause {max(pauses) * 1000:.1f} ms"
    )


def _switch(daemon: Daemon, kind: str, ended: Callable[[], bool]) -> float:
    done = daemon.switch("switches", kind)
    assert done.after.kind == kind
    enough = _writes(daemon) + WRITES_A_KIND
    wait_for(lambda: ended() or _writes(daemon) >= enough, seconds=30)
    return done.pause_seconds


def _writes(daemon: Daemon) -> int:
    return daemon.stats("switches").namespace_counters.writes


# ---- FUSE


def fuse(engine: str) -> str:
    with (
        running(FUSE.replace("ENGINE", engine)) as daemon,
        guarded(daemon, seconds=LIFE_SECONDS),
        attached(daemon, "life", via="loop") as device,
    ):
        served = daemon.report("life").fuse
        assert served is not None
        assert served.engine == engine
        discard = f"DISCARD={'yes' if served.discards else 'no'}"
        words = run("env", discard, "bash", LIFE, "ext4", str(device), seconds=LIFE_SECONDS)
        if served.discards:
            words += f"; {_empty(daemon, 'ext4', device) >> 20} MiB of memory given back"
        assert_no_complaints(daemon)
    return words.replace("\n", "")


# ---- all of them


def stop(daemon: Daemon) -> str:
    assert_no_complaints(daemon)
    assert daemon.stop() == 0
    return "no complaint in its log"


def main() -> None:
    run("modprobe", "--all", "nbd", "fuse", "loop", "crc32c_generic")
    with running(NBD) as daemon:
        perform("command line", partial(command_line, daemon))
        for kind in ("ext4", "xfs", "btrfs"):
            perform(kind, partial(life, daemon, kind))
        perform("connections", partial(connections, daemon))
        perform("growth", partial(growth, daemon))
        perform("switches", partial(switches, daemon))
        perform("stop", partial(stop, daemon))
    for engine in sys.argv[1:]:
        perform(f"fuse {engine}", partial(fuse, engine))


if __name__ == "__main__":
    main()
