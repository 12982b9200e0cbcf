"""Switching representations under load: clients see pauses, and never an error or a reconnect.

PMBLK_SWITCH_SECONDS is how long each of the two campaigns takes (5 if it is not set). What they
measured goes to standard output: `pytest -s`.
"""

import itertools
import os
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest

from pmblk import PmblkError
from pmblkd.compare import fio
from pmblkd.errors import WorkFailed
from pmblkd.reports import SwitchReport
from tests.harness.daemon import Daemon, running
from tests.harness.file_systems import (
    TREE,
    attached,
    check,
    checksums,
    copy_tree,
    forget_cached,
    guarded,
    make,
    mounted,
)
from tests.harness.nbd_raw import FUA, connected
from tests.harness.programs import assert_no_complaints, wait_for

pytestmark = pytest.mark.e2e

SECONDS = float(os.environ.get("PMBLK_SWITCH_SECONDS", "5"))
INTERVAL_SECONDS = 0.2
GRACE_SECONDS = 60
CONFIG = """
[[namespace]]
name = "data"
path = "{dir}/data.img"
size = "256MiB"
reserve = true

[nbd]
listen = ["unix:{dir}/nbd.sock"]

[fuse]
mountpoint = "{dir}/mnt"
"""
VARIANTS: Sequence[tuple[str, dict[str, Any]]] = (
    ("struct-page", {}),
    ("page-cache", {"arena": "1MiB"}),
    ("struct-page", {"memmap": "device"}),
    ("extent", {"fragments": 64}),
    ("struct-page", {"init": "eager"}),
    ("pfn", {}),
    ("struct-page", {"memmap": "device", "compound": "2MiB"}),
    ("transient-page", {"pool_pages": 2048}),
    ("struct-page", {"compound": "2MiB", "init": "eager"}),
    ("pfn", {"locking": "none"}),
    ("page-cache", {"arena": "16MiB"}),
    ("transient-page", {}),
    ("extent", {}),
)
VERIFY = (
    *("--bsrange=4k-64k", "--blockalign=4k", "--time_based", f"--runtime={SECONDS:g}"),
    *("--verify=crc32c", "--verify_fatal=1", "--verify_backlog=256", "--verify_state_save=0"),
)


def switch_while(load: "Future[fio.Result]", daemon: Daemon) -> list[SwitchReport]:
    """One variant after the other for as long as the load runs."""
    reports = []
    for kind, options in itertools.cycle(VARIANTS):
        if load.done():
            break
        reports.append(daemon.switch("data", kind, **options))
        wait([load], timeout=INTERVAL_SECONDS)
    return reports


def under_load(
    daemon: Daemon, arguments: Sequence[str], begun: Callable[[], bool]
) -> tuple[fio.Result, list[SwitchReport]]:
    """fio's result, and the switches that were made once it had begun."""
    with ThreadPoolExecutor() as executor:
        load = executor.submit(fio.run, [*arguments, *VERIFY], seconds=SECONDS + GRACE_SECONDS)
        wait_for(lambda: begun() or load.done())
        reports = switch_while(load, daemon)
        return load.result(), reports


def summarize(name: str, result: fio.Result, reports: Sequence[SwitchReport]) -> None:
    pauses = sorted(report.pause_seconds * 1000 for report in reports)
    builds = [report.build_seconds * 1000 for report in reports]
    print(
        f"\n{name}: {len(reports)} switches; pause median {statistics.median(pauses):.3f} ms, "
        f"p99 {pauses[int(len(pauses) * 0.99)]:.3f} ms, max {pauses[-1]:.3f} ms; "
        f"build median {statistics.median(builds):.3f} ms, max {max(builds):.3f} ms; "
        f"{result.write.ios} writes and {result.read.ios} verifying reads, no error"
    )


