"""Arrays over real files: made, served, failed, mended, stopped and assembled, by command.

File systems and programs work on them as on any other namespace.
"""

import contextlib
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.harness.arrays import config_of
from tests.harness.command_line import answer, ask, complaint, pmblk
from tests.harness.daemon import Daemon, scratch
from tests.harness.file_systems import attached, make, mounted
from tests.harness.programs import assert_no_complaints, program, wait_for

pytestmark = pytest.mark.e2e

MEMBER_BYTES = 64 << 20
LOSS = ("array member failed", "array is degraded")
LEVELS = [("0", 2), ("1", 2), ("5", 3), ("6", 4), ("10", 4)]


@contextlib.contextmanager
def made(level: str, members: int, *options: str, warned: Sequence[str] = ()) -> Iterator[Daemon]:
    """A daemon that serves a new array, and is stopped with nothing to complain about but what
    it `warned` of: each of that once.
    """
    with scratch() as directory:
        places = [f"{directory}/m{number}" for number in range(members)]
        size = ("--size", str(MEMBER_BYTES))
        created = pmblk("raid", "create", "data", *places, "--level", level, *size, *options)
        assert (created.returncode, created.stderr) == (0, "")
        daemon = Daemon(directory, config_of(directory, [*places, *spares_of(options)]))
        daemon.start()
        try:
            yield daemon
            assert_no_complaints(daemon, but=warned)
            assert [daemon.log.count(word) for word in warned] == [1] * len(warned), daemon.log
        finally:
            if daemon.running:
                assert daemon.stop() == 0


def spares_of(options: Sequence[str]) -> list[str]:
    return [after for word, after in itertools.pairwise(options) if word == "--spare"]


def status(daemon: Daemon) -> dict[str, Any]:
    found = json.loads(answer(daemon, "raid", "status", "data", "--json"))
    return dict(found["status"])


def states(daemon: Daemon) -> list[str]:
    """Of the members in their slots."""
    return [one["state"] for one in status(daemon)["members"] if one["slot"] is not None]


def pattern(daemon: Daemon, what: str, byte: int) -> None:
    """All of it is written with a byte, or read and found to be that."""
    size = daemon.report("data").size_bytes
    commands = [
        ("-c", f"{what} -P {byte} {at} {min(8 << 20, size - at)}") for at in range(0, size, 8 << 20)
    ]
    words = [word for pair in commands for word in pair]
    program("qemu-io", "-f", "raw", *words, "-c", "flush", daemon.uri("data"))


@pytest.mark.parametrize(("level", "members"), LEVELS)
def test_what_is_written_over_nbd_is_there_after_a_restart(level: str, members: int) -> None:
    with made(level, members) as daemon:
        pattern(daemon, "write", 7)
        assert daemon.stop() == 0
        daemon.start()
        pattern(daemon, "read", 7)
        assert status(daemon)["state"] in ("active", "clean")
        assert status(daemon)["sweep"] is None, "it was stopped cleanly: there is nothing to mend"


def test_a_file_system_lives_on_an_array_through_the_loss_of_a_member() -> None:
    with made("5", 3, warned=LOSS) as daemon:
        with attached(daemon, "data") as device:
            make("ext4", device)
            with mounted(device, daemon.directory / "fs") as directory:
                (directory / "before").write_bytes(b"before" * 100_000)
                answer(daemon, "raid", "fail", "data", f"{daemon.directory}/m1")
                (directory / "after").write_bytes(b"after" * 100_000)
            with mounted(device, daemon.directory / "fs") as directory:
                assert (directory / "before").read_bytes() == b"before" * 100_000
                assert (directory / "after").read_bytes() == b"after" * 100_000
            program("e2fsck", "-f", "-n", str(device))
        assert status(daemon)["state"] == "degraded"


def test_a_spare_takes_the_slot_of_a_member_that_fails_and_the_member_can_come_back(
    tmp_path: Path,
) -> None:
    spare = str(tmp_path / "spare")
    with made("5", 3, "--spare", spare, warned=LOSS) as daemon:
        pattern(daemon, "write", 3)
        failed = f"{daemon.directory}/m1"
        said = answer(daemon, "raid", "fail", "data", failed)
        assert said.startswith(f"data: {failed} has failed; ")
        wait_for(lambda: states(daemon) == ["active"] * 3)
        assert spare in [one["place"] for one in status(daemon)["members"][:3]]
        pattern(daemon, "read", 3)
        answer(daemon, "raid", "remove", "data", failed)
        answer(daemon, "raid", "add", "data", failed)
        found = answer(daemon, "raid", "status")
        assert "3 of 3 members, 1 spare" in found


