"""The tables of the report, as text in rows and columns; HTML and Markdown are made of the same.

Pure. Medians over the rounds stand in front, least and most in brackets.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pmblk.units import format_size
from pmblkd.compare import figures
from pmblkd.compare.contenders import Contender
from pmblkd.compare.figures import Figure
from pmblkd.compare.limits import has_limits, misses
from pmblkd.compare.matrix import BLOCKS_BYTES, PATH_TITLES, Row, block_text
from pmblkd.compare.results import LargeFileFacts, Results, Sample
from pmblkd.compare.spread import spread

NONE = "-"
_RANGED = (figures.IOPS, figures.P99, figures.CPU)  # more would not fit on a page


@dataclass(frozen=True, kw_only=True)
class Table:
    """`groups` are titled runs of lines; one without a title stands for the whole table.

    The first cell of a line names a contender, the others are figures, or `words`.
    """

    title: str
    header: Sequence[str]
    groups: Sequence[tuple[str, Sequence[Sequence[str]]]]
    note: str = ""
    group_heading: str = ""
    words: bool = False


def tables(results: Results) -> Iterator[Table]:
    """All but the one at a glance and that of the contenders, in the order of the report."""
    for path, title in PATH_TITLES.items():
        for way in ("read", "write"):
            rows = [row for row in results.of_path(path) if row.way == way]
            if rows:
                yield _speed(results, rows, f"{title}: {way}")
                yield _cost(results, rows, f"{title}: {way}, what it took")
    yield switching(results)


# ---- the runs


def _speed(results: Results, rows: Sequence[Row], title: str) -> Table:
    columns = figures.SPEED if rows[0].way == "read" else (*figures.SPEED, figures.FLUSH)
    return Table(
        title=title,
        header=["representation", *(figure.heading for figure in columns)],
        groups=[(row.title, _lines(results, row, columns, _measured)) for row in rows],
        group_heading="load",
        note="Median of the rounds; where there are brackets, the least and the most in them.",
    )


def _cost(results: Results, rows: Sequence[Row], title: str) -> Table:
    return Table(
        title=title,
        header=["representation", *(figure.heading for figure in figures.COST)],
        groups=[(row.title, _lines(results, row, figures.COST, _counted)) for row in rows],
        group_heading="load",
        note="From the engine's counters; median of the rounds.",
    )


def _lines(
    results: Results,
    row: Row,
    columns: Sequence[Figure],
    cell: Callable[[Figure, Sequence[Sample], Row], str],
) -> list[list[str]]:
    lines = []
    for contender in results.contenders:
        samples = results.of(row, contender)
        if samples:
            lines.append([contender.name, *(cell(figure, samples, row) for figure in columns)])
    return lines


def _measured(figure: Figure, samples: Sequence[Sample], row: Row) -> str:
    found = figure.spread(samples, row)
    return figures.with_range(found) if figure in _RANGED else figures.fixed(found.middle)


def _counted(figure: Figure, samples: Sequence[Sample], row: Row) -> str:
    return figures.digits(figure.spread(samples, row).middle)


# ---- taking over, and what is kept


def switching(results: Results) -> Table:
    return Table(
        title="Taking over while clients are connected",
        header=[
            "representation",
            *("build", "longest build", "pause of clients", "longest pause"),
            *("metadata", "of it in DRAM now", "of it on the device"),
        ],
        groups=[("", [_switch_line(results, one) for one in results.contenders])],
        note=(
            f"For {figures.exact_size(results.setup.size_bytes)}. Build and pause: median and most"
            " of all switches. Metadata after the last run."
        ),
    )


def _switch_line(results: Results, contender: Contender) -> list[str]:
    samples = [one for one in results.samples if one.contender == contender.name]
    if not samples:
        return [contender.name, *[NONE] * 7]
    build = spread([one.build_seconds for one in samples])
    pause = spread([one.pause_seconds for one in samples])
    last = samples[-1]
    times = build.middle, build.most, pause.middle, pause.most
    sizes = last.metadata_bytes, last.metadata_resident_bytes, last.metadata_device_bytes
    return [
        contender.name,
        *(figures.seconds_text(value) for value in times),
        *(figures.exact_size(value) for value in sizes),
    ]


def contender_table(results: Results) -> Table:
    """Who was compared, with the options that are not the kind's default."""
    return Table(
        title="What was compared",
        header=["representation", "options", "how it describes the memory under an I/O"],
        groups=[
            (
                "",
                [
                    [one.name, _options(one), _DESCRIPTIONS.get(one.kind, "")]
                    for one in results.contenders
                ],
            )
        ],
        words=True,
    )


