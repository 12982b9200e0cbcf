"""The runs: for each load, in each round, each contender in turn; a live switch before each.

The turn is rotated from round to round, so that whatever else the machine does meets all of them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import msgspec

from pmblk import PmblkError
from pmblkd.compare import cpu, figures, fio
from pmblkd.compare.contenders import Contender, rotated
from pmblkd.compare.matrix import PATH_TITLES, Row
from pmblkd.compare.progress import Progress
from pmblkd.compare.results import Sample
from pmblkd.compare.stage import Stage
from pmblkd.errors import WorkFailed
from pmblkd.reports import StatsReport, SwitchReport

FIO_EXTRA_SECONDS = 60  # on top of its run time, before it is killed
OVERHEAD_SECONDS = 0.6  # of each run: the switch, fio's start, the counters
FILL_SECONDS = 300

Check = Callable[[], None]


def fill(stage: Stage, check: Check) -> None:
    """Write all of the device: no page is a hole, none pays for its first use."""
    load = ["--rw=write", "--bs=1m", "--iodepth=8", "--refill_buffers"]
    _run(stage, [*_nbd(stage), *load], FILL_SECONDS, check)


def available(
    stage: Stage, contenders: Sequence[Contender], check: Check
) -> tuple[list[Contender], list[str]]:
    """Those that can serve here, and of the others why they cannot."""
    possible, refusals = [], []
    for one in contenders:
        check()
        try:
            stage.switch(one)
            possible.append(one)
        except PmblkError as error:
            stage.check()
            refusals.append(f"{one.name}: {error}")
    return possible, refusals


def samples(
    stage: Stage,
    rows: Sequence[Row],
    contenders: Sequence[Contender],
    *,
    seconds: float,
    rounds: int,
    progress: Progress,
    check: Check,
) -> Iterator[Sample]:
    """All runs, in the order in which they are made. Raises WorkFailed, and what `check` does."""
    for row in rows:
        for index in range(rounds):
            for one in rotated(contenders, index):
                what = f"{row.path} {row.title}, round {index + 1}: {one.name}"
                with progress.step(what, expected_seconds=seconds + OVERHEAD_SECONDS) as step:
                    sample = _sample(stage, row, one, index + 1, seconds, check)
                    step.said = _said(sample, row)
                yield sample


def _said(sample: Sample, row: Row) -> str:
    rate, cost = figures.IOPS.of(sample, row), figures.CPU.of(sample, row)
    return f"{figures.fixed(rate)} IOPS, {figures.fixed(cost)} us CPU per I/O"


def _sample(
    stage: Stage, row: Row, contender: Contender, number: int, seconds: float, check: Check
) -> Sample:
    check()
    switched = stage.switch(contender)
    # A write is measured with a flush: what is kept back is a cost of what was written.
    before, clock = stage.stats(), cpu.clock(stage.pid)
    side = _side(stage, row, seconds, check)
    flushed = stage.flush_seconds() if row.way == "write" else 0.0
    spent, after = cpu.clock(stage.pid).since(clock), stage.stats()
    sample = _assembled(row, contender, number, side, spent, before, after, switched)
    return msgspec.structs.replace(sample, flush_seconds=flushed)


def _side(stage: Stage, row: Row, seconds: float, check: Check) -> fio.Side:
    target = _nbd(stage) if row.path == "nbd" else _loop(stage)
    result = _run(stage, [*target, *_load(row, seconds)], seconds + FIO_EXTRA_SECONDS, check)
    return result.read if row.way == "read" else result.write


def _run(stage: Stage, arguments: Sequence[str], seconds: float, check: Check) -> fio.Result:
    def check_both() -> None:
        check()
        stage.check()

    try:
        return fio.run(arguments, seconds=seconds, check=check_both)
    except fio.FioError as error:
        stage.check()
        raise WorkFailed(
            f"{PATH_TITLES['nbd' if '--ioengine=nbd' in arguments else 'loop']}: {error}"
        ) from error


def _nbd(stage: Stage) -> list[str]:
    namespace = stage.namespace
    return ["--ioengine=nbd", f"--uri={namespace.nbd[0]}", f"--size={namespace.size_bytes}"]


def _loop(stage: Stage) -> list[str]:
    """A device that has vanished must not come back as a file of that name."""
    target = ["--ioengine=libaio", "--direct=1", f"--filename={stage.device}"]
    return [*target, "--allow_file_create=0", f"--size={stage.namespace.size_bytes}"]


def _load(row: Row, seconds: float) -> list[str]:
    return [
        f"--rw=rand{row.way}",
        f"--bs={row.block_bytes}",
        f"--iodepth={row.queue_depth}",
        "--norandommap",  # no bookkeeping in the client, which has enough to do
        "--time_based",
        f"--runtime={round(seconds * 1000)}ms",
    ]


def _assembled(
    row: Row,
    contender: Contender,
    number: int,
    side: fio.Side,
    spent: cpu.Clock,
    before: StatsReport,
    after: StatsReport,
    switched: SwitchReport,
) -> Sample:
    did = _difference(before.namespace_counters, after.namespace_counters)
    now = after.representation_counters
    assert before.representation_counters is not None
    assert now is not None, "what is compared lies in memory"
    cost = _difference(before.representation_counters, now)
    return Sample(
        row=row.name,
        contender=contender.name,
        round=number,
        **_same(side),
        server_seconds=spent.server,
        client_seconds=spent.client,
        others_share=spent.others_share,
        commands=did["reads"] + did["writes"],
        transferred_bytes=did["read_bytes"] + did["write_bytes"],
        bytes_copied=cost["bytes_copied"],
        descriptors=cost["descriptors_built"],
        descriptor_bytes=cost["descriptor_bytes"],
        pins=cost["pins"],
        prp_entries=did["prp_entries"],
        sgl_descriptors=cost["sgl_descriptors"],
        cache_hits=cost["cache_hits"],
        cache_misses=cost["cache_misses"],
        metadata_bytes=now.metadata_bytes,
        metadata_resident_bytes=now.metadata_resident_bytes,
        metadata_device_bytes=now.metadata_device_bytes,
        build_seconds=switched.build_seconds,
        pause_seconds=switched.pause_seconds,
    )


def _same(side: fio.Side) -> dict[str, Any]:
    """All that fio tells but the rate, which follows from it."""
    return {name: value for name, value in asdict(side).items() if name != "iops"}


def _difference(before: object, after: object) -> dict[str, int]:
    """What each counter has grown by."""
    names = type(after).__struct_fields__  # type: ignore[attr-defined]
    return {name: getattr(after, name) - getattr(before, name) for name in names}
