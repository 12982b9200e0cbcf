"""The commands `pmblk raid`. Making and examining need no daemon; all the others ask one."""

import os
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Literal
from uuid import UUID

import cyclopts
import trio
from cyclopts import Parameter

from pmblk import PmblkError
from pmblk.raid.geometry import (
    CHUNK_BYTES_DEFAULT,
    COPYINGS,
    LEVELS,
    ROTATIONS,
    Layout,
    Level,
)
from pmblk.raid.opening import open_member
from pmblk.units import format_size
from pmblkd import control, raid_offline, raid_views
from pmblkd.command_line import (
    CHANGE_SECONDS,
    DEFAULT_SOCKET,
    AsJson,
    Name,
    Socket,
    columns,
    print_answer,
    see,
    size_of,
)
from pmblkd.errors import did_you_mean
from pmblkd.raid_reports import RaidReport, StoppedReport

app = cyclopts.App(
    name="raid", help="Arrays: make, examine and assemble them, and tend their members."
)

Member = Annotated[str, Parameter(help="The member: a path, or an NBD URI.")]
Members = Annotated[str, Parameter(help="Members: paths or NBD URIs, in the order of their slots.")]


@app.command
def create(
    name: Annotated[str, Parameter(help="What the array is called, on its members.")],
    /,
    *members: Members,
    level: Annotated[int, Parameter(help="0, 1, 4, 5, 6 or 10.")],
    layout: Annotated[
        str | None,
        Parameter(
            help="Where parity goes (left-symmetric and so on, levels 5 and 6), or copies (near,"
            " far, offset, level 10)."
        ),
    ] = None,
    chunk: Annotated[
        str, Parameter(help="How much lies on one member before the next one's turn.")
    ] = format_size(CHUNK_BYTES_DEFAULT).replace(" ", ""),
    copies: Annotated[int, Parameter(help="Of each chunk, at level 10.")] = 2,
    spare: Annotated[
        list[str] | None,
        Parameter(negative="", help="A spare: a path, or an NBD URI; may be repeated."),
    ] = None,
    size: Annotated[
        str | None,
        Parameter(help="Files that are missing are made, sparse, with this size."),
    ] = None,
    integrity: Annotated[
        bool, Parameter(negative="", show_default=False, help="Keep a checksum for each block.")
    ] = False,
    write_hole: Annotated[
        Literal["journal", "open"],
        Parameter(help="Journal stripes, so that a crash tears none (levels 4, 5 and 6)."),
    ] = "journal",
    no_bitmap: Annotated[
        bool,
        Parameter(
            negative="",
            show_default=False,
            help="Keep no book of the regions that are being written.",
        ),
    ] = False,
    assume_clean: Annotated[
        bool,
        Parameter(
            negative="",
            show_default=False,
            help="Take the members as they are: their parity or copies fit.",
        ),
    ] = False,
    force: Annotated[
        bool,
        Parameter(negative="", show_default=False, help="Also over members of another array."),
    ] = False,
    uuid: Annotated[
        str | None, Parameter(help="The UUID of the array. Without it: a new one.")
    ] = None,
    json: AsJson = False,
) -> None:
    """Make an array. What its members hold is lost.

    It is served by a [namespace.raid] table with these members.
    """
    if not members:
        raise PmblkError("an array needs members", hint=see("raid", "create"))
    plan = raid_offline.Plan(
        name=name,
        members=_places(members),
        spares=_places(spare or ()),
        size=None if size is None else size_of("--size", size),
        level=_level(level),
        layout=_layout(layout),
        chunk_bytes=size_of("--chunk", chunk),
        copies=copies,
        integrity=integrity,
        journal=write_hole == "journal",
        bitmap=not no_bitmap,
        assume_clean=assume_clean,
        force=force,
        array=_uuid(uuid),
    )
    report = trio.run(raid_offline.create, plan, _opener())
    print_answer(report, raid_views.created(report), json=json)


@app.command
def examine(*members: Members, json: AsJson = False) -> None:
    """Say what devices say of themselves, and whether they make up an array that can start.

    Nothing is changed. The exit status is 1 if it could not start.
    """
    if not members:
        raise PmblkError("nothing to examine", hint=see("raid", "examine"))
    report = trio.run(raid_offline.examine, _places(members), _opener(read_only=True))
    print_answer(report, raid_views.examined(report, columns=columns()), json=json)
    sys.exit(0 if report.can_start else 1)


@app.command
def status(
    name: Annotated[str | None, Parameter(help="The namespace. Without it: all arrays.")] = None,
    /,
    *,
    socket: Socket = DEFAULT_SOCKET,
    json: AsJson = False,
) -> None:
    """Show the arrays in service; of one, its members and the work that is under way."""
    reports = control.ask(socket, "raid-status", list[RaidReport], name=name)
    if name is None:
        print_answer(reports, raid_views.arrays(reports, columns=columns()), json=json)
    else:
        (report,) = reports
        print_answer(report, raid_views.array(report, columns=columns()), json=json)


@app.command
def assemble(
    name: Name,
    /,
    *,
    degraded: Annotated[
        bool, Parameter(negative="", show_default=False, help="Also with members missing.")
    ] = False,
    force: Annotated[
        bool,
        Parameter(
            negative="",
            show_default=False,
            help="Also where what is missing may come out wrong, after an unclean stop.",
        ),
    ] = False,
    socket: Socket = DEFAULT_SOCKET,
    json: AsJson = False,
) -> None:
    """Serve an array of the config again that was stopped, or that could not start at a reload."""
    report = control.ask(
        socket,
        "raid-assemble",
        RaidReport,
        seconds=CHANGE_SECONDS,
        name=name,
        degraded=degraded,
        force=force,
    )
    print_answer(report, raid_views.changed(report, "assembled"), json=json)