def test_a_member_is_replaced_while_it_serves(tmp_path: Path) -> None:
    new = tmp_path / "new"
    with new.open("wb") as file:
        file.truncate(MEMBER_BYTES)
    with made("1", 2, warned=LOSS) as daemon:
        pattern(daemon, "write", 9)
        answer(daemon, "raid", "replace", "data", f"{daemon.directory}/m0", str(new))

        def taken_over() -> bool:
            members = [one["place"] for one in status(daemon)["members"] if one["slot"] == 0]
            return members == [str(new)]

        wait_for(taken_over)
        answer(daemon, "raid", "fail", "data", f"{daemon.directory}/m1")
        pattern(daemon, "read", 9)


def test_a_scrub_finds_what_somebody_wrote_past_the_array_and_repairs_it() -> None:
    with made("1", 2, warned=["array repair ended"]) as daemon:
        pattern(daemon, "write", 5)
        with (daemon.directory / "m1").open("r+b") as member:
            member.seek(-(1 << 20), 2)  # the data are at the end
            member.write(b"\xff" * 4096)
        for words, findings in ((["--repair"], True), ([], False)):
            answer(daemon, "raid", "scrub", "data", *words)
            wait_for(lambda: status(daemon)["sweep"] is None and bool(status(daemon)["scrub"]))
            assert bool(status(daemon)["scrub"]["findings"]) == findings


def test_an_array_is_stopped_and_assembled_and_its_members_are_free_meanwhile() -> None:
    with made("6", 4, warned=LOSS) as daemon:
        pattern(daemon, "write", 1)
        assert answer(daemon, "raid", "stop", "data") == "data: stopped\n"
        assert daemon.list() == []
        (daemon.directory / "m3").rename(daemon.directory / "gone")
        refused = ask(daemon, "raid", "assemble", "data")
        assert refused.returncode == 1
        assert "1 of 4 members are missing" in refused.stderr
        said = answer(daemon, "raid", "assemble", "data", "--degraded")
        assert "degraded, 3 of 4 members" in said
        pattern(daemon, "read", 1)


def test_devices_are_examined_without_a_daemon_and_said_to_start_or_not() -> None:
    with scratch() as directory:
        places = [f"{directory}/m{number}" for number in range(3)]
        made = pmblk("raid", "create", "x", *places, "--level", "5", "--size", "16MiB", "--json")
        array = json.loads(made.stdout)["array"]
        whole = pmblk("raid", "examine", *places)
        assert (whole.returncode, whole.stderr) == (0, "")
        assert array in whole.stdout
        assert "it can start" in whole.stdout
        half = pmblk("raid", "examine", places[0], f"{directory}/none", "--json")
        assert half.returncode == 1
        report = json.loads(half.stdout)
        assert report["devices"][1]["problem"].startswith("cannot open")
        assert "2 of 3 members are missing" in report["assembly"]["obstacles"][0]


def test_a_new_array_takes_no_member_of_another_one_unless_it_is_told_to() -> None:
    with scratch() as directory:
        places = [f"{directory}/m{number}" for number in range(2)]
        assert (
            pmblk("raid", "create", "x", *places, "--level", "1", "--size", "16MiB").returncode == 0
        )
        again = ("raid", "create", "y", *places, "--level", "0")
        assert "is a member of x" in complaint(pmblk(*again))
        assert pmblk(*again, "--force").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("create", "x", "--level", "5"), "an array needs members"),
        (("create", "x", "/a", "/b", "--level", "7"), "there is no level 7"),
        (("create", "x", "/a", "/b", "--level", "5", "--layout", "left"), "there is no left"),
        (("create", "x", "/a", "--level", "1", "--uuid", "7"), "'7' is no UUID"),
        (("create", "x", "/nowhere/a", "--level", "0"), "there is no /nowhere/a; give a --size"),
        (("examine",), "nothing to examine"),
        (("scrub", "x", "--repair", "--stop"), "exclude each other"),
        (("statsu",), 'no command statsu; did you mean "status"?'),
        (("fail", "x"), "see pmblk raid fail --help"),
    ],
)
def test_wrong_use_is_one_line(arguments: tuple[str, ...], words: str) -> None:
    assert words in complaint(pmblk("raid", *arguments))


def test_what_an_array_is_not_asked_for_is_said() -> None:
    with made("0", 2) as daemon:
        assert "no representation to switch" in complaint(ask(daemon, "switch", "data", "pfn"))
        assert "no memory to save from" in complaint(
            ask(daemon, "save", "data", f"{daemon.directory}/copy")
        )
        assert "is no member of data" in complaint(ask(daemon, "raid", "fail", "data", "/m9"))
        assert "no representation to compare" in complaint(
            pmblk("compare", str(daemon.config), "--namespace", "data")
        )
