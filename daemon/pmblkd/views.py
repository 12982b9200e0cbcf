"""The reports for people: plain text that fits a terminal. Pure; `--json` is for machines."""

import textwrap
from collections.abc import Iterable, Iterator, Sequence

import msgspec

from pmblk.representations import KINDS, RepresentationCounters
from pmblk.units import format_size
from pmblkd.reports import (
    ArrayReport,
    DescriptionReport,
    DetachAllReport,
    DetachReport,
    NamespaceReport,
    PoisonReport,
    PrpReport,
    ReloadReport,
    RepresentationReport,
    Run,
    SaveReport,
    SglReport,
    StatsReport,
    SwitchReport,
)

LINES_MAX = 8  # of one list of a description
ENTRY_BYTES = 8
DESCRIPTOR_BYTES = 16


def namespaces(reports: Iterable[NamespaceReport], *, columns: int) -> str:
    """A paragraph a namespace, as wide as the terminal, with no word cut."""
    return "\n".join(line for report in reports for line in _namespace(report, columns))


def _namespace(report: NamespaceReport, columns: int) -> Iterator[str]:
    facts = [
        format_size(report.size_bytes),
        *([f"{format_size(report.allocated_bytes)} used"] if report.array is None else []),
        f"LBA {report.lba_bytes}",
        nature(report),
    ]
    if report.reserve_bytes:
        facts.append(f"{format_size(report.reserve_bytes)} reserve")
    if report.read_only:
        facts.append("read-only")
    lines = [", ".join(facts), f"{report.durability}: {report.durability_reason}"]
    if report.failure is not None:
        lines.append(f"failed: {report.failure}")
    if report.draining:
        users = "1 user" if report.users == 1 else f"{report.users} users"
        lines.append(f"draining: {users} left, no new ones")
    else:
        lines += report.nbd
    if report.fuse is not None and not report.draining:
        lines += [report.fuse.path, f"(FUSE engine: {report.fuse.engine})"]
    yield report.name
    for line in lines:
        wrapped = textwrap.wrap(line, columns - 4, break_long_words=False, break_on_hyphens=False)
        yield textwrap.indent("\n".join(wrapped), "    ")


def nature(report: NamespaceReport | StatsReport) -> str:
    """Its representation, or its level and how many of its members are whole."""
    if report.representation is not None:
        return representation(report.representation)
    return "" if report.array is None else _array(report.array)


def _array(report: ArrayReport) -> str:
    """`RAID 5 (left-symmetric), 3 members, 1 of them not whole, degraded`."""
    layout = f" ({report.layout})" if report.layout else ""
    absent = f", {report.absent} of them not whole" if report.absent else ""
    return f"RAID {report.level}{layout}, {report.members} members{absent}, {report.state}"


def representation(report: RepresentationReport) -> str:
    """`page-cache (arena 128MiB)`: the kind, and the options that are not its defaults."""
    usual = msgspec.to_builtins(KINDS[report.kind].Options()) if report.kind in KINDS else {}
    changed = {key: value for key, value in report.options.items() if value != usual.get(key)}
    options = ", ".join(f"{key} {value}" for key, value in changed.items())
    return f"{report.kind} ({options})" if options else report.kind


# ---- stats


class _Row(msgspec.Struct, frozen=True):
    """One line: a count, bytes, or both. `always`: shown even when all of it is 0."""

    label: str
    count: int | None = None
    size: int | None = None
    note: str = ""
    always: bool = False


def stats(report: StatsReport) -> str:
    did = report.namespace_counters
    io = [
        _Row("reads", did.reads, did.read_bytes, always=True),
        _Row("writes", did.writes, did.write_bytes, always=True),
        _Row("zeroes", did.zeroes, did.zero_bytes),
        _Row("deallocations", did.deallocations, did.deallocated_bytes),
        _Row("flushes", did.flushes, always=True),
        _Row("errors", did.errors, always=True),
        _Row("waits", did.waits, note="not answered on the spot"),
        _Row("PRP entries", did.prp_entries, note="that all of it would take"),
        _Row("PRP list pages", did.prp_list_pages),
    ]
    groups = [("I/O", io)]
    if report.array is not None:
        groups.append(("members", _members(report)))
    if report.representation_counters is not None:
        groups += _costs(report.representation_counters)
    lines = [f"{report.name}: {nature(report)}"]
    for title, rows in groups:
        lines += ["", title, *_table(rows)]
    return "\n".join(lines)


