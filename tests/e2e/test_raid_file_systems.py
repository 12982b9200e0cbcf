"""ext4 and xfs on arrays whose members fail under load: `tests.harness.array_life` has the story.

Over FUSE and a loop device with this kernel, and over the NBD client of Linux 6.1 as User-mode
Linux, with the daemon inside; one boot does for all of it.
"""

import pytest

from tests.harness import array_life, cases
from tests.harness.arrays import MIB, loop_device, nbd_export
from tests.harness.cases import Outcome
from tests.harness.file_systems import attached

pytestmark = pytest.mark.e2e

MEMBER_BYTES = 192 * MIB  # xfs has 300 MiB or more
SECONDS = 300


@pytest.mark.parametrize(
    ("kind", "level", "broken"),
    [
        ("ext4", 5, nbd_export),
        ("ext4", 6, loop_device),
        ("xfs", 5, loop_device),
        ("xfs", 6, nbd_export),
    ],
)
def test_files_outlive_the_members_under_them_over_fuse(
    kind: str, level: int, broken: array_life.Broken
) -> None:
    words = array_life.live(kind, level, broken, attached, member_bytes=MEMBER_BYTES)
    assert "files are the same" in words


@pytest.fixture(scope="module")
def found() -> Outcome:
    return cases.boot("tests.uml.raid", memory="1400M", seconds=SECONDS)


@pytest.mark.parametrize(("kind", "level"), [("ext4", 5), ("xfs", 6)])
def test_files_outlive_the_members_under_them_over_the_kernels_nbd(
    found: Outcome, kind: str, level: int
) -> None:
    assert "files are the same" in found.passed(f"{kind} on level {level}")


def test_the_guest_ends_well(found: Outcome) -> None:
    assert found.failure == ""
