"""FUSE's figures as Markdown, each target with what was reached. Pure: text in, text out."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from bench.fuse_rows import (
    AUTO,
    CONTENDERS,
    FAST,
    FIRST_IO_SECONDS_MAX,
    RAW,
    Results,
    Row,
)
from bench.report import (
    Origin,
    block_text,
    how_to_read,
    origin_text,
    rate,
    table,
    three_digits,
    two_places,
    unit,
    verdict,
    with_spread,
)
from bench.samples import (
    Samples,
    client_share,
    cpu_system_us,
    cpu_us,
    cpu_user_us,
    iops,
    of_server,
    server_share,
)
from bench.targets import bytes_cells, ratio_cells
from pmblkd.compare.spread import spread

SERVERS = tuple(name for name in CONTENDERS if name not in (RAW, FAST))
LIMITS = f"""\
*{RAW}* is the file in memory itself: no server takes part. Nor does any in the reads and writes of
*{FAST}*: what they lack of {RAW}'s figure is the kernel's own way through FUSE, a second file's
checks and attributes for each call (`perf record -C 0` beside such a row shows it). A mapping
(mmap) of the other servers' files is one of copies in the page cache, or is refused: they are not
in those rows. Above a loop device the kernel's own threads do the I/O, on any CPU.

*Busy* is the share of one CPU that the server and fio used (fio with its start). Everything is one
job on a file in memory: no disk is involved."""


@dataclass(frozen=True)
class Cpus:
    """Where fio and where the servers run."""

    client: int
    server: int


@dataclass(frozen=True, kw_only=True)
class Run:
    """What was measured where.

    `first_io` are seconds from attach on, of each start of a contender. `fast_commands`: how many
    reads and writes the daemon saw of a file that is opened past it. `io_uring_refusal` is empty
    where its rows were measured, or not asked for.
    """

    origin: Origin
    cpus: Cpus
    io_uring_refusal: str
    results: Results
    first_io: Mapping[str, Sequence[float]]
    fast_commands: int


def section(run: Run) -> str:
    tables = "\n\n".join(_tables(run))
    quiet = [samples for row, samples in run.results.items() if not row.on_loop]
    parts = [
        "## FUSE: pmblk's files, qemu-storage-daemon and nbdfuse",
        origin_text(run.origin, quiet),
        f"{how_to_read(run.origin, tables)} {_pinned(run.cpus)}",
        tables,
        *(
            [f"io_uring is not allowed here: {run.io_uring_refusal}"]
            if run.io_uring_refusal
            else []
        ),
        LIMITS,
    ]
    return "\n\n".join(parts)


def _tables(run: Run) -> Iterator[str]:
    yield "### Throughput of a file"
    yield _throughput(run)
    yield "### Targets"
    yield table(["load", "target", "reached", "result"], list(_targets(run)))
    if any(row.is_small_and_busy for row in run.results):
        yield "### Server CPU time per request, in microseconds: in user mode + in the kernel"
        yield _cpu(run)
    yield "### From the start of `pmblk attach` to a finished O_DIRECT read of the block device"
    yield _first_io(run)


def _pinned(cpus: Cpus) -> str:
    if cpus.client == cpus.server:
        return f"fio and the servers share CPU {cpus.client}: there is no other."
    return f"fio is pinned to CPU {cpus.client}, the servers to CPU {cpus.server}."


def _throughput(run: Run) -> str:
    return table(
        ["load", "unit", *CONTENDERS],
        [
            [
                _title(row),
                unit(row),
                *(_rate_cell(row, samples, name) for name in CONTENDERS),
            ]
            for row, samples in run.results.items()
        ],
    )


def _rate_cell(row: Row, samples: Samples, name: str) -> str:
    return with_spread(of_server(samples, name, iops), rate(row)) if name in samples else ""


def _title(row: Row) -> str:
    depth = "" if row.is_mapped else f" QD{row.queue_depth}"
    place = "loop, " if row.on_loop else ""
    return f"{place}{row.engine} {block_text(row)} {row.rw}{depth}"


# ---- the targets: load, target, what was reached, verdict


def _targets(run: Run) -> Iterator[list[str]]:
    for row, samples in run.results.items():
        yield from (ratio_cells(_title(row), samples, target) for target in row.targets)
        if row.bytes_per_second_min is not None:
            least = row.bytes_per_second_min
            yield bytes_cells(_title(row), row, samples, of=AUTO, least=least)
        if row.cpu_us_max is not None:
            yield _cpu_target_cells(row, samples, row.cpu_us_max)
    yield [
        "all of them",
        f"{FAST}: no READ and no WRITE reaches the daemon",
        f"{run.fast_commands} commands",
        verdict(run.fast_commands == 0),
    ]


def _cpu_target_cells(row: Row, samples: Samples, most: float) -> list[str]:
    reached = of_server(samples, AUTO, cpu_us)
    return [
        _title(row),
        f"{AUTO} ≤ {most:g} us of CPU time per request",
        with_spread(reached, three_digits),
        verdict(reached.middle <= most),
    ]


# ---- CPU time and attaching


def _cpu(run: Run) -> str:
    return table(
        ["load", *SERVERS, f"busy with {AUTO}"],
        [
            [
                _title(row),
                *(_cpu_cell(samples, name) for name in SERVERS),
                _busy(samples),
            ]
            for row, samples in run.results.items()
            if row.is_small_and_busy
        ],
    )


def _cpu_cell(samples: Samples, name: str) -> str:
    """Parts are medians of their own: they need not add up to that of the whole."""
    whole, user, system = (
        of_server(samples, name, figure) for figure in (cpu_us, cpu_user_us, cpu_system_us)
    )
    parts = f"{three_digits(user.middle)} + {three_digits(system.middle)}"
    return f"{with_spread(whole, three_digits)}: {parts}"


def _busy(samples: Samples) -> str:
    server, client = (of_server(samples, AUTO, share) for share in (server_share, client_share))
    return f"server {server.middle:.0%}, fio {client.middle:.0%}"


def _first_io(run: Run) -> str:
    return table(
        ["file", "starts", "seconds", "target", "result"],
        [_first_io_cells(name, seconds) for name, seconds in run.first_io.items()],
    )


def _first_io_cells(name: str, seconds: Sequence[float]) -> list[str]:
    reached = spread(seconds)
    return [
        name,
        str(len(seconds)),
        with_spread(reached, two_places),
        f"≤ {FIRST_IO_SECONDS_MAX:g} s",
        verdict(reached.middle <= FIRST_IO_SECONDS_MAX),
    ]
