"""Figures of arrays as Markdown, each target with what was reached. Pure: text in, text out."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bench.raid_rows import CONTENDERS, RAID5, Cost, Costs, Results, Row
from bench.report import (
    Origin,
    block_text,
    how_to_read,
    origin_text,
    rate,
    table,
    three_digits,
    unit,
    verdict,
    with_spread,
)
from bench.samples import Samples, cpu_us, iops, of_server
from bench.targets import bytes_cells, ratio_cells

LIMITS = """\
The array's own interface is called, in one process: no front end, no socket. There is no bitmap and
no journal, so the figures are those of planning, parity and member I/O. The members are files in
memory, whose I/O is a copy: no disk is involved. A rebuild counts bytes of the member that is
filled, a check those of the array, as `pmblk raid status` does. CPU time is all that there is, and
says more than the throughput where other programs had a share of the CPU."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What was measured where. `parity`: what computes it."""

    origin: Origin
    cpu: int
    parity: str
    results: Results
    costs: Costs


def section(run: Run) -> str:
    tables = "\n\n".join(_tables(run))
    return "\n\n".join(
        [
            "## RAID: arrays over members in memory",
            origin_text(run.origin, list(run.results.values())),
            f"{how_to_read(run.origin, tables)} Everything is on CPU {run.cpu}; parity is computed"
            f" by {run.parity}.",
            tables,
            LIMITS,
        ]
    )


def _tables(run: Run) -> Iterator[str]:
    yield "### Throughput of an array"
    yield _throughput(run)
    yield "### CPU time, in microseconds for each I/O (a sweep: for each MiB)"
    yield _by_contender(run, _cpu_cell)
    yield "### Bytes that the members read + write, for each byte"
    yield _by_contender(run, lambda row, _samples, name: _cost_text(run.costs[row][name]))
    yield "### Targets"
    yield table(["load", "target", "reached", "result"], list(_targets(run)))


def _throughput(run: Run) -> str:
    return table(
        ["load", "unit", *CONTENDERS],
        [
            [_title(row), unit(row), *(_rate_cell(row, samples, name) for name in CONTENDERS)]
            for row, samples in run.results.items()
        ],
    )


def _rate_cell(row: Row, samples: Samples, name: str) -> str:
    return with_spread(of_server(samples, name, iops), rate(row)) if name in samples else ""


def _by_contender(run: Run, cell: Callable[[Row, Samples, str], str]) -> str:
    return table(
        ["load", *CONTENDERS],
        [
            [
                _title(row),
                *(cell(row, samples, name) if name in samples else "" for name in CONTENDERS),
            ]
            for row, samples in run.results.items()
        ],
    )


def _cpu_cell(_row: Row, samples: Samples, name: str) -> str:
    return with_spread(of_server(samples, name, cpu_us), three_digits)


def _cost_text(cost: Cost) -> str:
    return f"{cost.read:.2f} + {cost.written:.2f}"


def _title(row: Row) -> str:
    return row.work if row.is_sweep else f"{block_text(row)} {row.work} QD{row.batch}"


# ---- the targets: load, target, what was reached, verdict


def _targets(run: Run) -> Iterator[list[str]]:
    for row, samples in run.results.items():
        yield from (ratio_cells(_title(row), samples, target) for target in row.targets)
        if row.bytes_per_second_min is not None:
            least = row.bytes_per_second_min
            yield bytes_cells(_title(row), row, samples, of=RAID5, least=least)
        if row.cost_max is not None:
            yield _cost_cells(row, run.costs[row][RAID5], row.cost_max)


def _cost_cells(row: Row, reached: Cost, most: Cost) -> list[str]:
    return [
        _title(row),
        f"{RAID5}: members read and write ≤ {most.read:g} + {most.written:g} bytes a byte",
        _cost_text(reached),
        verdict(reached.read <= most.read and reached.written <= most.written),
    ]
