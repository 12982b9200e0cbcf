"""The recipes of docs/dax.md, run as they stand; only their paths are other ones."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.daemon import PMBLK, Daemon, running
from tests.harness.file_systems import attached, drop_loop, guarded
from tests.harness.programs import assert_no_complaints, program

pytestmark = pytest.mark.e2e

PAGE = Path(__file__).parents[2] / "docs/dax.md"
RECIPES = dict(re.findall(r"<!-- recipe: (\w+) -->.*?```sh\n(.*?)```", PAGE.read_text(), re.DOTALL))
CONFIG = """
[[namespace]]
name = "ns1"
path = "{dir}/ns1.img"
size = "64MiB"

[[namespace]]
name = "device"
path = "{dir}/device.img"
size = "64MiB"

[nbd]
listen = ["unix:{dir}/nbd.sock"]

[fuse]
mountpoint = "{dir}/mnt"
"""


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    with running(CONFIG) as daemon, guarded(daemon, seconds=60):
        yield daemon
        assert_no_complaints(daemon)


def follow(daemon: Daemon, recipe: str, **others: str) -> str:
    """Run the recipe in the daemon's world; `others` are further paths of it."""
    directory = str(daemon.directory)
    replaced = {
        "/run/pmblk/mnt": f"{directory}/mnt",
        "/mnt/pmblk": f"{directory}/fs",
        **others,
    }
    text = RECIPES[recipe]
    for here, there in replaced.items():
        text = text.replace(here, there)
    pmblk = f'pmblk() {{ command "{PMBLK}" "$@" --socket "{daemon.socket}"; }}'
    return program("bash", "-euc", f"{pmblk}\n{text}", seconds=60)


def test_the_page_has_the_recipes() -> None:
    assert set(RECIPES) == {"mmap", "libpmem", "direct", "loop", "python"}


@pytest.mark.parametrize(("recipe", "laid_out"), [("mmap", 0), ("libpmem", 64 << 20)])
def test_fio_verifies_through_a_mapping(daemon: Daemon, recipe: str, laid_out: int) -> None:
    """With libpmem, fio first writes the file from end to end, whatever its size was."""
    assert "err= 0" in follow(daemon, recipe)
    stats = daemon.stats("ns1").namespace_counters
    assert (stats.reads, stats.write_bytes) == (0, laid_out), "no mapped byte came by"
    assert any((daemon.directory / "ns1.img").read_bytes())


def test_fio_moves_bytes_between_a_device_and_mapped_memory(daemon: Daemon) -> None:
    with attached(daemon, "device") as device:
        assert "err= 0" in follow(daemon, "direct", **{"/dev/loop0": str(device)})
    written = (daemon.directory / "device.img").read_bytes()
    assert written[-(1 << 20) :] in (daemon.directory / "ns1.img").read_bytes()


def test_a_file_system_on_an_attached_namespace(daemon: Daemon) -> None:
    try:
        follow(daemon, "loop")
    except AssertionError:
        program("umount", f"{daemon.directory}/fs")
        for line in program("losetup", "--list", "--noheadings", "-O", "NAME,BACK-FILE").split(
            "\n"
        ):
            if str(daemon.directory) in line:
                drop_loop(Path(line.split()[0]))
        raise
    assert str(daemon.directory) not in program("losetup", "--list")


def test_python_stores_to_the_media(daemon: Daemon) -> None:
    follow(daemon, "python")
    assert (daemon.directory / "ns1.img").read_bytes()[4096:4101] == b"hello"
