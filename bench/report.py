"""The figures as Markdown, each target beside what was reached. Pure: text in, text out."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from bench.rows import (
    CEILING,
    FIRST_IO_SECONDS_MAX,
    OURS,
    PEER,
    SERVERS,
    Results,
    Row,
    Samples,
    client_share,
    cpu_us,
    iops,
    of_server,
    others,
    ratio,
    server_share,
)
from pmblkd.compare.spread import Spread, spread

QUIET_SHARE_MIDDLE, QUIET_SHARE_MOST = 0.05, 0.25  # of one CPU, in the hands of others
BEGIN, END = "<!-- bench:nbd begin -->", "<!-- bench:nbd end -->"
PEERS = SERVERS[1:]
INTRO = """\
# Performance

What pmblk reaches on one machine, side by side with other NBD servers in the same minutes. The
figures below are written by `make bench`: run it to have yours.
"""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What was measured where. `first_io` are seconds, of each start."""

    machine: str
    versions: str
    date: str
    command: str
    servers: Sequence[str]
    spinners: str
    seconds: float
    rounds: int
    results: Results
    first_io: Sequence[float]


def splice(text: str, section: str) -> str:
    """`text` with the section between its markers, at the end where it has none.

    Raises ValueError for a text with only one of the markers, or with one twice.
    """
    counts = text.count(BEGIN), text.count(END)
    block = f"{BEGIN}\n{section}\n{END}\n"
    if counts == (0, 0):
        return f"{text or INTRO}\n{block}"
    if counts != (1, 1) or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the markers {BEGIN} and {END} are no pair")
    return text[: text.index(BEGIN)] + block + text[text.index(END) + len(END) :].removeprefix("\n")


def section(run: Run) -> str:
    tables = "\n\n".join(_tables(run))
    met, missed = (tables.count(f"| {verdict} |") for verdict in (MET, MISSED))
    parts = [
        "## NBD: pmblk, nbdkit and qemu-nbd",
        "\n".join(_origin(run)),
        f"**{met} of {met + missed} targets met.** {_how_to_read(run)}",
        tables,
        LIMITS,
    ]
    return "\n\n".join(parts)


MET, MISSED = "met", "**missed**"
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


def _tables(run: Run) -> Iterator[str]:
    yield "### Throughput"
    yield _throughput(run)
    yield CEILING_TEXT
    yield from _missed(run)
    yield "### Server CPU time per I/O, in microseconds"
    yield _cpu(run)
    yield FIRST_IO
    yield _first_io(run)


def _origin(run: Run) -> list[str]:
    return [
        f"- Machine: {run.machine}",
        f"- Other programs: {_others(run)}",
        f"- Versions: {run.versions}",
        f"- Made by: `{run.command}` on {run.date}",
        *(f"- Server: {server}" for server in run.servers),
    ]


def _others(run: Run) -> str:
    share = others(run.results)
    text = f"{share.middle:.0%} of one CPU during a run (at most {share.most:.0%})"
    quiet = share.middle <= QUIET_SHARE_MIDDLE and share.most <= QUIET_SHARE_MOST
    return text if quiet else f"{text}; **the machine was not quiet**"


def _how_to_read(run: Run) -> str:
    return (
        f"Medians over {run.rounds} rounds of {run.seconds:g} s, every server in turn in each"
        " round, their order rotated. A ratio is the median of the rounds' ratios. In brackets:"
        " least and most. Targets are met or missed before rounding. *Awake*:"
        f" {run.spinners} keep every CPU out of its sleep states, so that waking a CPU is no part"
        " of the figure."
    )


def _throughput(run: Run) -> str:
    return _table(
        [
            *("load", "unit", *SERVERS, CEILING),
            *(f"{OURS} / {peer}" for peer in PEERS),
            *(f"{CEILING} / {PEER}", "target", "result"),
        ],
        [_throughput_cells(run, row) for row in run.results],
    )


