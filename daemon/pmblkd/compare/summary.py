"""What the figures say, in sentences made from them: no claim is here that the data could deny.

Pure. "Faster" is said only where the slowest round of one beats the fastest round of all others.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from statistics import median

from pmblk.units import format_size
from pmblkd.compare import figures
from pmblkd.compare.contenders import Contender
from pmblkd.compare.figures import Figure
from pmblkd.compare.limits import LIMITED_FILE_BYTES, has_limits, misses
from pmblkd.compare.matrix import PATH_TITLES, Row
from pmblkd.compare.results import LargeFileFacts, Results, Sample
from pmblkd.compare.spread import spread
from pmblkd.compare.tables import NONE, Table

QUIET_SHARE_MIDDLE, QUIET_SHARE_MOST = 0.05, 0.25  # of one CPU, in the hands of others


def summary(results: Results) -> list[str]:
    """A list of sentences, the most telling first."""
    return [
        *_copies(results),
        *_metadata(results),
        *_descriptors(results),
        *(sentence for path in PATH_TITLES for sentence in _speed(results, path)),
        *_cpu(results),
        *_pauses(results),
        *_limits(results),
        *_noise(results),
    ]


# ---- at a glance


def glance(results: Results) -> Table:
    """A line for each contender; the columns are what was measured of these."""
    columns = [*_large_file_columns(results), *_load_columns(results)]
    return Table(
        title="At a glance",
        header=["representation", *(heading for heading, _ in columns)],
        groups=[
            ("", [[one.name, *(cell(one) for _, cell in columns)] for one in results.contenders])
        ],
        note="Medians; the full tables with their spreads are below.",
    )


Column = tuple[str, Callable[[Contender], str]]


def _large_file_columns(results: Results) -> Iterator[Column]:
    facts = {one.contender: one for one in _largest_limited(results)}

    def of(text: Callable[[LargeFileFacts], str]) -> Callable[[Contender], str]:
        return lambda one: text(facts[one.name]) if one.name in facts else NONE

    if facts:
        size = format_size(next(iter(facts.values())).file_bytes)
        yield f"metadata of {size}", of(lambda one: figures.exact_size(one.metadata_bytes))
        yield f"init of {size}", of(lambda one: figures.seconds_text(one.init_seconds))
        yield "descriptors of 1M", of(lambda one: f"{one.io(1 << 20).descriptors:,}")
        yield "their bytes", of(lambda one: f"{one.io(1 << 20).descriptor_bytes:,}")


def _load_columns(results: Results) -> Iterator[Column]:
    for way in ("read", "write"):
        rows = [row for row in results.rows if row.way == way]
        if rows:
            yield f"copied per byte, {way}", _middle(results, rows, figures.COPIED)
    for row in _telling(results):
        path = row.path.upper() if row.path == "nbd" else row.path
        figure = figures.IOPS if row.block_bytes < 1 << 20 else figures.BANDWIDTH
        yield f"{path} {row.title}: {figure.unit}", _middle(results, [row], figure)
        yield f"{path} {row.title}: CPU µs per I/O", _middle(results, [row], figures.CPU)


def _telling(results: Results) -> list[Row]:
    """Of the first path: the smallest and the largest blocks, read with most in flight."""
    reads = [row for row in results.rows if row.path == results.rows[0].path and row.way == "read"]
    if not reads:
        return []
    depth = max(row.queue_depth for row in reads)
    deep = sorted((row for row in reads if row.queue_depth == depth), key=lambda r: r.block_bytes)
    return deep[:1] + deep[1:][-1:]


def _middle(results: Results, rows: Sequence[Row], figure: Figure) -> Callable[[Contender], str]:
    def cell(one: Contender) -> str:
        values = _middles(results, rows, one, figure)
        form = figures.digits if figure is figures.COPIED else figures.fixed
        return form(median(values)) if values else NONE

    return cell


def _middles(
    results: Results, rows: Sequence[Row], contender: Contender, figure: Figure
) -> list[float]:
    """The median of each row that the contender was measured in."""
    runs = [(row, results.of(row, contender)) for row in rows]
    return [figure.spread(samples, row).middle for row, samples in runs if samples]


# ---- sentences


def _copies(results: Results) -> Iterator[str]:
    """Who copies, and how much; who does not."""
    copiers, others = [], []
    for one in results.contenders:
        read, written = (_copied(results, one, way) for way in ("read", "write"))
        if read or written:
            parts = [(read, "byte read"), (written, "byte written")]
            amounts = [f"{figures.digits(n)} for each {what}" for n, what in parts if n is not None]
            copiers.append(f"{one.name} copied {_and(amounts)}")
        elif read is not None or written is not None:
            others.append(one.name)
    sentences = [*copiers, *([f"{_and(others)} copied none"] if others else [])]
    if sentences:
        yield f"Bytes copied by the representation, median over the loads: {'; '.join(sentences)}."


def _copied(results: Results, contender: Contender, way: str) -> float | None:
    rows = [row for row in results.rows if row.way == way]
    values = _middles(results, rows, contender, figures.COPIED)
    return median(values) if values else None


def _largest_limited(results: Results) -> list[LargeFileFacts]:
    """What is known of the 400 GiB device, or of the largest there is."""
    known = [one for one in results.large_files if not one.skipped]
    size = max((one.file_bytes for one in known), default=0)
    if any(one.file_bytes == LIMITED_FILE_BYTES for one in known):
        size = LIMITED_FILE_BYTES
    return [one for one in known if one.file_bytes == size]


def _metadata(results: Results) -> Iterator[str]:
    facts = sorted(_largest_limited(results), key=lambda one: -one.metadata_bytes)
    if facts:
        size = format_size(facts[0].file_bytes)
        kept = _and([f"{one.contender} {figures.exact_size(one.metadata_bytes)}" for one in facts])
        yield f"Metadata for a device of {size}: {kept}."
    for one in facts:
        if one.peak_pool_bytes is not None:
            peak = figures.exact_size(one.peak_pool_bytes)
            yield f"With 32 reads of 1 MiB held at once, {one.contender} had {peak} of it in use."


def _descriptors(results: Results) -> Iterator[str]:
    facts = [one for one in _largest_limited(results) if one.ios]
    if facts:
        built = [
            f"{one.contender} {io.descriptors:,} ({io.descriptor_bytes:,} bytes)"
            for one in facts
            for io in [one.io(1 << 20)]
        ]
        yield f"Descriptors for one read of 1 MiB: {_and(built)}."


def _speed(results: Results, path: str) -> Iterator[str]:
    rows = results.of_path(path)
    if not rows or len(results.contenders) < 2:
        return
    title = f"{PATH_TITLES[path]}, {_loads(len(rows))}"
    if results.setup.rounds == 1:
        yield f"{title}: one round has no spread, so nothing is said about who is faster."
        return
    ahead = _counted([_ahead(results, row, sign=1) for row in rows])
    behind = _counted([_ahead(results, row, sign=-1) for row in rows])
    factors = spread([_factor(results, row) for row in rows])
    yield (
        f"{title}: faster than all others in every round was {ahead}; slower than all others in"
        f" every round was {behind}. The best median is {factors.least:.2f} to {factors.most:.2f}"
        " times the worst."
    )


def _counted(names: Sequence[str]) -> str:
    """Who, in how many loads; the empty name is nobody."""
    found = Counter(name for name in names if name)
    parts = [f"{name} in {_loads(count)}" for name, count in found.most_common()]
    return _and(parts) or "nobody"


def _loads(count: int) -> str:
    return "1 load" if count == 1 else f"{count} loads"


def _ahead(results: Results, row: Row, *, sign: int) -> str:
    """Whose worst rate beats all others' best, and with `sign` -1 the other way round; or ""."""
    rates = {
        one.name: [sign * figures.IOPS.of(sample, row) for sample in samples]
        for one in results.contenders
        if (samples := results.of(row, one))
    }
    for name, own in rates.items():
        if all(min(own) > max(other) for key, other in rates.items() if key != name):
            return name
    return ""


