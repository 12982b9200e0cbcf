"""What the benchmarks measure, the arithmetic on it, and the reports that it becomes."""

import re
from collections.abc import Mapping, Sequence

import pytest

from bench import (
    fuse_report,
    fuse_rows,
    nbd_report,
    nbd_rows,
    raid_report,
    raid_rows,
    report,
    samples,
)
from bench.fuse_rows import AUTO, FAST, NBDFUSE, QEMU, RAW
from bench.report import MET, MISSED, Load, Origin
from bench.samples import Sample

ORIGIN = Origin(
    machine="a machine",
    versions="pmblk 1",
    date="today",
    command="python -m bench.some",
    servers=["`pmblk serve`"],
    seconds=1.5,
    rounds=2,
)


def sample(iops: float, *, cpu_us: float = 5, others: float = 0) -> Sample:
    """A second of fio; a third of the server's CPU time is in user mode."""
    cpu = iops * cpu_us / 1e6
    return Sample(
        ios=round(iops),
        io_seconds=1,
        server_user_seconds=cpu / 3,
        server_system_seconds=cpu * 2 / 3,
        client_seconds=1,
        others_share=others,
    )


def lines_with(text: str, *words: str) -> list[str]:
    return [line for line in text.splitlines() if all(word in line for word in words)]


# ---- samples


def test_a_ratio_is_that_of_each_round_not_of_the_medians() -> None:
    runs = {"a": [sample(100), sample(400), sample(300)], "b": [sample(50), sample(100), sample(3)]}
    found = samples.ratio(runs, samples.iops, of="a", to="b")
    assert (found.least, found.middle, found.most) == (2, 4, 100)


def test_a_run_without_a_tick_of_cpu_time_is_infinitely_cheaper() -> None:
    runs = {"a": [sample(100)], "b": [sample(100, cpu_us=0)]}
    assert samples.ratio(runs, samples.cpu_us, of="a", to="b").middle == float("inf")


def test_the_parts_of_a_requests_cpu_time_are_its_whole() -> None:
    one = sample(1000, cpu_us=6)
    assert one.cpu_user_us == pytest.approx(2)
    assert one.cpu_system_us == pytest.approx(4)
    assert one.cpu_us == pytest.approx(6)


def test_in_as_many_rounds_everybody_is_first_once() -> None:
    names = ["a", "b", "c"]
    turns = [samples.rotated(names, index) for index in range(3)]
    assert [turn[0] for turn in turns] == names
    assert all(sorted(turn) == names for turn in turns)


# ---- the page


def test_a_section_goes_to_the_end_of_a_page_without_its_markers() -> None:
    page = report.splice("# A page\n", "figures", name="some")
    assert page == "# A page\n\n<!-- bench:some begin -->\nfigures\n<!-- bench:some end -->\n"


def test_a_page_that_is_not_there_begins_with_what_it_is() -> None:
    assert report.splice("", "figures", name="some").startswith("# Performance\n")


def test_a_section_replaces_that_of_its_name_and_nothing_else() -> None:
    page = report.splice("# A page\n", "old", name="one")
    page = report.splice(page, "other", name="two")
    again = report.splice(page, "new", name="one")
    assert again == page.replace("old", "new")
    assert report.splice(again, "new", name="one") == again


@pytest.mark.parametrize(
    "page",
    [
        "<!-- bench:some begin -->\n",
        "<!-- bench:some end -->\n",
        "<!-- bench:some end -->\n<!-- bench:some begin -->\n",
        "<!-- bench:some begin -->\n<!-- bench:some end -->\n" * 2,
    ],
)
def test_markers_that_are_no_pair_are_refused(page: str) -> None:
    with pytest.raises(ValueError, match="no pair"):
        report.splice(page, "figures", name="some")


@pytest.mark.parametrize(("others", "is_quiet"), [(0.04, True), (0.06, False)])
def test_a_machine_that_others_used_is_called_what_it_was(others: float, is_quiet: bool) -> None:
    text = report.origin_text(ORIGIN, [{"a": [sample(1, others=others)]}])
    assert ("not quiet" in text) is not is_quiet


# ---- rows


@pytest.mark.parametrize(
    "rows",
    [nbd_rows.ROWS, fuse_rows.ROWS, raid_rows.ROWS],
    ids=["nbd", "fuse", "raid"],
)
def test_every_row_has_a_name_of_its_own(rows: Sequence[Load]) -> None:
    assert len({row.name for row in rows}) == len(rows)


