"""`pmblk compare`, for real: what its report says, and that nothing else of it is left."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pmblkd.compare.matrix import rows
from pmblkd.compare.results import Results, load
from tests.harness.command_line import daemon_in, interrupt, output_of, started
from tests.harness.daemon import PMBLK, scratch
from tests.harness.file_systems import leftovers, run
from tests.harness.html_page import Page

pytestmark = pytest.mark.e2e

SECONDS = 240
GIB = 1 << 30
KINDS = ["page-cache", "struct-page", "transient-page", "pfn", "extent"]
PATTERN = "4k-.*-qd32|1m-read-qd1$"
CONFIG = """
[[namespace]]
name = "other"
path = "{dir}/other.img"
size = "1GiB"

[[namespace]]
name = "precious"
path = "{dir}/media/precious.img"
size = "128MiB"

[nbd]
listen = ["unix:{dir}/nbd.sock"]
"""
PRECIOUS = b"nobody touches this" * 1000


class World:
    """A config, a file that must not change, and a place for all that is temporary."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.media = directory / "media"
        self.temporary = directory / "tmp"
        self.output = directory / "out"
        self.config = directory / "pmblk.toml"
        self.media.mkdir()
        self.temporary.mkdir()
        self.config.write_text(CONFIG.replace("{dir}", str(directory)))
        (self.media / "precious.img").write_bytes(PRECIOUS)

    @contextlib.contextmanager
    def compare(self, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
        usual = {"--namespace": "precious", "--size": "64MiB", "--output": str(self.output)}
        others = [word for pair in usual.items() if pair[0] not in arguments for word in pair]
        command = [PMBLK, "compare", str(self.config), *others, *arguments]
        with started(command, seconds=SECONDS, TMPDIR=str(self.temporary)) as process:
            yield process

    def check_nothing_is_left(self) -> None:
        assert os.listdir(self.media) == ["precious.img"]
        assert (self.media / "precious.img").read_bytes() == PRECIOUS
        assert os.listdir(self.temporary) == []
        assert leftovers(self.directory) == [f"the directory {self.directory}"]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with scratch() as directory:
        yield World(directory)


@pytest.fixture(scope="module")
def results(world: World) -> Results:
    arguments = ["--seconds", "0.2", "--rounds", "1", "--rows", PATTERN]
    with world.compare(*arguments) as process:
        output, _ = process.communicate()
    assert process.returncode == 0, output
    assert "\x1b" not in output
    world.check_nothing_is_left()
    return load(world.output / "results.json")


def test_every_representation_is_in_every_row_with_figures(results: Results) -> None:
    assert [one.name for one in results.contenders] == KINDS
    assert results.rows == rows(PATTERN, with_loop=True)
    assert len(results.rows) == 6
    for row in results.rows:
        for one in results.contenders:
            (sample,) = results.of(row, one)
            for figure in (
                *(sample.ios, sample.seconds, sample.bytes_per_second, sample.server_seconds),
                *(sample.latency_us_p50, sample.latency_us_p99, sample.latency_us_p999),
                *(sample.descriptors, sample.descriptor_bytes, sample.prp_entries),
                *(sample.sgl_descriptors, sample.metadata_bytes),
                *(sample.build_seconds, sample.pause_seconds),
            ):
                assert figure > 0, (row.name, one.name, sample)
            assert sample.transferred_bytes >= sample.ios * row.block_bytes


def test_only_the_page_cache_copies(results: Results) -> None:
    for sample in results.samples:
        assert (sample.bytes_copied > 0) == (sample.contender == "page-cache"), sample


def test_descriptors_of_a_read_are_what_the_representation_promises(results: Results) -> None:
    for sample in results.samples:
        if "read" not in sample.row:
            continue
        # The kernel may cut a request for a loop device: an extent for each part, pages as before.
        pages = sample.transferred_bytes // 4096
        expected = sample.commands if sample.contender == "extent" else pages
        assert sample.descriptors == expected, sample


def test_the_large_devices_have_the_figures_of_the_question(results: Results) -> None:
    facts = {(one.contender, one.file_bytes): one for one in results.large_files}
    struct_page = facts["struct-page", 8 * GIB]
    assert struct_page.metadata_bytes == 128 << 20
    assert facts["struct-page", 400 * GIB].metadata_bytes == 6.25 * GIB
    for size in (8 * GIB, 400 * GIB):
        on_device = facts["struct-page memmap=device", size]
        assert on_device.share == 1 / 64
        assert on_device.metadata_device_bytes == (size - size // 64) // 64
        assert facts["struct-page compound=2MiB", size].share == 1 / 256
        assert facts["transient-page", size].peak_pool_bytes == 512 << 10
        for kind in KINDS:
            assert not facts[kind, size].skipped
    mebibyte = {kind: facts[kind, 8 * GIB].io(1 << 20) for kind in KINDS}
    assert mebibyte["pfn"].descriptor_bytes == 2048
    assert mebibyte["struct-page"].descriptor_bytes == 4096
    assert mebibyte["extent"].descriptor_bytes == 16
    assert {io.prp_entries for io in mebibyte.values()} == {256}
    assert {io.sgl_descriptors for io in mebibyte.values()} == {1}


def test_the_eager_table_is_resident_and_the_others_are_not(results: Results) -> None:
    for one in results.large_files:
        if one.file_bytes == 8 * GIB:
            eager = "eager" in one.contender
            assert (one.resident_bytes >= 128 << 20) == eager, one


def test_the_page_is_well_formed_and_has_every_representation(
    results: Results, world: World
) -> None:
    page = Page((world.output / "report.html").read_text())
    assert page.count("svg") > len(results.rows)
    for kind in KINDS:
        assert page.cells.count(kind) > len(results.rows)
    for cell in ("128 MiB", "6.25 GiB", "1/64 (1.56 %)", "512 KiB", "2,048"):
        assert cell in page.cells


def test_the_markdown_has_the_tables(results: Results, world: World) -> None:
    text = (world.output / "report.md").read_text()
    for title in ("At a glance", "A device of 400 GiB", "Descriptors of one read"):
        assert f"# {title}" in text
    for row in results.rows:
        assert text.count(f"| {row.title} | extent |") >= 2
    assert "| struct-page | 6.25 GiB | 1/64 (1.56 %) |" in text


def test_the_report_can_be_drawn_again_without_a_config(results: Results, world: World) -> None:
    with scratch() as directory:
        run(
            *(PMBLK, "compare", "--from", str(world.output / "results.json")),
            *("--output", str(directory / "again")),
        )
        for name in ("report.html", "report.md"):
            assert (directory / "again" / name).read_text() == (world.output / name).read_text()


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("8 GiB: pfn", signal.SIGTERM),  # large devices are being opened
        ("round 1: pfn", signal.SIGINT),  # fio is about to run
    ],
)
def test_an_interrupted_comparison_leaves_nothing_behind(
    moment: str, number: signal.Signals
) -> None:
    with scratch() as directory:
        world = World(directory)
        only = ["--only", "pfn", "--only", "extent", "--seconds", "0.3"]
        with world.compare(*only) as process:
            lines = output_of(process, moment, lambda _: interrupt(process, number))
        assert process.returncode == 128 + number, lines
        assert "interrupted: stopped half way, and tidied up\n" in lines
        assert not world.output.exists()
        world.check_nothing_is_left()