def _factor(results: Results, row: Row) -> float:
    middles = [
        value for one in results.contenders for value in _middles(results, [row], one, figures.IOPS)
    ]
    return max(middles) / min(middles)


def _cpu(results: Results) -> Iterator[str]:
    """Everybody's CPU time per I/O as a multiple of the last contender's that has no options."""
    plain = [one for one in results.contenders if one.name == one.kind]
    if not plain or len(results.contenders) < 2:
        return
    reference = plain[-1]
    for path, title in PATH_TITLES.items():
        ratios = [
            f"{one.name} {ratio:.2f}"
            for one in results.contenders
            if one is not reference and (ratio := _cpu_ratio(results, path, one, reference))
        ]
        if ratios:
            yield (
                f"{title}: server CPU per I/O as a multiple of that of {reference.name}"
                f" (geometric mean over the loads): {_and(ratios)}."
            )


def _cpu_ratio(results: Results, path: str, one: Contender, reference: Contender) -> float | None:
    logarithms = []
    for row in results.of_path(path):
        pair = [_middles(results, [row], each, figures.CPU) for each in (one, reference)]
        if all(values and values[0] > 0 for values in pair):
            logarithms.append(math.log(pair[0][0] / pair[1][0]))
    return math.exp(sum(logarithms) / len(logarithms)) if logarithms else None


def _pauses(results: Results) -> Iterator[str]:
    if not results.samples:
        return
    pause = spread([sample.pause_seconds for sample in results.samples])
    slowest = max(results.samples, key=lambda sample: sample.build_seconds)
    yield (
        f"Clients of a live switch waited {figures.seconds_text(pause.middle)}, at most"
        f" {figures.seconds_text(pause.most)}; what took longest to build was {slowest.contender},"
        f" {figures.seconds_text(slowest.build_seconds)}."
    )


def _limits(results: Results) -> Iterator[str]:
    limited = [one for one in results.large_files if has_limits(one)]
    missed = [said for facts in limited for said in misses(facts)]
    size = format_size(LIMITED_FILE_BYTES)
    if missed:
        yield f"Missed at {size}, where 100 ms and 50 MiB are the limits: {_and(missed)}."
    elif limited:
        names = _and([one.contender for one in limited])
        yield f"Within the limits of 100 ms and 50 MiB for opening {size}: {names}."


def _noise(results: Results) -> Iterator[str]:
    """Only over NBD: above a loop device the kernel works in threads that are nobody's."""
    shares = [one.others_share for one in results.samples if _path_of(one) == "nbd"]
    if not shares:
        return
    others = spread(shares)
    quiet = others.middle <= QUIET_SHARE_MIDDLE and others.most <= QUIET_SHARE_MOST
    verdict = "" if quiet else " The machine was not quiet: take small differences for noise."
    yield (
        f"Other programs used {others.middle:.0%} of one CPU during a run over NBD, at most"
        f" {others.most:.0%}.{verdict}"
    )


def _path_of(sample: Sample) -> str:
    return sample.row.partition("-")[0]


def _and(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))
