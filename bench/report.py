"""What the reports of all benchmarks are made of. Pure: text in, text out.

A report is a section of docs/performance.md between two markers of its own; the rest of the page is
left alone.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from bench.samples import Samples, others
from pmblkd.compare.spread import Spread

MET, MISSED = "met", "**missed**"
QUIET_SHARE_MIDDLE, QUIET_SHARE_MOST = 0.05, 0.25  # of one CPU, in the hands of others
INTRO = """\
# Performance

What pmblk reaches on one machine, side by side with other servers in the same minutes. The figures
below are written by `make bench`: run it to have yours.
"""


class Load(Protocol):
    """What a row of any benchmark has: a name for --rows, and the size of its blocks."""

    @property
    def name(self) -> str: ...
    @property
    def block_kib(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where figures come from. `servers` are their command lines, as Markdown."""

    machine: str
    versions: str
    date: str
    command: str
    servers: Sequence[str]
    seconds: float
    rounds: int


def splice(text: str, section: str, *, name: str) -> str:
    """`text` with the section between the markers of this name, at the end where it has none.

    Raises ValueError for a text with only one of the markers, or with one twice.
    """
    begin, end = f"<!-- bench:{name} begin -->", f"<!-- bench:{name} end -->"
    counts = text.count(begin), text.count(end)
    block = f"{begin}\n{section}\n{end}\n"
    if counts == (0, 0):
        return f"{text or INTRO}\n{block}"
    if counts != (1, 1) or text.index(begin) > text.index(end):
        raise ValueError(f"the markers {begin} and {end} are no pair")
    return text[: text.index(begin)] + block + text[text.index(end) + len(end) :].removeprefix("\n")


def origin_text(origin: Origin, results: Sequence[Samples]) -> str:
    """`results` are those that tell how quiet it was: no thread of the kernel's took part."""
    return "\n".join(f"- {line}" for line in _origin_lines(origin, results))


def _origin_lines(origin: Origin, results: Sequence[Samples]) -> Iterator[str]:
    yield f"Machine: {origin.machine}"
    yield f"Other programs: {_others(results)}"
    yield f"Versions: {origin.versions}"
    yield f"Made by: `{origin.command}` on {origin.date}"
    yield from (f"Server: {server}" for server in origin.servers)


def _others(results: Sequence[Samples]) -> str:
    if not results:
        return "unknown: no run that would tell"
    share = others(results)
    text = f"{share.middle:.0%} of one CPU during a run (at most {share.most:.0%})"
    quiet = share.middle <= QUIET_SHARE_MIDDLE and share.most <= QUIET_SHARE_MOST
    return text if quiet else f"{text}; **the machine was not quiet**"


def how_to_read(origin: Origin, tables: str) -> str:
    """How many of the targets in the tables are met, and what their figures are."""
    met, missed = (tables.count(f"| {verdict} |") for verdict in (MET, MISSED))
    return (
        f"**{met} of {met + missed} targets met.** Medians over {origin.rounds} rounds of"
        f" {origin.seconds:g} s, every server in turn in each round, their order rotated. A ratio"
        " is the median of the rounds' ratios. In brackets: least and most. Targets are met or"
        " missed before rounding."
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def verdict(is_met: bool) -> str:
    return MET if is_met else MISSED


# ---- figures


def with_spread(values: Spread, form: Callable[[float], str]) -> str:
    return f"{form(values.middle)} ({form(values.least)} to {form(values.most)})"


def block_text(load: Load) -> str:
    return f"{load.block_kib}K" if load.block_kib < 1024 else f"{load.block_kib // 1024}M"


def rate(load: Load) -> Callable[[float], str]:
    """In the unit that people use for such blocks."""
    if load.block_kib == 4:
        return lambda iops: three_digits(iops / 1e3)
    return lambda iops: three_digits(iops * load.block_kib * 1024 / 1e9)


def unit(load: Load) -> str:
    return "kIOPS" if load.block_kib == 4 else "GB/s"


def rate_text(load: Load, iops: float) -> str:
    return f"{rate(load)(iops)} {unit(load)}"


def three_digits(value: float) -> str:
    places = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{places}f}"


def two_places(value: float) -> str:
    return f"{value:.2f}"
