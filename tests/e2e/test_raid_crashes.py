"""kill -9 for whoever makes or serves an array, at random moments of all that it does.

The next start finds an array that is valid: every block is as its last flush left it, or newer;
what was under way goes on to its end, and a scrub finds nothing. The test's output shows the seeds.
"""

import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.arrays import (
    MIB,
    NAME,
    active,
    ask,
    await_idle,
    await_whole,
    config_of,
    create,
    scrub,
    served,
    status,
)
from tests.harness.block_writer import Blocks, content, writing
from tests.harness.command_line import pmblk
from tests.harness.daemon import PMBLK, Daemon, scratch
from tests.harness.file_systems import guarded
from tests.harness.programs import program

pytestmark = pytest.mark.e2e

ROUNDS = 2
MEMBER_BYTES = 16 * MIB
BLOCKS = 2048  # the first 8 MiB are written
FLUSHES = (3, 50)  # so many are awaited before the daemon is killed: a random number of these
HANG_SECONDS = 60
CREATIONS = 6
# A sweep takes about a second, so that the crash comes in the midst of it.
SLOW = {"sweep_min": "0", "sweep_max": "24MiB"}

Begin = Callable[[Daemon, list[str]], None]


def nothing(_daemon: Daemon, _places: list[str]) -> None:
    """Writes alone."""


def fail_one(daemon: Daemon, _places: list[str]) -> None:
    """Without a spare the array is degraded, with one it is rebuilt."""
    place = active(daemon)[-1]
    assert place is not None
    ask(daemon, "fail", member=place)


def replace_one(daemon: Daemon, places: list[str]) -> None:
    old = active(daemon)[0]
    assert old is not None
    (new,) = set(places) - set(active(daemon))
    ask(daemon, "replace", old=old, new=new)


def repair(daemon: Daemon, _places: list[str]) -> None:
    ask(daemon, "scrub", repair=True)


OPEN = ("--write-hole", "open")
CASES = [
    ("5", 3, 0, OPEN, nothing),
    ("6", 4, 0, (*OPEN, "--integrity"), nothing),
    ("5", 3, 0, (), fail_one),
    ("6", 4, 0, ("--integrity",), fail_one),
    ("5", 3, 1, ("--integrity",), fail_one),
    ("6", 4, 1, (), fail_one),
    ("10", 4, 1, (), fail_one),
    ("5", 3, 1, OPEN, replace_one),
    ("1", 2, 1, ("--integrity",), replace_one),
    ("6", 4, 0, (), repair),
    ("5", 3, 0, (*OPEN, "--integrity"), repair),
]


def case_name(value: object) -> str:
    words = value if isinstance(value, tuple) else [getattr(value, "__name__", value)]
    return "".join(map(str, words)) or "journal"


def test_the_check_of_blocks_finds_what_is_older_than_its_last_flush() -> None:
    blocks = Blocks(2)
    blocks.kept[0] = 5
    blocks.later[0] = {6, 7}
    assert "none of the versions [5, 6, 7]" in blocks.take(0, content(0, 4))
    assert "none of the versions" in blocks.take(0, content(1, 5)), "it is another block's"
    assert blocks.take(0, content(0, 7)) == ""
    assert blocks.take(0, content(0, 6)), "what was there once does not go back"
    assert blocks.take(1, bytes(4096)) == ""


@pytest.mark.parametrize(("level", "members", "spares", "options", "begin"), CASES, ids=case_name)
def test_a_killed_daemon_loses_nothing_that_was_flushed(
    level: str, members: int, spares: int, options: tuple[str, ...], begin: Begin
) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    chosen = random.Random(seed)
    with scratch() as directory:
        places = [f"{directory}/m{number}" for number in range(members + spares)]
        words = ["--level", level, "--chunk", "16KiB", "--size", str(MEMBER_BYTES), *options]
        for spare in places[members:]:
            words += ["--spare", spare]
        create(places[:members], *words)
        blocks = Blocks(BLOCKS)
        with (
            served(directory, places, **SLOW) as daemon,
            guarded(daemon, seconds=HANG_SECONDS),
        ):
            for number in range(ROUNDS):
                _crash(daemon, blocks, seed + number, begin, places, chosen.randrange(*FLUSHES))
                daemon.start()
                assert blocks.wrong(daemon, NAME) == []
                _mend(daemon, places)
                assert scrub(daemon) == ()
                assert blocks.wrong(daemon, NAME) == []


def _crash(
    daemon: Daemon, blocks: Blocks, seed: int, begin: Begin, places: list[str], flushes: int
) -> None:
    """Kill it when so much was flushed since the work began."""
    with writing(daemon, NAME, blocks, seed) as clients:
        clients.await_flushes(5)
        begin(daemon, places)
        clients.await_flushes(flushes)
        daemon.kill()


def _mend(daemon: Daemon, places: list[str]) -> None:
    """What is under way ends, and who is out comes back."""
    await_idle(daemon)
    used = [one.place for one in status(daemon).members if one.state != "faulty"]
    for place in places:
        if place not in used:
            ask(daemon, "add", member=place)
    await_whole(daemon)


# ---- the write hole


@pytest.mark.parametrize("spares", [0, 1], ids=["degraded", "rebuilding"])
def test_without_a_journal_what_is_missing_is_not_made_up_after_a_crash(spares: int) -> None:
    """Parity may be new and data old: nobody can say what the missing member held."""
    with scratch() as directory:
        places = [f"{directory}/m{number}" for number in range(3 + spares)]
        words = ["--level", "5", "--size", str(MEMBER_BYTES), *OPEN]
        for spare in places[3:]:
            words += ["--spare", spare]
        create(places[:3], *words)
        blocks = Blocks(BLOCKS)
        with served(directory, places, sweep_min="0", sweep_max="1MiB") as daemon:
            _crash(daemon, blocks, 1, fail_one, places, 3)
            with pytest.raises(AssertionError, match=r"not stopped cleanly.*\(--force\)"):
                daemon.start()
            daemon.config.write_text(config_of(directory, places, force=True))
            daemon.start()
            assert status(daemon).state == "degraded"


# ---- making an array


def test_an_array_whose_making_was_killed_is_whole_or_can_be_made_again() -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    chosen = random.Random(seed)
    with scratch() as directory:
        places = [f"{directory}/m{number}" for number in range(4)]
        command = [PMBLK, "raid", "create", NAME, *places, "--level", "6", "--size", "16MiB"]
        started = time.monotonic()
        program(*command)
        seconds = time.monotonic() - started
        for _ in range(CREATIONS):
            for place in places:
                Path(place).unlink(missing_ok=True)
            with subprocess.Popen(command, stdout=subprocess.DEVNULL) as making:
                time.sleep(chosen.uniform(seconds * 0.5, seconds))
                making.kill()
            found = pmblk("raid", "examine", *places)
            assert found.stderr == ""
            if found.returncode:  # it is no array yet, so nobody minds a new one
                for place in places:
                    _remove_empty(Path(place))
                made = pmblk(*command[1:])
                assert made.returncode == 0, (found.stdout, made.stderr)


def _remove_empty(file: Path) -> None:
    """It was made, and had no size yet."""
    if file.exists() and not file.stat().st_size:
        file.unlink()
