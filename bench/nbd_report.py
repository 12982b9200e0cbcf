"""NBD's figures as Markdown, each target beside what was reached. Pure: text in, text out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench.nbd_rows import (
    CEILING,
    FIRST_IO_SECONDS_MAX,
    OURS,
    PEER,
    SERVERS,
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
    Figure,
    Samples,
    client_share,
    cpu_us,
    iops,
    of_server,
    ratio,
    server_share,
)
from pmblkd.compare.spread import Spread, spread

PEERS = SERVERS[1:]
FIRST_IO = "### First I/O: from the exec of `pmblk serve` to a client that has read 4 KiB"
CEILING_NOISE = 1.05  # a server that is faster than the ceiling by less than this may be
CEILING_TEXT = f"""\
*{CEILING}* is no server to use: `bench/ceiling.c` answers in batches and stores nothing, and it
refuses structured replies, because fio's NBD engine is faster without. What it reaches is about
what this client can take. It is measured, not proven: a cleverer program may be a little faster."""
LIMITS = """\
*Busy* is the share of one CPU that the server and fio used (fio with its start, so a little over
100 % is possible). Where fio is near 100 %, the client is the bottleneck or a part of it, and
draws the ratios towards 1. Where a server is near 100 %, its time per I/O is no more than the
reciprocal of its rate. All of it is one connection and one job on a file in memory: no disk is
involved."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What was measured where. `first_io` are seconds, of each start."""

    origin: Origin
    spinners: str
    results: Results
    first_io: Sequence[float]


def section(run: Run) -> str:
    tables = "\n\n".join(_tables(run))
    awake = (
        f"*Awake*: {run.spinners} keep every CPU out of its sleep states, so that waking a CPU is"
        " no part of the figure."
    )
    parts = [
        "## NBD: pmblk, nbdkit and qemu-nbd",
        origin_text(run.origin, list(run.results.values())),
        f"{how_to_read(run.origin, tables)} {awake}",
        tables,
        LIMITS,
    ]
    return "\n\n".join(parts)


def _tables(run: Run) -> Iterator[str]:
    yield "### Throughput"
    yield _throughput(run)
    yield CEILING_TEXT
    yield from _missed(run)
    yield "### Server CPU time per I/O, in microseconds"
    yield _cpu(run)
    yield FIRST_IO
    yield _first_io(run)


def _throughput(run: Run) -> str:
    return table(
        [
            *("load", "unit", *SERVERS, CEILING),
            *(f"{OURS} / {peer}" for peer in PEERS),
            *(f"{CEILING} / {PEER}", "target", "result"),
        ],
        [_throughput_cells(run, row) for row in run.results],
    )


def _throughput_cells(run: Run, row: Row) -> list[str]:
    samples = run.results[row]
    ratios = {peer: _ratio(samples, peer, iops) for peer in PEERS}
    return [
        _title(row),
        unit(row),
        *(with_spread(of_server(samples, name, iops), rate(row)) for name in SERVERS),
        with_spread(of_server(samples, CEILING, iops), rate(row)) if CEILING in samples else "",
        *(with_spread(ratios[peer], two_places) for peer in PEERS),
        with_spread(_ceiling_ratio(samples), two_places) if CEILING in samples else "",
        f"≥ {row.ratio_min:.1f} x {PEER}",
        verdict(ratios[PEER].middle >= row.ratio_min),
    ]


def _ceiling_ratio(samples: Samples) -> Spread:
    return ratio(samples, iops, of=CEILING, to=PEER)


def _missed(run: Run) -> Iterator[str]:
    """Of each missed target: whether this client lets any server meet it."""
    lines = [
        f"- {_title(row)}: the target is {row.ratio_min:.1f} x {PEER}, {_reach(row, samples)}"
        for row, samples in run.results.items()
        if _ratio(samples, PEER, iops).middle < row.ratio_min
    ]
    if lines:
        yield "Missed targets and the ceiling:"
        yield "\n".join(lines)


def _reach(row: Row, samples: Samples) -> str:
    if CEILING not in samples:
        return "the ceiling was not measured."
    reach = _ceiling_ratio(samples)
    ceiling = f"the ceiling {with_spread(reach, two_places)}"
    if _ratio(samples, CEILING, iops).middle > CEILING_NOISE:
        return f"{ceiling}, but {OURS} is faster than that: it is no bound here."
    if row.ratio_min > reach.most:
        return f"{ceiling}: **out of reach** of any server with this client."
    if row.ratio_min > reach.middle:
        return f"{ceiling}: **out of reach** of any server in at least half of the rounds."
    return f"{ceiling}: within reach."


def _cpu(run: Run) -> str:
    return table(
        ["load", *SERVERS, f"{OURS} / {PEER}", "target", "result", *_BUSY],
        [_cpu_cells(run, row) for row in run.results],
    )


def _cpu_cells(run: Run, row: Row) -> list[str]:
    samples = run.results[row]
    ours = _ratio(samples, PEER, cpu_us)
    most = row.cpu_ratio_max
    return [
        _title(row),
        *(with_spread(of_server(samples, name, cpu_us), three_digits) for name in SERVERS),
        with_spread(ours, two_places),
        "" if most is None else f"≤ {most:.1f} x {PEER}",
        "" if most is None else verdict(ours.middle <= most),
        *(_busy(samples, name) for name in (OURS, PEER)),
    ]


_BUSY = [f"busy with {name}" for name in (OURS, PEER)]


def _busy(samples: Samples, name: str) -> str:
    server, client = (of_server(samples, name, share) for share in (server_share, client_share))
    return f"server {server.middle:.0%}, fio {client.middle:.0%}"


def _first_io(run: Run) -> str:
    seconds = spread(run.first_io)
    cells = [
        str(len(run.first_io)),
        with_spread(seconds, two_places),
        f"≤ {FIRST_IO_SECONDS_MAX:.1f} s",
        verdict(seconds.middle <= FIRST_IO_SECONDS_MAX),
    ]
    return table(["starts", "seconds", "target", "result"], [cells])


def _title(row: Row) -> str:
    return f"{block_text(row)} {row.rw} QD{row.queue_depth}" + (", awake" if row.awake else "")


def _ratio(samples: Samples, peer: str, figure: Figure) -> Spread:
    """Ours / the peer's."""
    return ratio(samples, figure, of=OURS, to=peer)