def test_a_comparison_whose_daemon_dies_says_so_and_leaves_nothing_behind() -> None:
    with scratch() as directory:
        world = World(directory)
        with world.compare("--only", "extent", "--rows", "loop", "--seconds", "0.3") as process:
            lines = output_of(
                process,
                "round 1: extent",
                lambda _: os.kill(daemon_in(world.temporary), signal.SIGKILL),
            )
        assert process.returncode == 1, lines
        assert "pmblk: the daemon of the comparison ended" in lines[-1]
        assert not world.output.exists()
        world.check_nothing_is_left()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--namespace", "other2"], 'did you mean "other"?'),
        (["--only", "extant"], "no representation extant"),
        (["--rows", "9k"], "no row matches"),
        (["--size", "1MiB"], "too little for a comparison"),
        (["--size", "1GB"], "is not a size"),
        (["--rounds", "0"], "1 of --rounds"),
        (["--output", "/proc/none"], "cannot write to /proc/none"),
    ],
)
def test_a_wrong_wish_is_refused_before_anything_is_made(arguments: list[str], words: str) -> None:
    with scratch() as directory:
        world = World(directory)
        with world.compare(*arguments) as process:
            output, _ = process.communicate()
        assert process.returncode == 2, output
        assert words in output
        assert output.count("\n") == 1
        assert not world.output.exists()
        world.check_nothing_is_left()
