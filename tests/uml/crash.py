"""In the guest: kill -9 for the daemon while file systems on its namespaces write with fsync.

    python -m tests.uml.crash SEED CRASHES

One daemon serves them all, so that one crash, one restart and one boot do for every file system.
Those that "die" are attached as `pmblk attach` does it: I/O errors from then on, until they are
unmounted, attached to the new daemon and mounted. The one that "rides" has a dead_conn_timeout:
the new daemon takes the connection over, and nothing above the block device notices.
`tests.e2e.test_kernel_crash` has a test for every case.
"""

import random
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pmblkd import attach
from tests.harness.cases import kernel_complaints, perform
from tests.harness.daemon import Daemon, running
from tests.harness.file_systems import check, make, run
from tests.harness.programs import assert_no_complaints, wait_for
from tests.uml import writers
from tests.uml.devices import attached, await_gone, connect, disconnect, take_over

CONFIG = """
[[namespace]]
name = "ext4"
path = "{dir}/ext4.img"
size = "320MiB"
representation = "extent"

[[namespace]]
name = "xfs"
path = "{dir}/xfs.img"
size = "320MiB"
representation = "page-cache"

[[namespace]]
name = "btrfs"
path = "{dir}/btrfs.img"
size = "320MiB"
representation = "struct-page"

[[namespace]]
name = "ride"
path = "{dir}/ride.img"
size = "320MiB"
representation = "pfn"

[nbd]
listen = ["unix:{dir}/nbd.sock"]
"""
DYING = ("ext4", "xfs", "btrfs")
# btrfs of Linux 6.1 lets an fsync succeed while the device fails under it (with nbdkit as the
# server too: 6 of 120 crashes, each time the last one). After the kill it promises nothing.
RASH = ("btrfs",)
KEPT = (10, 40)  # so many more files are kept when the daemon dies: a random number of these
RIDING = "ride"
RIDE_INDEX = 7  # the device; the others take the first that are free
RIDE = Path(f"/dev/nbd{RIDE_INDEX}")
# What was in flight when the daemon died is sent again only after this time.
TIMEOUT_SECONDS = 4
DEAD_SECONDS = 60
WAIT_SECONDS = 60


@dataclass
class Victim:
    """A namespace's file system that is mounted, with a writer on it."""

    name: str
    device: Path
    directory: Path
    promises: Path
    writer: "subprocess.Popen[bytes]"

    def await_kept(self, count: int) -> None:
        """Until so many more files are kept."""
        enough = writers.kept(self.promises) + count
        wait_for(lambda: writers.kept(self.promises) >= enough, seconds=WAIT_SECONDS)

    def end(self) -> None:
        """The writer has ended, or ends now; then unmount."""
        self.writer.terminate()
        self.writer.wait(WAIT_SECONDS)
        run("umount", str(self.directory))

    def keeps_all(self) -> str:
        """Mount it, which replays the journal, and check it: promises first, then structure."""
        run("mount", str(self.device), str(self.directory))
        try:
            words = writers.keeps_all(self.directory, self.promises)
        finally:
            run("umount", str(self.directory))
        check("ext4" if self.name == RIDING else self.name, self.device)
        return words


def attach_victim(daemon: Daemon, name: str) -> Path:
    if name != RIDING:
        return attach.attach(daemon.report(name), via="nbd")
    return connect(
        daemon,
        name,
        RIDE_INDEX,
        timeout_seconds=TIMEOUT_SECONDS,
        dead_connection_seconds=DEAD_SECONDS,
    )


def begin(daemon: Daemon, name: str, seed: int) -> Victim:
    device = attach_victim(daemon, name)
    directory = daemon.directory / name
    directory.mkdir(exist_ok=True)
    run("mount", str(device), str(directory))
    promises = daemon.directory / f"{name}.promises"
    return Victim(name, device, directory, promises, writers.start(directory, seed, promises))


def crash(daemon: Daemon, seed: int) -> None:
    """One crash under all writers, and a case for each file system."""
    chosen = random.Random(seed)
    ride, *dying = victims = [begin(daemon, name, seed) for name in (RIDING, *DYING)]
    for victim in victims:
        victim.await_kept(chosen.randrange(*KEPT))
    said = {victim.name: len(writers.lines(victim.promises)) for victim in victims}
    daemon.kill()
    for victim in dying:
        assert victim.writer.wait(WAIT_SECONDS) == 0, "an error from the device ends it"
        if victim.name in RASH:
            writers.take_back(victim.promises, after=said[victim.name])
    daemon.start()
    perform(f"{RIDING}, crash {seed}", partial(ride_on, daemon, ride), kernel_may_complain=True)
    for victim in dying:
        act = partial(come_back, daemon, victim)
        perform(f"{victim.name}, crash {seed}", act, kernel_may_complain=True)


def ride_on(daemon: Daemon, ride: Victim) -> str:
    assert ride.writer.poll() is None, "the writer has seen an error"
    take_over(daemon, RIDING, RIDE_INDEX)
    ride.await_kept(max(KEPT))
    ride.end()
    # The driver itself ("block nbd7: ...") does say that a connection is gone.
    about = [line for line in kernel_complaints().splitlines() if RIDE.name in line]
    seen = [line for line in about if not line.startswith(f"block {RIDE.name}:")]
    assert not seen, f"the file system has noticed: {seen}"
    words = ride.keeps_all()
    disconnect(RIDE_INDEX)
    return words


def come_back(daemon: Daemon, victim: Victim) -> str:
    victim.end()
    await_gone(victim.device)
    with attached(daemon, victim.name) as victim.device:
        return victim.keeps_all()


def main() -> None:
    seed, crashes = (int(argument) for argument in sys.argv[1:])
    run("modprobe", "--all", "nbd", "loop", "crc32c_generic", "xfs", "btrfs")
    with running(CONFIG) as daemon:
        for name in DYING:
            with attached(daemon, name) as device:
                make(name, device)
        make("ext4", attach_victim(daemon, RIDING))
        disconnect(RIDE_INDEX)
        for number in range(crashes):
            crash(daemon, seed + number)
        assert_no_complaints(daemon)


if __name__ == "__main__":
    main()