def _members(report: StatsReport) -> list[_Row]:
    """What went over the members: for clients, for parity and in the background."""
    read, written = report.member_read_bytes, report.member_write_bytes
    return [_Row("read", size=read, always=True), _Row("written", size=written, always=True)]


def _costs(cost: RepresentationCounters) -> list[tuple[str, list[_Row]]]:
    effort = [
        _Row("copied", size=cost.bytes_copied, always=True),
        _Row("descriptors", cost.descriptors_built, cost.descriptor_bytes, always=True),
        _Row("pins", cost.pins, note=f"{cost.pins - cost.unpins} now, {cost.peak_pins} at most"),
        _Row("I/O vectors", cost.iovecs),
        _Row("SGL descriptors", cost.sgl_descriptors),
        _Row("splits", cost.splits),
        _Row("merges", cost.merges),
        _Row("pool waits", cost.pool_waits),
        _Row("cache hits", cost.cache_hits),
        _Row("cache misses", cost.cache_misses),
        _Row("cache write-backs", cost.cache_write_backs),
    ]
    memory = [
        _Row("metadata", size=cost.metadata_bytes, always=True),
        _Row("  of it resident", size=cost.metadata_resident_bytes),
        _Row("  of it on the device", size=cost.metadata_device_bytes),
        _Row("cached", size=cost.cached_bytes),
        _Row("dirty", size=cost.dirty_bytes),
        _Row("poisoned", size=cost.poisoned_bytes),
    ]
    return [("representation", effort), ("memory", memory)]


def _table(rows: Iterable[_Row]) -> Iterator[str]:
    for row in rows:
        if row.always or row.count or row.size:
            count = "" if row.count is None else f"{row.count:,}"
            size = "" if row.size is None else format_size(row.size)
            yield f"    {row.label:<22}{count:>14}{size:>12}  {row.note}".rstrip()


# ---- what was done


def switched(report: SwitchReport) -> str:
    """`ns1: extent -> pfn, built in 3 ms, paused 0.4 ms`."""
    before, after = representation(report.before), representation(report.after)
    times = f"built in {_time(report.build_seconds)}, paused {_time(report.pause_seconds)}"
    return f"{report.name}: {before} -> {after}, {times}"


def reloaded(report: ReloadReport) -> str:
    """A line a change; what was refused comes last, with its reason."""
    lines = [f"{name}: added" for name in report.added]
    lines += [f"{name}: removed" for name in report.removed]
    lines += [f"{name}: draining, until its users have left" for name in report.draining]
    lines += [switched(one) for one in report.switched]
    lines += [f"{name}: grown" for name in report.grown]
    lines += [f"{key}: changed" for key in report.changed]
    lines += [f"{refusal.key}: refused, {refusal.reason}" for refusal in report.refused]
    return "\n".join(lines) or "nothing has changed"


def saved(report: SaveReport) -> str:
    rate = report.written_bytes / report.seconds if report.seconds else 0
    return (
        f"{report.name}: {format_size(report.written_bytes)} written to {report.target} in "
        f"{report.seconds:.1f} s ({format_size(int(rate))}/s), {format_size(report.hole_bytes)} of "
        f"holes, {format_size(report.copied_bytes)} copied on the way"
    )


def poisoned(report: PoisonReport) -> str:
    return (
        f"{report.name}: {format_size(report.length)} at {report.offset} are bad now;\n"
        "each page is bad until it is written, zeroed or discarded as a whole"
    )


def detached(report: DetachReport) -> str:
    """A line a device."""
    return "\n".join(report.devices) or f"{report.name} is not attached"


