"""What people get to read about arrays: plain text that fits a terminal. Pure.

Tables and bars are rich's, drawn without colours: the same text goes to a terminal and to a file.
"""

import io
from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table

from pmblk.raid.status import ArrayStatus, MemberStatus, SweepStatus
from pmblk.units import format_size
from pmblkd.raid_reports import (
    CreatedReport,
    DeviceReport,
    ExamineReport,
    RaidReport,
    StoppedReport,
)

INDENT = 4
BAR_COLUMNS_MIN, BAR_COLUMNS_MAX = 8, 30
BESIDE_BAR_COLUMNS = 54  # words, figures and the space between them
_WORDS = {
    "rebuild": "rebuild",
    "resync": "resync",
    "check": "scrub (check)",
    "repair": "scrub (repair)",
    "replace": "replacement",
    "reshape": "reshape",
}


# ---- arrays in service


def arrays(reports: Sequence[RaidReport], *, columns: int) -> str:
    """A line or two for each."""
    if not reports:
        return "no array is in service"
    parts: list[RenderableType] = []
    for report in reports:
        status = report.status
        parts += [report.name, _indented(f"{_kind(status)}, {_members_words(status)}")]
        parts += [_indented(f"{status.state}, {format_size(status.size_bytes)}")]
        if status.sweep is not None:
            parts.append(_indented(_bar(status.sweep, columns)))
    return _drawn(parts, columns)


def array(report: RaidReport, *, columns: int) -> str:
    """One of them, with everybody who takes part."""
    status = report.status
    sizes = (
        f"{format_size(status.size_bytes)}, chunk {format_size(status.chunk_bytes)}, "
        f"{format_size(status.member_bytes)} of each member"
    )
    also = f" as {status.name}" if status.name != report.name else ""
    parts: list[RenderableType] = [
        f"{report.name}: {_kind(status)}, {status.state}",
        *(_indented(line) for line in (sizes, f"UUID {status.array}{also}", *_safety(status))),
        _indented(
            f"members read {format_size(status.member_read_bytes)}, "
            f"written {format_size(status.member_write_bytes)}"
        ),
        "",
        _indented(_members(status)),
    ]
    if status.sweep is not None:
        parts += ["", _indented(_bar(status.sweep, columns)), *_findings(status.sweep)]
    if status.scrub is not None:
        parts += ["", _indented(_last_scrub(status.scrub)), *_findings(status.scrub)]
    return _drawn(parts, columns)


def _kind(status: ArrayStatus) -> str:
    return f"RAID {status.level}" + (f" ({status.layout})" if status.layout else "")


def _members_words(status: ArrayStatus) -> str:
    slots = [member for member in status.members if member.slot is not None]
    whole = sum(member.state == "active" for member in slots)
    spares = sum(member.slot is None and member.state == "spare" for member in status.members)
    words = f"{whole} of {len(slots)} members"
    return words + (f", {_count(spares, 'spare')}" if spares else "")


def _safety(status: ArrayStatus) -> Iterator[str]:
    """What is kept beside the data, for after a crash and against what disks do."""
    if status.level in (4, 5, 6):
        closed = status.write_hole == "journal"
        yield "write hole closed by a journal" if closed else "write hole open: no journal"
    if status.dirty_bytes is not None:
        marked = format_size(status.dirty_bytes)
        yield f"bitmap of {format_size(status.bitmap_chunk_bytes)} regions, {marked} marked"
    elif status.level:
        yield "no bitmap: after a crash all of it is looked at"
    if status.integrity:
        yield "a checksum for each block"


def _members(status: ArrayStatus) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False, header_style="none")
    for heading in ("slot", "state", "member", "notes"):
        table.add_column(heading, overflow="fold", no_wrap=heading in ("slot", "state"))
    for member in status.members:
        slot = "-" if member.slot is None else str(member.slot)
        notes = ", ".join(_notes(member, status.member_bytes))
        table.add_row(slot, member.state, _place(member), notes)
    return table


def _place(member: MemberStatus) -> str:
    """Its UUID where nobody knows: commands take that too."""
    return member.place or ("nobody" if member.state == "empty" else str(member.member))


def _notes(member: MemberStatus, member_bytes: int) -> Iterator[str]:
    if member.reason:
        yield member.reason
    if member.state == "rebuilding" and member_bytes:
        yield f"{100 * member.checkpoint / member_bytes:.0f}% is whole"
    if member.errors:
        yield _count(member.errors, "error")
    if member.bad_blocks:
        yield f"{_count(member.bad_blocks, 'bad block')}"


