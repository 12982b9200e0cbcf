"""The power fails under file systems whose writes were acknowledged; media of level "file".

The machine is a guest of User-mode Linux with the daemon, its media on an ext4 on a disk, and the
kernel's NBD client. The guest is killed: its page caches are lost, so whatever the daemon has
acknowledged before it was on the disk is lost too. `tests.uml.power` is what happens in there.
PMBLK_POWER_CUTS is how often (2 if it is not set).
"""

import os
import random
from pathlib import Path

import pytest

from tests.harness.cases import Outcome, outcome, program
from tests.harness.daemon import scratch
from tests.harness.programs import wait_for
from tests.harness.uml import Guest
from tests.uml import writers

pytestmark = pytest.mark.e2e

CUTS = int(os.environ.get("PMBLK_POWER_CUTS", "2"))
DISK_BYTES = 1 << 30
KEPT = (10, 40)  # so many files more are kept when the power is cut: a random number of these
BOOT_SECONDS = 90
KINDS = ("ext4", "xfs", "btrfs")


@pytest.fixture(scope="module")
def found() -> Outcome:
    """What all the boots found."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    chosen = random.Random(seed)
    with scratch() as folder:
        for name in ("honest", "forgetful"):
            (folder / name).touch()
            os.truncate(folder / name, DISK_BYTES)
        for boot in range(CUTS):
            with guest(folder, boot) as running:
                await_writers(running, boot, chosen.randrange(*KEPT))
                running.cut_power()
        with guest(folder, CUTS) as running:
            return outcome(running, seconds=BOOT_SECONDS)


def guest(folder: Path, boot: int) -> Guest:
    script = program("tests.uml.power", str(boot), str(CUTS))
    disks = [folder / "honest", folder / "forgetful"]
    return Guest(script, folder, memory="700M", disks=disks)


def await_writers(guest: Guest, boot: int, count: int) -> None:
    """Until every writer has kept so many more files than before this boot."""
    names = (*KINDS, *(["forgetful"] if boot == 0 else []))
    promises = [guest.folder / f"{name}.promises" for name in names]
    enough = {path: writers.kept(path) + count for path in promises}
    try:
        wait_for(
            lambda: not guest.running or all(writers.kept(path) >= enough[path] for path in enough),
            seconds=BOOT_SECONDS,
        )
    finally:
        print(guest.output)
    assert guest.running, "the guest ended before its power was cut"


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_fsynced_is_there_after_a_power_cut(found: Outcome, kind: str) -> None:
    for cut in range(1, CUTS + 1):
        assert "fsynced files are there" in found.passed(f"{kind}, power cut {cut}")


def test_a_daemon_that_ignores_flushes_is_found_out(found: Outcome) -> None:
    assert "files are lost" in found.passed("forgetful, power cut 1")


def test_the_guest_ends_well(found: Outcome) -> None:
    assert found.failure == ""