def assert_all_switched(daemon: Daemon, reports: Sequence[SwitchReport]) -> None:
    assert len(reports) >= len(VARIANTS), "every variant has served"
    for report, following in itertools.pairwise(reports):
        assert report.after == following.before
    stats = daemon.stats("data")
    assert stats.representation == reports[-1].after
    assert stats.namespace_counters.errors == 0
    assert stats.representation_counters is not None
    assert stats.representation_counters.pins == stats.representation_counters.unpins


# ---- the two campaigns


def test_nbd_clients_see_no_error_and_no_reconnect_while_every_kind_takes_over() -> None:
    with running(CONFIG) as daemon:
        arguments = ("--ioengine=nbd", f"--uri={daemon.uri()}", "--rw=randwrite", "--size=192m")
        load = [*arguments, "--iodepth=16", "--fsync=128"]
        result, reports = under_load(
            daemon, load, lambda: daemon.stats("data").namespace_counters.writes > 1000
        )
        summarize("NBD", result, reports)
        assert_all_switched(daemon, reports)
        # One to ask for the size, one for the I/O: fio's engine makes both before it starts.
        assert daemon.log.count("client connected") == 2
        assert_no_complaints(daemon)


def test_a_mounted_file_system_sees_no_error_while_every_kind_takes_over() -> None:
    with (
        running(CONFIG) as daemon,
        guarded(daemon, seconds=SECONDS + 2 * GRACE_SECONDS),
        attached(daemon, "data") as device,
    ):
        directory = daemon.directory / "fs"
        make("ext4", device)
        with mounted(device, directory):
            copy_tree(directory)
            arguments = (f"--directory={directory}", "--rw=randwrite", "--size=96m", "--direct=1")
            load = [*arguments, "--ioengine=libaio", "--iodepth=8", "--fsync=64"]
            result, reports = under_load(daemon, load, lambda: any(directory.glob("job.*")))
            summarize("ext4 over FUSE and loop", result, reports)
            assert_all_switched(daemon, reports)
        check("ext4", device)
        forget_cached(device)
        with mounted(device, directory):
            kept = checksums(directory / TREE.name)
        assert kept == checksums(TREE)
        assert_no_complaints(daemon)


# ---- what cannot be had


HUGE = """
[[namespace]]
name = "data"
path = "{dir}/data.img"
size = "6TiB"

[nbd]
listen = ["unix:{dir}/nbd.sock"]
"""


@pytest.mark.parametrize(
    ("kind", "options", "words", "failed"),
    [
        ("struct-page", {"init": "eager"}, "memory", True),
        ("struct-page", {"memmap": "device"}, "reserve = true", True),
        ("struct-pages", {}, 'did you mean "struct-page"', False),
        ("struct-page", {"int": "lazy"}, 'did you mean "init"', False),
        ("struct-page", {"init": "hasty"}, 'choose "lazy" or "eager"', False),
    ],
    ids=lambda value: str(value) if isinstance(value, str | dict) else "",
)
def test_what_cannot_take_over_leaves_the_old_one_serving(
    kind: str, options: dict[str, Any], words: str, failed: bool
) -> None:
    with running(HUGE) as daemon, connected(daemon.directory / "nbd.sock") as client:
        assert client.write(5 << 40, b"here", flags=FUA) == 0
        with pytest.raises(PmblkError) as refused:
            daemon.switch("data", kind, **options)
        assert words in str(refused.value)
        assert isinstance(refused.value, WorkFailed) == failed
        assert daemon.kind("data") == "extent"
        assert client.read(5 << 40, 4) == b"here"
        assert_no_complaints(daemon)


def test_what_is_bad_stays_bad_until_it_is_written_as_a_whole() -> None:
    """Poison goes from one representation to the next."""
    with running(CONFIG) as daemon, connected(Path(daemon.directory / "nbd.sock")) as client:
        daemon.poison("data", 8192, 1)
        for kind, options in VARIANTS:
            daemon.switch("data", kind, **options)
            assert client.ask(0, 8192, 512).error == 5
            assert client.write(8192, b"a part") == 5
        assert client.write(8192, bytes(4096)) == 0
        assert client.read(8192, 4096) == bytes(4096)
