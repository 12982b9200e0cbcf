"""What people get to read: what is shown, what is left out, and that it fits 80 columns."""

import msgspec

from pmblk.counters import Counters
from pmblk.description import describe as engine
from pmblk.representations import RepresentationCounters
from pmblkd import report_of, views
from pmblkd.reports import (
    DetachAllReport,
    FuseReport,
    Refusal,
    ReloadReport,
    RepresentationReport,
    StatsReport,
    SwitchReport,
)
from tests.unit.conftest import MakeNamespace
from tests.unit.reports import namespace_report

EXTENT = RepresentationReport(kind="extent", options={"fragments": 1})
CUT_UP = RepresentationReport(kind="extent", options={"fragments": 4})


def stats(**representation: int) -> StatsReport:
    return StatsReport(
        name="ns1",
        representation=EXTENT,
        namespace_counters=Counters(reads=12345, read_bytes=4096 * 12345, waits=1, prp_entries=1),
        representation_counters=RepresentationCounters(**representation),
    )


def assert_fits(view: str) -> None:
    for line in view.splitlines():
        assert len(line) <= 80, line


def test_stats_leave_out_what_never_happened_and_keep_what_is_always_asked_for() -> None:
    view = views.stats(stats())
    assert_fits(view)
    assert "reads                         12,345    48.2 MiB" in view
    for word in ("writes", "flushes", "errors", "copied", "metadata"):
        assert word in view
    for word in ("zeroes", "cache", "poisoned", "pins"):
        assert word not in view


def test_stats_show_what_happened_with_its_size() -> None:
    view = views.stats(stats(pins=10, unpins=8, peak_pins=5, poisoned_bytes=8192))
    assert_fits(view)
    assert "2 now, 5 at most" in view
    assert view.splitlines()[-1].split() == ["poisoned", "8", "KiB"]


def test_a_switch_is_one_line_with_the_options_that_are_not_the_defaults() -> None:
    report = SwitchReport(
        name="ns1", before=CUT_UP, after=EXTENT, build_seconds=0.003, pause_seconds=0.00041
    )
    assert (
        views.switched(report)
        == "ns1: extent (fragments 4) -> extent, built in 3 ms, paused 0.41 ms"
    )


def test_a_list_names_the_exports_and_of_one_that_drains_the_users() -> None:
    nbd, fuse = (
        ["nbd://h:1/ns1"],
        FuseReport(path="/m/ns1", engine="kernel", discards=True, dax="dax", dax_reason=""),
    )
    view = views.namespaces([namespace_report(nbd=nbd, fuse=fuse, reserve_bytes=4096)], columns=80)
    assert_fits(view)
    assert {"nbd://h:1/ns1", "/m/ns1"} <= set(view.split())
    assert "4 KiB reserve" in view
    draining = namespace_report(nbd=nbd, fuse=fuse, draining=True, users=1)
    view = views.namespaces([draining], columns=80)
    assert "draining: 1 user left, no new ones" in view
    assert "nbd://" not in view


def test_a_list_says_what_has_failed() -> None:
    reason = "somebody truncated /dev/shm/ns1.img from 1073741824 to 4096 bytes"
    view = views.namespaces([namespace_report(failure=reason)], columns=80)
    assert_fits(view)
    assert f"failed: {reason}" in " ".join(view.split())
    assert "failed" not in views.namespaces([namespace_report()], columns=80)


def describe(namespace: MakeNamespace, offset: int, length: int, **options: int) -> str:

    one = namespace(options=options)
    one.media.reserve(0, 64 << 10)
    view = views.description(report_of.description(one, engine(one, offset, length)))
    assert_fits(view)
    return view


def test_a_short_description_needs_no_list(make_namespace: MakeNamespace) -> None:
    view = describe(make_namespace, 0, 4096)
    assert "PRP           1 entry, 0 list pages" in view
    assert "SGL           1 descriptor" in view
    assert "more" not in view


def test_a_long_description_is_cut_and_says_how_much_is_missing(
    make_namespace: MakeNamespace,
) -> None:
    view = describe(make_namespace, 0, 64 << 10)
    assert "PRP           16 entries, 1 list page" in view
    assert "0x0000000100000030  0x" in view, "the seventh entry, at its place in the list"
    assert "    ... 8 more" in view


def test_a_hole_is_described_as_nothing(make_namespace: MakeNamespace) -> None:
    view = describe(make_namespace, 512 << 10, 4096)
    assert "PRP           none: the range has no memory: it is a hole" in view
    assert "Linux" not in view


def test_a_reload_is_a_line_a_change_with_what_was_refused_at_the_end() -> None:
    nothing = ReloadReport(
        added=[], removed=[], draining=[], switched=[], grown=[], changed=[], refused=[]
    )
    assert views.reloaded(nothing) == "nothing has changed"
    some = msgspec.structs.replace(
        nothing,
        added=["a"],
        draining=["b"],
        changed=["nbd.listen"],
        refused=[Refusal(key="fuse.mountpoint", reason="needs a restart")],
    )
    assert views.reloaded(some).splitlines() == [
        "a: added",
        "b: draining, until its users have left",
        "nbd.listen: changed",
        "fuse.mountpoint: refused, needs a restart",
    ]


def test_what_could_not_be_detached_comes_last_with_its_reason() -> None:
    report = DetachAllReport(
        devices=["/dev/loop8"],
        unmounted=["/mnt"],
        aborted=["/mnt"],
        refused=[Refusal(key="/dev/loop9", reason="is mounted on /fs; run: umount /fs")],
    )
    assert views.all_detached(report).splitlines() == [
        "/mnt: aborted, its daemon did not answer",
        "/dev/loop8",
        "/mnt: unmounted, it had lost its daemon",
        "/dev/loop9: refused, is mounted on /fs; run: umount /fs",
    ]
    nothing = DetachAllReport(devices=[], unmounted=[], aborted=[], refused=[])
    assert views.all_detached(nothing) == "nothing is attached"
