"""The commands about one namespace: stats, switch, describe, poison; what they print and refuse."""

import json
from collections.abc import Iterator

import pytest

from tests.harness.command_line import SECONDS, answer, ask, complaint
from tests.harness.daemon import Daemon, running
from tests.harness.nbd_raw import connected

pytestmark = pytest.mark.e2e

COLUMNS = 80
SERVED = """
[[namespace]]
name = "data"
path = "{dir}/data.img"
size = "64MiB"

[nbd]
listen = ["unix:{dir}/nbd.sock"]
"""


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    """Its first MiB has memory."""
    with running(SERVED) as one:
        with connected(one.directory / "nbd.sock") as client:
            assert client.write(0, bytes(1 << 20)) == 0
            assert client.read(0, 4096) == bytes(4096)
        yield one


def view_of(daemon: Daemon, *arguments: str) -> str:
    """What people read: it fits a terminal."""
    view = answer(daemon, *arguments)
    assert all(len(line) <= COLUMNS for line in view.splitlines()), view
    return view


def test_stats_count_what_clients_did(daemon: Daemon) -> None:
    lines = view_of(daemon, "stats", "data").splitlines()
    assert lines[0] == "data: extent"
    assert ["writes", "1", "1", "MiB"] in [line.split() for line in lines]
    counted = json.loads(ask(daemon, "stats", "data", "--json").stdout)
    assert counted["namespace_counters"]["write_bytes"] == 1 << 20
    assert counted["representation"] == {"kind": "extent", "options": {"fragments": 1}}


def test_a_switch_says_what_took_over_and_how_long_clients_waited(daemon: Daemon) -> None:
    line = view_of(daemon, "switch", "data", "page-cache", "--option", "arena=1MiB")
    assert line.startswith("data: extent -> page-cache (arena 1MiB), built in ")
    assert " ms, paused " in line
    report = json.loads(ask(daemon, "switch", "data", "extent", "--json").stdout)
    assert report["before"] == {"kind": "page-cache", "options": {"arena": "1MiB"}}
    assert report["after"]["kind"] == "extent"
    assert 0 < report["pause_seconds"] < SECONDS


def test_numbers_among_the_options_may_be_text(daemon: Daemon) -> None:
    arguments = ("switch", "data", "extent", "--option", "fragments=16")
    assert "extent (fragments 16)" in view_of(daemon, *arguments)
    view_of(daemon, "switch", "data", "extent")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("switch", "data", "extend"), 'did you mean "extent"?'),
        (("switch", "data", "page-cache", "--option", "arna=1MiB"), 'did you mean "arena"?'),
        (("switch", "data", "page-cache", "--option", "arena=1KiB"), "at least 1MiB"),
        (("switch", "data", "extent", "--option", "fragments=many"), "fragments: expected int"),
        (("switch", "data", "extent", "--option", "fragments"), "write --option key=value"),
        (("switch", "date", "extent"), 'did you mean "data"?'),
        (("stats", "date"), 'did you mean "data"?'),
        (("describe", "date"), 'did you mean "data"?'),
        (("describe", "data", "--offset", "64MiB"), "it has 67108864 bytes"),
        (("describe", "data", "--offset", "1MB"), "--offset: '1MB' is not a size"),
        (("describe", "data", "--length", "33MiB"), "at most 32MiB"),
        (("describe", "data", "--length", "0"), "--length: 0 bytes are no range; at least 1"),
        (("poison", "data", "--offset", "0", "--length", "0"), "--length: 0 bytes are no range"),
        (("switch", "data", "extent", "--option", "fragments=0"), "extent.fragments: 0 is not in"),
        (("switch", "data", "page-cache", "--option", "arena=1GB"), "page-cache.arena: '1GB'"),
        (("poison", "data"), "--offset"),
        (("poison", "data", "--offset", "64MiB"), "it has 67108864 bytes"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_is_one_line_with_a_hint(
    daemon: Daemon, arguments: tuple[str, ...], words: str
) -> None:
    assert words in complaint(ask(daemon, *arguments))


def test_a_switch_that_fails_at_work_has_another_exit_status(daemon: Daemon) -> None:
    done = ask(daemon, "switch", "data", "struct-page", "--option", "memmap=device")
    assert done.returncode == 1
    assert "reserve = true" in done.stderr
    assert daemon.kind("data") == "extent"


def test_a_description_shows_the_bytes_that_a_controller_would_read(daemon: Daemon) -> None:
    view = view_of(daemon, "describe", "data", "--offset", "4KiB", "--length", "64KiB")
    assert "64 KiB at 4096" in view
    assert "PRP           16 entries, 1 list page" in view
    assert "... 8 more" in view
    arguments = ("describe", "data", "--offset", "4KiB", "--length", "64KiB", "--json")
    described = json.loads(ask(daemon, *arguments).stdout)
    (run,) = described["runs"]
    prps = described["prps"]
    assert (run["length"], prps["prp1"], prps["prp2"]) == (
        64 << 10,
        run["address"],
        described["list_address"],
    )
    first = bytes.fromhex(prps["pages"][0])[:8]
    assert int.from_bytes(first, "little") == run["address"] + 4096
    assert (
        described["sgl"]["data_pointer"]
        == (run["address"].to_bytes(8, "little") + (64 << 10).to_bytes(8, "little")).hex()
    )


def test_a_hole_has_nothing_to_describe(daemon: Daemon) -> None:
    view = view_of(daemon, "describe", "data", "--offset", "32MiB")
    assert "PRP           none: the range has no memory: it is a hole" in view


def test_poisoned_pages_fail_until_they_are_written_as_a_whole(daemon: Daemon) -> None:
    line = view_of(daemon, "poison", "data", "--offset", "40MiB", "--length", "1")
    assert line == (
        "data: 4 KiB at 41943040 are bad now;\n"
        "each page is bad until it is written, zeroed or discarded as a whole\n"
    )
    with connected(daemon.directory / "nbd.sock") as client:
        assert client.ask(0, 40 << 20, 1).error == 5
        assert "poisoned" in view_of(daemon, "stats", "data")
        assert "poisoned" in complaint(ask(daemon, "describe", "data", "--offset", "40MiB"))
        assert client.write(40 << 20, bytes(4096)) == 0
        assert client.read(40 << 20, 4096) == bytes(4096)
    assert "poisoned" not in view_of(daemon, "stats", "data")
