"""ext4, xfs and btrfs over the kernel's NBD client, and over its FUSE client and a loop device.

Linux 6.1 as User-mode Linux, with the daemon inside; one boot does for all of it. It has one
processor, so that the kernel opens every connection that it is told to and sends all requests
through one of them: that a flush on one covers writes on another cannot be seen here.
"""

import pytest

from tests.harness import cases
from tests.harness.cases import Outcome

pytestmark = pytest.mark.e2e

ENGINES = ("kernel", "pyfuse3")  # of [fuse]
SECONDS = 400  # it takes 60 on a machine that has nothing else to do


@pytest.fixture(scope="module")
def found() -> Outcome:
    return cases.boot("tests.uml.file_systems", *ENGINES, memory="900M", seconds=SECONDS)


def test_the_command_line_attaches_and_refuses_to_detach_what_is_mounted(found: Outcome) -> None:
    assert found.passed("command line").startswith("/dev/nbd")


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_a_file_system_lives_on_nbd_and_gives_memory_back(found: Outcome, kind: str) -> None:
    words = found.passed(kind)
    assert f"{kind} on /dev/nbd" in words
    assert "of memory given back" in words


def test_the_kernel_opens_as_many_connections_as_it_is_told_to(found: Outcome) -> None:
    assert found.passed("connections") == "3 connections, 1 in use"


def test_a_mounted_file_system_grows_with_its_namespace(found: Outcome) -> None:
    assert "files are the same" in found.passed("growth")


def test_a_mounted_file_system_sees_nothing_of_a_switch(found: Outcome) -> None:
    assert "5 kinds" in found.passed("switches")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_file_system_lives_on_fuse_and_a_loop_device(found: Outcome, engine: str) -> None:
    words = found.passed(f"fuse {engine}")
    assert "ext4 on /dev/loop" in words
    assert ("of memory given back" in words) == (engine == "kernel"), "libfuse has no fallocate"


def test_the_daemon_logs_no_complaint_and_the_guest_ends_well(found: Outcome) -> None:
    found.passed("stop")
    assert found.failure == ""
