"""kill -9 for the daemon under file systems on the kernel's NBD client: nothing fsynced is lost.

Linux 6.1 as User-mode Linux, with the daemon inside; `tests.uml.crash` is what happens there.
PMBLK_CRASHES is how often the daemon is killed (2 if it is not set).
"""

import os
import random

import pytest

from tests.harness import cases
from tests.harness.cases import Outcome

pytestmark = pytest.mark.e2e

CRASHES = int(os.environ.get("PMBLK_CRASHES", "2"))
BOOT_SECONDS = 90
CRASH_SECONDS = 60


@pytest.fixture(scope="module")
def seed() -> int:
    return random.randrange(1 << 20)


@pytest.fixture(scope="module")
def found(seed: int) -> Outcome:
    seconds = BOOT_SECONDS + CRASHES * CRASH_SECONDS
    return cases.boot("tests.uml.crash", str(seed), str(CRASHES), memory="900M", seconds=seconds)


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_what_was_fsynced_is_there_after_a_crash_and_a_new_attachment(
    found: Outcome, seed: int, kind: str
) -> None:
    for number in range(CRASHES):
        assert "fsynced files are there" in found.passed(f"{kind}, crash {seed + number}")


def test_a_new_daemon_takes_the_connection_over_and_the_file_system_does_not_notice(
    found: Outcome, seed: int
) -> None:
    for number in range(CRASHES):
        assert "fsynced files are there" in found.passed(f"ride, crash {seed + number}")


def test_the_guest_ends_well(found: Outcome) -> None:
    assert found.failure == ""