@app.command
def stop(name: Name, /, *, socket: Socket = DEFAULT_SOCKET, json: AsJson = False) -> None:
    """Take an array out of service, when its users have left: it takes no new ones.

    `pmblk raid assemble` brings it back, and so does a reload or a restart.
    """
    report = control.ask(socket, "raid-stop", StoppedReport, seconds=CHANGE_SECONDS, name=name)
    print_answer(report, raid_views.stopped(report), json=json)


@app.command
def fail(
    name: Name, member: Member, /, *, socket: Socket = DEFAULT_SOCKET, json: AsJson = False
) -> None:
    """Let go of a member, as if it had failed. A spare takes its slot, if there is one."""
    _about_member("raid-fail", "has failed", name, member, socket, json)


@app.command
def remove(
    name: Name, member: Member, /, *, socket: Socket = DEFAULT_SOCKET, json: AsJson = False
) -> None:
    """Forget a member that has failed, or a spare."""
    _about_member("raid-remove", "is removed", name, member, socket, json)


@app.command
def add(
    name: Name, member: Member, /, *, socket: Socket = DEFAULT_SOCKET, json: AsJson = False
) -> None:
    """Add a spare, which takes the slot of a member that is missing.

    A member that comes back takes its own slot again, and gets what it lacks.
    """
    _about_member("raid-add", "is added", name, member, socket, json)


@app.command
def replace(
    name: Name,
    old: Annotated[str, Parameter(help="The member that is to go.")],
    new: Annotated[str, Parameter(help="Who takes its slot: a spare, or a device to add.")],
    /,
    *,
    socket: Socket = DEFAULT_SOCKET,
    json: AsJson = False,
) -> None:
    """Have another device take over from a member, which serves until both hold the same."""
    (before,), (after,) = _places((old,)), _places((new,))
    report = control.ask(
        socket,
        "raid-replace",
        RaidReport,
        seconds=CHANGE_SECONDS,
        name=name,
        old=before,
        new=after,
    )
    print_answer(report, raid_views.changed(report, f"{after} takes over from {before}"), json=json)


@app.command
def scrub(
    name: Name,
    /,
    *,
    repair: Annotated[
        bool, Parameter(negative="", show_default=False, help="Mend what does not fit.")
    ] = False,
    stop: Annotated[
        bool, Parameter(negative="", show_default=False, help="End the scrub that runs.")
    ] = False,
    socket: Socket = DEFAULT_SOCKET,
    json: AsJson = False,
) -> None:
    """Read all of an array, and see whether parity, copies and checksums fit.

    `pmblk raid status` shows how far it is, and what it finds.
    """
    if repair and stop:
        raise PmblkError("--repair and --stop exclude each other", hint=see("raid", "scrub"))
    report = control.ask(socket, "raid-scrub", RaidReport, name=name, repair=repair, stop=stop)
    what = "the scrub ends" if stop else "the scrub begins"
    print_answer(report, raid_views.changed(report, what), json=json)


@app.command
def grow(
    name: Name,
    /,
    *,
    size: Annotated[
        str, Parameter(help="What the array is to hold; max is all that its members have room for.")
    ] = "max",
    add: Annotated[
        list[str] | None,
        Parameter(negative="", help="Another member: a path, or an NBD URI; may be repeated."),
    ] = None,
    socket: Socket = DEFAULT_SOCKET,
    json: AsJson = False,
) -> None:
    """Make an array larger: by what its members have got, or by more of them."""
    report = control.ask(
        socket,
        "raid-grow",
        RaidReport,
        seconds=CHANGE_SECONDS,
        name=name,
        size=None if size == "max" else size_of("--size", size),
        add=_places(add or ()),
    )
    grown = f"{format_size(report.status.size_bytes)} now"
    print_answer(report, raid_views.changed(report, grown), json=json)


def _about_member(
    command: str, done: str, name: str, member: str, socket: Path, json: bool
) -> None:
    (place,) = _places((member,))
    report = control.ask(
        socket, command, RaidReport, seconds=CHANGE_SECONDS, name=name, member=place
    )
    print_answer(report, raid_views.changed(report, f"{place} {done}"), json=json)


def _places(words: "tuple[str, ...] | list[str]") -> list[str]:
    """URIs as they are; paths as the daemon sees them, which is somewhere else."""
    return [word if "://" in word else os.path.abspath(word) for word in words]


def _level(level: int) -> Level:
    if level not in LEVELS:
        raise PmblkError(
            f"--level: there is no level {level}", hint=f"choose from {', '.join(map(str, LEVELS))}"
        )
    return level  # type: ignore[return-value]  # it is one of them


def _layout(layout: str | None) -> Layout | None:
    """Which of them the level takes is its geometry's to say."""
    known = (*ROTATIONS, *COPYINGS)
    if layout is not None and layout not in known:
        raise PmblkError(f"--layout: there is no {layout}", hint=did_you_mean(layout, known))
    return layout  # type: ignore[return-value]  # it is one of them


def _uuid(text: str | None) -> UUID | None:
    if text is None:
        return None
    try:
        return UUID(text)
    except ValueError:
        raise PmblkError(
            f"--uuid: {text!r} is no UUID", hint="leave it out for a new one"
        ) from None


def _opener(*, read_only: bool = False) -> raid_offline.Opener:
    return partial(open_member, read_only=read_only)