def _throughput_cells(run: Run, row: Row) -> list[str]:
    samples = run.results[row]
    ratios = {peer: ratio(samples, peer, iops) for peer in PEERS}
    return [
        _title(row),
        _unit(row),
        *(_with_spread(of_server(samples, name, iops), _rate(row)) for name in SERVERS),
        _with_spread(of_server(samples, CEILING, iops), _rate(row)) if CEILING in samples else "",
        *(_with_spread(ratios[peer], _two_places) for peer in PEERS),
        _with_spread(_ceiling_ratio(samples), _two_places) if CEILING in samples else "",
        f"≥ {row.ratio_min:.1f} x {PEER}",
        _verdict(ratios[PEER].middle >= row.ratio_min),
    ]


def _ceiling_ratio(samples: Samples) -> Spread:
    return ratio(samples, PEER, iops, of=CEILING)


def _missed(run: Run) -> Iterator[str]:
    """Of each missed target: whether this client lets any server meet it."""
    lines = [
        f"- {_title(row)}: the target is {row.ratio_min:.1f} x {PEER}, {_reach(row, samples)}"
        for row, samples in run.results.items()
        if ratio(samples, PEER, iops).middle < row.ratio_min
    ]
    if lines:
        yield "Missed targets and the ceiling:"
        yield "\n".join(lines)


def _reach(row: Row, samples: Samples) -> str:
    if CEILING not in samples:
        return "the ceiling was not measured."
    reach = _ceiling_ratio(samples)
    ceiling = f"the ceiling {_with_spread(reach, _two_places)}"
    if ratio(samples, CEILING, iops).middle > CEILING_NOISE:
        return f"{ceiling}, but {OURS} is faster than that: it is no bound here."
    if row.ratio_min > reach.most:
        return f"{ceiling}: **out of reach** of any server with this client."
    if row.ratio_min > reach.middle:
        return f"{ceiling}: **out of reach** of any server in at least half of the rounds."
    return f"{ceiling}: within reach."


def _cpu(run: Run) -> str:
    return _table(
        ["load", *SERVERS, f"{OURS} / {PEER}", "target", "result", *_BUSY],
        [_cpu_cells(run, row) for row in run.results],
    )


def _cpu_cells(run: Run, row: Row) -> list[str]:
    samples = run.results[row]
    ours = ratio(samples, PEER, cpu_us)
    most = row.cpu_ratio_max
    return [
        _title(row),
        *(_with_spread(of_server(samples, name, cpu_us), three_digits) for name in SERVERS),
        _with_spread(ours, _two_places),
        "" if most is None else f"≤ {most:.1f} x {PEER}",
        "" if most is None else _verdict(ours.middle <= most),
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
        _with_spread(seconds, _two_places),
        f"≤ {FIRST_IO_SECONDS_MAX:.1f} s",
        _verdict(seconds.middle <= FIRST_IO_SECONDS_MAX),
    ]
    return _table(["starts", "seconds", "target", "result"], [cells])


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _title(row: Row) -> str:
    size = f"{row.block_kib}K" if row.block_kib < 1024 else f"{row.block_kib // 1024}M"
    return f"{size} {row.rw} QD{row.queue_depth}" + (", awake" if row.awake else "")


def _verdict(is_met: bool) -> str:
    return MET if is_met else MISSED


def _with_spread(values: Spread, form: Callable[[float], str]) -> str:
    return f"{form(values.middle)} ({form(values.least)} to {form(values.most)})"


def _rate(row: Row) -> Callable[[float], str]:
    """In the unit that people use for such blocks."""
    if row.block_kib == 4:
        return lambda rate: three_digits(rate / 1e3)
    return lambda rate: three_digits(rate * row.block_kib * 1024 / 1e9)


def _unit(row: Row) -> str:
    return "kIOPS" if row.block_kib == 4 else "GB/s"


def rate_text(row: Row, rate: float) -> str:
    return f"{_rate(row)(rate)} {_unit(row)}"


def three_digits(value: float) -> str:
    places = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{places}f}"


def _two_places(value: float) -> str:
    return f"{value:.2f}"