def test_every_target_is_about_contenders_of_its_row() -> None:
    rows: Sequence[fuse_rows.Row | raid_rows.Row] = (*fuse_rows.ROWS, *raid_rows.ROWS)
    for one in rows:
        for target in one.targets:
            assert {target.of, target.to} <= set(one.contenders)
    for row in fuse_rows.ROWS:
        if row.bytes_per_second_min is not None or row.cpu_us_max is not None:
            assert AUTO in row.contenders


def test_the_way_past_the_daemon_has_a_target_in_every_row() -> None:
    for row in fuse_rows.ROWS:
        assert [target.to for target in row.targets if target.of == FAST] == [RAW]


def test_who_maps_copies_is_in_no_row_of_mappings() -> None:
    mapped = [row for row in fuse_rows.ROWS if row.is_mapped]
    assert {row.contenders for row in mapped} == {(RAW, FAST, AUTO)}


# ---- NBD's report


def nbd_section(**iops: float) -> str:
    row = next(row for row in nbd_rows.ROWS if row.name == "4k-randread-qd32")
    rates = {"pmblk": 150e3, "nbdkit": 100e3, "qemu_nbd": 50e3, "ceiling": 300e3, **iops}
    runs = {name.replace("_", "-"): [sample(rate)] * 2 for name, rate in rates.items()}
    run = nbd_report.Run(origin=ORIGIN, spinners="spinners", results={row: runs}, first_io=[0.5])
    return nbd_report.section(run)


def test_a_target_that_is_just_reached_is_met() -> None:
    (line,) = lines_with(nbd_section(), "4K randread QD32", "≥ 1.5 x nbdkit")
    assert line.endswith(f"| {MET} |")


def test_a_target_that_rounding_would_meet_is_missed() -> None:
    (line, *_) = lines_with(nbd_section(pmblk=149.9e3), "4K randread QD32", "≥ 1.5 x nbdkit")
    assert " 1.50 (1.50 to 1.50) " in line
    assert line.endswith(f"| {MISSED} |")


def test_what_no_server_can_reach_with_this_client_is_said_to_be_out_of_reach() -> None:
    text = nbd_section(pmblk=110e3, ceiling=120e3)
    assert lines_with(text, "- 4K randread QD32: the target is 1.5 x nbdkit", "**out of reach**")


def test_targets_are_counted() -> None:
    # Throughput and first I/O are met; CPU time, the same for all of them here, is not.
    assert "**2 of 3 targets met.**" in nbd_section()


# ---- FUSE's report


def fuse_row(name: str) -> fuse_rows.Row:
    return next(row for row in fuse_rows.ROWS if row.name == name)


def fuse_section(
    row: fuse_rows.Row,
    rates: Mapping[str, float],
    *,
    cpu_us: float = 5,
    commands: int = 0,
    refusal: str = "",
    client: int = 0,
) -> str:
    """Whoever has no rate makes 100 kIOPS."""
    names = row.contenders
    runs = {name: [sample(rates.get(name, 100e3), cpu_us=cpu_us)] * 2 for name in names}
    return fuse_report.section(
        fuse_report.Run(
            origin=ORIGIN,
            cpus=fuse_report.Cpus(client=client, server=1),
            io_uring_refusal=refusal,
            results={row: runs},
            first_io={AUTO: [0.4, 0.6, 0.5]},
            fast_commands=commands,
        )
    )


def verdict_on(text: str, *words: str) -> str:
    (line,) = lines_with(text, *words)
    return line.removesuffix(" |").rpartition("| ")[2]


def test_the_targets_of_a_busy_row_are_judged_each() -> None:
    rates = {AUTO: 65e3, QEMU: 50e3, NBDFUSE: 22e3, RAW: 100e3, FAST: 94.9e3}
    text = fuse_section(fuse_row("libaio-4k-randread-qd32"), rates, cpu_us=7.5)
    assert verdict_on(text, "auto ≥ 1.3 x qemu-storage-daemon") == MET
    assert verdict_on(text, "auto ≥ 3 x nbdfuse") == MISSED
    assert verdict_on(text, "fast ≥ 0.95 x tmpfs") == MISSED
    assert verdict_on(text, "auto ≤ 7 us") == MISSED


@pytest.mark.parametrize(("iops", "verdict"), [(3814, MISSED), (3815, MET)])
def test_a_bandwidth_is_judged_in_decimal_units(iops: float, verdict: str) -> None:
    text = fuse_section(fuse_row("libaio-1m-read-qd4"), {AUTO: iops})
    assert verdict_on(text, "auto ≥ 4 GB/s") == verdict