def _bar(sweep: SweepStatus, columns: int) -> Table:
    """`rebuild ━━━━━━        42%  118 MiB/s  3 min 20 s left`."""
    width = min(max(columns - BESIDE_BAR_COLUMNS, BAR_COLUMNS_MIN), BAR_COLUMNS_MAX)
    line = Table.grid(padding=(0, 2, 0, 0))
    line.add_column(no_wrap=True)
    line.add_column(width=width)
    for _ in range(3):
        line.add_column(no_wrap=True)
    left = sweep.seconds_left
    line.add_row(
        _WORDS[sweep.kind],
        ProgressBar(total=1.0, completed=sweep.part, width=width),
        f"{100 * sweep.part:.0f}%",
        f"{format_size(int(sweep.bytes_per_second))}/s",
        "" if left is None else f"{duration(left)} left",
    )
    return line


def _last_scrub(scrub: SweepStatus) -> str:
    how = "to its end" if scrub.position >= scrub.end else f"{100 * scrub.part:.0f}% of the array"
    what = "it found:" if scrub.findings else "nothing found"
    return f"last {_WORDS[scrub.kind]}, {how}; {what}"


def _findings(sweep: SweepStatus) -> Iterator[RenderableType]:
    return (Padding(finding, (0, 0, 0, 2 * INDENT)) for finding in sweep.findings)


# ---- what was done


def changed(report: RaidReport, what: str) -> str:
    """`array: m1 has failed; degraded, 2 of 3 members`."""
    status = report.status
    return f"{report.name}: {what}; {status.state}, {_members_words(status)}"


def stopped(report: StoppedReport) -> str:
    if not report.users:
        return f"{report.name}: stopped"
    users = _count(report.users, "user")
    return f"{report.name}: draining, it stops when its last user has left ({users})"


def created(report: CreatedReport) -> str:
    layout = f" ({report.layout})" if report.layout else ""
    members = _count(len(report.members), "member")
    spares = f", {_count(len(report.spares), 'spare')}" if report.spares else ""
    lines = [
        f"{report.name}: RAID {report.level}{layout} over {members}{spares}",
        f"    {format_size(report.size_bytes)}, chunk {format_size(report.chunk_bytes)}",
        f"    UUID {report.array}",
    ]
    lines += [f"    {file}: made" for file in report.files]
    if not report.clean:
        lines.append("    parity or copies are made to fit when it is first served")
    return "\n".join(lines)


# ---- what devices say of themselves


def examined(report: ExamineReport, *, columns: int) -> str:
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False, header_style="none")
    for heading in ("device", "array", "slot", "state", "events"):
        table.add_column(heading, overflow="fold", no_wrap=heading != "device")
    for device in report.devices:
        if not device.problem:
            slot = "-" if device.slot is None else str(device.slot)
            events = str(device.events)
            table.add_row(device.place, device.name, slot, device.state, events)
    parts: list[RenderableType] = []
    if table.row_count:
        parts += [table, ""]
    problems = [f"{device.place}: {device.problem}" for device in _with_problems(report)]
    parts += [*problems, ""] if problems else []
    parts += _assembled(report)
    return _drawn(parts, columns)


def _with_problems(report: ExamineReport) -> Iterable[DeviceReport]:
    return (device for device in report.devices if device.problem)


def _assembled(report: ExamineReport) -> Iterator[RenderableType]:
    found = report.assembly
    if found is None:
        yield f"no array: {report.reason}"
        return
    layout = f" ({found.layout})" if found.layout else ""
    yield f"{found.name}: RAID {found.level}{layout}, {format_size(found.size_bytes)}"
    yield _indented(f"UUID {found.array}")
    stop = "stopped cleanly" if found.clean else "in service, or not stopped cleanly"
    yield _indented(stop)
    for note in found.notes:
        yield _indented(note)
    if not found.obstacles:
        yield _indented("it can start")
        return
    yield _indented("it cannot start:")
    for obstacle in found.obstacles:
        yield Padding(obstacle, (0, 0, 0, 2 * INDENT))


# ---- drawing


def duration(seconds: float) -> str:
    """`3 min 20 s`: two units at most."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def _count(number: int, name: str) -> str:
    return f"{number} {name}" if number == 1 else f"{number} {name}s"


def _indented(what: RenderableType) -> Padding:
    return Padding(what, (0, 0, 0, INDENT), expand=False)


def _drawn(parts: Iterable[RenderableType], columns: int) -> str:
    out = io.StringIO()
    console = Console(
        file=out, width=columns, color_system=None, highlight=False, markup=False, emoji=False
    )
    for part in parts:
        console.print(part)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())