_DESCRIPTIONS = {
    "page-cache": "4 KiB frames in DRAM, through which every byte is copied",
    "struct-page": "a struct of 64 bytes for every 4 KiB page, all the time",
    "transient-page": "the same struct, for pages under I/O only, from a bounded pool",
    "pfn": "page frame numbers, a range lock and a bitmap of dirty pages",
    "extent": "an address and a length for each contiguous run",
}


def _options(contender: Contender) -> str:
    return ", ".join(f"{key} = {value}" for key, value in contender.options.items()) or "defaults"


# ---- the devices of gigabytes and terabytes


def device_tables(results: Results) -> Iterator[Table]:
    sizes = list(dict.fromkeys(facts.file_bytes for facts in results.large_files))
    for size in sizes:
        yield _large_file_table(
            size, [one for one in results.large_files if one.file_bytes == size]
        )
    yield descriptor_table(results)


def _large_file_table(size: int, files: Sequence[LargeFileFacts]) -> Table:
    return Table(
        title=f"A device of {format_size(size)}",
        header=[
            "representation",
            *("metadata", "share of the device", "lies in", "init", "open, all of it"),
            *("process grew by", "peak pool, 32 x 1 MiB"),
        ],
        groups=[("", [_large_file_line(one) for one in files])],
        note=_large_file_note(files),
    )


def _large_file_line(facts: LargeFileFacts) -> list[str]:
    if facts.skipped:
        return [facts.contender, *[NONE] * 7]
    flag = " (missed)" if misses(facts) else ""
    pool = facts.peak_pool_bytes
    return [
        facts.contender,
        figures.exact_size(facts.metadata_bytes),
        share_text(facts.share),
        "the device" if facts.metadata_device_bytes else "DRAM",
        figures.seconds_text(facts.init_seconds),
        figures.seconds_text(facts.open_seconds),
        figures.exact_size(facts.resident_bytes) + flag,
        NONE if pool is None else figures.exact_size(pool),
    ]


def share_text(share: float) -> str:
    """As a fraction where it is one, since 1/64 says more than 1.56 %; in the end as "hardly"."""
    for part in (64, 256):
        if share * part == 1:
            return f"1/{part} ({share * 100:.2f} %)"
    return f"{figures.digits(share * 100)} %" if share > 1e-5 else "under 0.001 %"


def _large_file_note(files: Sequence[LargeFileFacts]) -> str:
    """How it was measured; the limits, where they apply, and how they were met; who is missing."""
    notes = ["A sparse file; each line is a process of its own."]
    if any(has_limits(one) for one in files):
        missed = [words for facts in files for words in misses(facts)]
        notes += [
            "extent, pfn and transient-page are to open within 100 ms and 50 MiB.",
            f"Missed: {'; '.join(missed)}." if missed else "They do.",
        ]
    notes += [f"{one.contender} was left out: {one.skipped}." for one in files if one.skipped]
    return " ".join(notes)


def descriptor_table(results: Results) -> Table:
    """What one I/O takes, from the smallest of the files."""
    smallest = min((facts.file_bytes for facts in results.large_files), default=0)
    files = [one for one in results.large_files if one.file_bytes == smallest and one.ios]
    blocks = [block_text(block) for block in BLOCKS_BYTES]
    return Table(
        title="Descriptors of one read",
        header=[
            "representation",
            *(f"descriptors, {block}" for block in blocks),
            *(f"descriptor bytes, {block}" for block in blocks),
            *("PRP entries, 1M", "SGL descriptors, 1M"),
        ],
        groups=[("", [_descriptor_line(one) for one in files])],
        note="Of memory that is there, at the start of the device.",
    )


def _descriptor_line(facts: LargeFileFacts) -> list[str]:
    ios = [facts.io(block) for block in BLOCKS_BYTES]
    return [
        facts.contender,
        *(f"{io.descriptors:,}" for io in ios),
        *(f"{io.descriptor_bytes:,}" for io in ios),
        f"{ios[-1].prp_entries:,}",
        f"{ios[-1].sgl_descriptors:,}",
    ]