def test_cpu_time_is_shown_in_its_parts_for_whoever_serves() -> None:
    text = fuse_section(fuse_row("libaio-4k-randwrite-qd32"), {}, cpu_us=6)
    header, _, line = text[text.index("### Server CPU") :].splitlines()[2:5]
    assert line.count("6.00 (6.00 to 6.00): 2.00 + 4.00") == 5
    assert "tmpfs" not in header
    assert "fast" not in header


def test_a_row_without_requests_has_no_table_of_their_cost() -> None:
    text = fuse_section(fuse_row("mmap-4k-randread-qd1"), {})
    assert "### Server CPU" not in text
    assert lines_with(text, "| mmap 4K randread | kIOPS |", "100 (100 to 100)")


@pytest.mark.parametrize(("commands", "verdict"), [(0, MET), (1, MISSED)])
def test_one_command_on_the_way_past_the_daemon_is_one_too_many(
    commands: int, verdict: str
) -> None:
    text = fuse_section(fuse_row("psync-4k-read-qd1"), {}, commands=commands)
    assert verdict_on(text, "no READ and no WRITE", f"{commands} commands") == verdict


def test_attaching_is_judged_by_its_median() -> None:
    text = fuse_section(fuse_row("psync-4k-read-qd1"), {})
    assert verdict_on(text, "| auto | 3 | 0.50 (0.40 to 0.60) |") == MET


def test_loop_devices_say_nothing_about_other_programs() -> None:
    text = fuse_section(fuse_row("loop-libaio-4k-randread-qd32"), {})
    assert "Other programs: unknown" in text
    assert lines_with(text, "| loop, libaio 4K randread QD32 |", "fast ≥ 0.85 x tmpfs", MET)


def test_why_io_uring_was_not_measured_is_said() -> None:
    row = fuse_row("psync-4k-read-qd1")
    assert re.search("io_uring is not allowed here: no", fuse_section(row, {}, refusal="no"))
    assert "io_uring" not in fuse_section(row, {})


@pytest.mark.parametrize(("client", "words"), [(0, "fio is pinned to CPU 0"), (1, "share CPU 1")])
def test_the_cpus_are_named(client: int, words: str) -> None:
    assert words in fuse_section(fuse_row("psync-4k-read-qd1"), {}, client=client)


# ---- the report of arrays


def raid_section(name: str, rates: Mapping[str, float], *, written: float = 2) -> str:
    """Every contender makes 1000 I/Os a second, if it has no rate."""
    row = next(row for row in raid_rows.ROWS if row.name == name)
    cost = raid_rows.Cost(2, written)
    return raid_report.section(
        raid_report.Run(
            origin=ORIGIN,
            cpu=1,
            parity="isa-l",
            results={row: {name: [sample(rates.get(name, 1000))] * 2 for name in row.contenders}},
            costs={row: dict.fromkeys(row.contenders, cost)},
        )
    )


def test_an_array_with_parity_is_judged_by_one_without_and_a_degraded_one_by_a_whole_one() -> None:
    text = raid_section("1m-write-qd1", {raid_rows.RAID5: 600})
    assert verdict_on(text, f"{raid_rows.RAID5} ≥ 0.6 x {raid_rows.RAID0}") == MET
    text = raid_section("1m-read-qd1", {raid_rows.DEGRADED: 499})
    assert verdict_on(text, f"{raid_rows.DEGRADED} ≥ 0.5 x {raid_rows.RAID5}") == MISSED


@pytest.mark.parametrize(("written", "verdict"), [(2, MET), (2.001, MISSED)])
def test_one_byte_that_a_member_writes_beyond_the_theory_is_one_too_many(
    written: float, verdict: str
) -> None:
    text = raid_section("4k-randwrite-qd32", {}, written=written)
    assert verdict_on(text, "members read and write ≤ 2 + 2") == verdict


@pytest.mark.parametrize(("iops", "verdict"), [(953, MISSED), (954, MET)])
def test_a_sweep_is_judged_by_its_speed(iops: float, verdict: str) -> None:
    text = raid_section("rebuild", {raid_rows.RAID5: iops})
    assert verdict_on(text, f"{raid_rows.RAID5} ≥ 1 GB/s") == verdict
    assert lines_with(text, "| rebuild | 5.00 (5.00 to 5.00)") == []  # only who takes part
    assert lines_with(text, "| rebuild |  | 5.00 (5.00 to 5.00) |  |")