def all_detached(report: DetachAllReport) -> str:
    """A line a device and a mount; what was refused comes last, with its reason."""
    lines = [f"{path}: aborted, its daemon did not answer" for path in report.aborted]
    lines += report.devices
    lines += [f"{path}: unmounted, it had lost its daemon" for path in report.unmounted]
    lines += [f"{refusal.key}: refused, {refusal.reason}" for refusal in report.refused]
    return "\n".join(lines) or "nothing is attached"


def _time(seconds: float) -> str:
    """Milliseconds with the figures that say something, or seconds."""
    if seconds >= 1:
        return f"{seconds:.1f} s"
    milliseconds = seconds * 1000
    return f"{milliseconds:.0f} ms" if milliseconds >= 2 else f"{milliseconds:.2g} ms"


# ---- describe


def description(report: DescriptionReport) -> str:
    lines = [
        f"{report.name}: {representation(report.representation)}",
        f"{format_size(report.length)} at {report.offset}",
        "",
        f"descriptors   {report.descriptors}, {format_size(report.descriptor_bytes)}",
        f"holes         {format_size(report.hole_bytes)}",
        f"memory        {_count(report.runs, 'run')}",
        *_cut([_run(run) for run in report.runs]),
    ]
    lines += ["", *_prps(report.prps, report), "", *_sgl(report.sgl, report)]
    if report.runs:
        lines += ["", f"Linux would use {'an SGL' if report.linux_uses_sgl else 'PRPs'}"]
    return "\n".join(lines)


def _prps(prps: PrpReport | None, report: DescriptionReport) -> Iterator[str]:
    if prps is None:
        yield f"PRP           none: {report.prp_refusal}"
        return
    entries = "1 entry" if prps.entries == 1 else f"{prps.entries} entries"
    yield f"PRP           {entries}, {_count(prps.pages, 'list page')}"
    yield f"    PRP1      {_address(prps.prp1)}"
    meaning = " (the list)" if prps.pages else "" if prps.prp2 else " (reserved)"
    yield f"    PRP2      {_address(prps.prp2)}{meaning}"
    pointers = [
        f"{_address(report.list_address + at)}  {_address(value)}"
        for at, value in _list_entries(prps.pages)
    ]
    yield from _cut(pointers)


def _list_entries(pages: Sequence[str]) -> Iterator[tuple[int, int]]:
    """(offset in the list, value) of every entry up to the last that is used."""
    data = bytes.fromhex("".join(pages)).rstrip(b"\0")
    for at in range(0, len(data), ENTRY_BYTES):
        yield at, int.from_bytes(data[at : at + ENTRY_BYTES], "little")


def _sgl(sgl: SglReport | None, report: DescriptionReport) -> Iterator[str]:
    if sgl is None:
        yield "SGL           none: nothing to describe"
        return
    yield f"SGL           {_count(sgl.descriptors, 'descriptor')}"
    yield f"    DPTR      {_grouped(sgl.data_pointer)}"
    data = bytes.fromhex(sgl.segment)
    descriptors = [
        f"{_address(report.list_address + at)}  {_grouped(data[at : at + DESCRIPTOR_BYTES].hex())}"
        for at in range(0, len(data), DESCRIPTOR_BYTES)
    ]
    yield from _cut(descriptors)


def _cut(lines: Sequence[str]) -> Iterator[str]:
    """At most `LINES_MAX` of them, indented, and how many more there are."""
    shown = lines if len(lines) <= LINES_MAX else lines[: LINES_MAX - 1]
    for line in shown:
        yield f"    {line}"
    if len(shown) < len(lines):
        yield f"    ... {len(lines) - len(shown)} more"


def _run(run: Run) -> str:
    return f"{_address(run.address)}  {format_size(run.length)}"


def _address(address: int) -> str:
    return f"{address:#018x}"


def _grouped(text: str) -> str:
    """Hex in groups of four bytes."""
    return " ".join(text[at : at + 8] for at in range(0, len(text), 8))


def _count(things: Sequence[object], name: str) -> str:
    return f"{len(things)} {name}" if len(things) == 1 else f"{len(things)} {name}s"
