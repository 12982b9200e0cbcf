"""Which devices make up an array, in which slots, and whether it can start. Pure.

Given what the superblocks of some devices say, in any order. Rules that live here:

1. The newest roles rule (`Superblock.events`). A member that does not know them is *stale* and
   left out: others may have been written to without it. There is no margin, with one exception:
   roles that are not SETTLED yet were never acted upon, so who only missed them, and stays, is in.
2. *Split brain*: a stale member that counted one of the current ones out has been written to
   without it, and so has that one. Nobody can say whose bytes are right, so nobody starts. The
   same goes for one that settled roles after it was counted out, whomever it has removed since.
3. An array starts if every block of it can be had. Missing members have to be allowed.
4. Parity that may not fit the data (DIRTY) must not be used to make up what is missing.

What stands in the way is said line by line, each with what to do.
"""

import uuid
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from pmblk.raid.layout import survives
from pmblk.raid.superblock import (
    EMPTY,
    Absent,
    Entry,
    Flag,
    State,
    Superblock,
    SuperblockError,
    Unknown,
)


class Candidate(msgspec.Struct, frozen=True):
    """A device that may be a member, by its path or URI, and what its superblock says."""

    place: str
    found: "Superblock | SuperblockError"


class Assembly(msgspec.Struct, frozen=True, kw_only=True):
    """`slots[i]` is the place of the member in slot i, or None. `left_out` says why, by place.

    `obstacles` are empty when it can start; `notes` are worth telling even so.
    """

    newest: Superblock
    slots: tuple[str | None, ...]
    spares: tuple[str, ...]
    left_out: Mapping[str, str]
    dirty: bool
    obstacles: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def missing(self) -> tuple[int, ...]:
        return tuple(slot for slot, place in enumerate(self.slots) if place is None)


class NoArray(Exception):
    """There is nothing to assemble, or no telling what; the words say why and what to do."""


def assemble(
    candidates: Sequence[Candidate],
    *,
    array: uuid.UUID | None = None,
    degraded: bool = False,
    force: bool = False,
) -> Assembly:
    """`degraded` allows members to be missing, `force` parity that may not fit. Raises NoArray."""
    left_out = {one.place: _refusal(one.found) for one in candidates if _is_refused(one.found)}
    members = {
        one.place: one.found
        for one in candidates
        if isinstance(one.found, Superblock) and one.place not in left_out
    }
    array = array or _only_array(members, left_out)
    for place, found in members.items():
        if found.array != array:
            left_out[place] = f"it belongs to another array ({found.name}, {found.array})"
    ours = {place: found for place, found in members.items() if found.array == array}
    if not ours:
        raise NoArray(f"no member of {array} is among these devices")
    newest = max(ours.values(), key=lambda one: (one.age, Flag.SETTLED in one.flags))
    current, stale = _sort_out(ours, newest)
    left_out.update(stale)
    slots, spares, doubles = _seats(current, newest)
    dirty = any(Flag.DIRTY in found.flags for found in current.values())
    obstacles = [*_unfinished(newest), *_split_brain(ours, current, newest), *doubles]
    obstacles += _shortage(newest, slots, degraded=degraded)
    obstacles += _doubt(newest, slots, dirty=dirty, force=force)
    return Assembly(
        newest=newest,
        slots=slots,
        spares=spares,
        left_out=left_out,
        dirty=dirty,
        obstacles=tuple(obstacles),
        notes=tuple(f"{place}: left out: {reason}" for place, reason in sorted(left_out.items())),
    )


def _is_refused(found: "Superblock | SuperblockError") -> bool:
    return isinstance(found, SuperblockError) or found.entry_of_itself is None


def _refusal(found: "Superblock | SuperblockError") -> str:
    if isinstance(found, Absent):
        return "it has no superblock: it was never a member, or is erased"
    if isinstance(found, Unknown):
        return f"its superblock is of {found}; nothing is changed on it"
    if isinstance(found, SuperblockError):
        return f"its superblock cannot be used: {found}"
    return "its own superblock does not name it"


def _only_array(members: Mapping[str, Superblock], left_out: Mapping[str, str]) -> uuid.UUID:
    arrays = {found.array: found.name for found in members.values()}
    if len(arrays) == 1:
        return next(iter(arrays))
    if arrays:
        names = ", ".join(sorted(f"{name} ({array})" for array, name in arrays.items()))
        raise NoArray(f"these devices are of several arrays: {names}; name one by its UUID")
    reasons = "; ".join(f"{place}: {reason}" for place, reason in sorted(left_out.items()))
    raise NoArray(f"none of these devices is a member of an array. {reasons}".rstrip(". "))


def _sort_out(
    ours: Mapping[str, Superblock], newest: Superblock
) -> tuple[dict[str, Superblock], dict[str, str]]:
    """Who knows the newest roles and has one, and of the others why not."""
    settled = any(
        found.events == newest.events and Flag.SETTLED in found.flags for found in ours.values()
    )
    oldest = newest.events if settled else newest.events - 1
    states = {entry.member: entry.state for entry in newest.entries}
    current, stale = {}, {}
    for place, found in ours.items():
        state = states.get(found.member, State.EMPTY)
        if state is State.EMPTY:
            stale[place] = "it was removed from the array"
        elif state is State.FAULTY:
            stale[place] = "it is marked faulty: add it again to have it rebuilt"
        elif found.events < oldest:
            behind = newest.events - found.events
            stale[place] = f"it is stale: {behind} changes of the array went on without it"
        else:
            current[place] = found
    return current, stale


def _seats(
    current: Mapping[str, Superblock], newest: Superblock
) -> tuple[tuple[str | None, ...], tuple[str, ...], list[str]]:
    """Who sits in which slot, the spares, and an obstacle for each seat that two claim."""
    numbers = {entry.member: number for number, entry in enumerate(newest.entries)}
    seats: dict[int, str] = {}
    doubles = []
    for place, found in current.items():
        number = numbers[found.member]
        if number in seats:
            doubles.append(
                f"{seats[number]} and {place} are both member {found.member}: "
                "one is a copy; leave it away"
            )
        seats.setdefault(number, place)
    members = newest.geometry.members
    slots = tuple(seats.get(slot) for slot in range(members))
    spares = tuple(seats[number] for number in sorted(seats) if number >= members)
    return slots, spares, doubles


def _unfinished(newest: Superblock) -> Iterable[str]:
    if not newest.events:
        yield "it was never finished making: make it again"


def _split_brain(
    ours: Mapping[str, Superblock], current: Mapping[str, Superblock], newest: Superblock
) -> list[str]:
    entries = {entry.member: entry for entry in newest.entries}
    roles = [(entry.member, entry.state) for entry in newest.entries]
    seated = {found.member: place for place, found in current.items()}
    lines = []
    for place, found in ours.items():
        theirs = {entry.member: entry.state for entry in found.entries}
        if found.events == newest.events:
            torn = [(entry.member, entry.state) for entry in found.entries] != roles
            rivals = ["another member of the same age"] if torn else []
        elif place in current:
            rivals = []
        elif _went_on(found, entries.get(found.member, EMPTY)):
            rivals = [*seated.values()]
        else:
            # Whom it does not know came later, and says nothing.
            rivals = [
                other for member, other in seated.items() if theirs.get(member) is State.FAULTY
            ]
        if rivals:
            lines.append(
                f"split brain: {place} went on without {', '.join(rivals)}, and they without it; "
                "decide whose bytes count, and assemble without the others"
            )
    return lines


def _went_on(found: Superblock, entry: Entry) -> bool:
    """Whether it has roles that were settled after it was counted out: so by itself. Those that
    were not were never acted upon.
    """
    out = entry.state is State.FAULTY and entry.left_events
    return bool(out) and Flag.SETTLED in found.flags and found.events >= entry.left_events


def _shortage(newest: Superblock, slots: Sequence[str | None], *, degraded: bool) -> Iterable[str]:
    missing = [slot for slot, place in enumerate(slots) if place is None]
    if not missing:
        return
    geometry = newest.geometry
    words = ", ".join(_missing_words(newest, slot) for slot in missing)
    halves = set(_rebuilding(newest)) - {*missing}
    if not survives(geometry, {*missing, *halves}):
        also = f", and {len(halves)} are not rebuilt yet" if halves else ""
        yield (
            f"{len(missing)} of {geometry.members} members are missing ({words}){also}; "
            f"level {geometry.level} cannot be without them: find them"
        )
    elif not degraded and any(
        newest.entries[slot].state in (State.ACTIVE, State.REBUILDING) for slot in missing
    ):
        yield (
            f"{len(missing)} of {geometry.members} members are missing ({words}); "
            "find them, or allow it to start degraded (--degraded)"
        )


def _rebuilding(newest: Superblock) -> Iterable[int]:
    """Slots whose member holds a part of what it should."""
    return (slot for slot, entry in enumerate(newest.slots) if entry.state is State.REBUILDING)


def _missing_words(newest: Superblock, slot: int) -> str:
    entry = newest.entries[slot]
    if entry.state in (State.ACTIVE, State.REBUILDING):
        return f"slot {slot}: {entry.member}"
    return f"slot {slot}: {entry.state.name.lower()}"


def _doubt(
    newest: Superblock, slots: Sequence[str | None], *, dirty: bool, force: bool
) -> Iterable[str]:
    """Of a stripe that was being written, parity may be new and data old, or the other way."""
    lacking = None in slots or any(True for _ in _rebuilding(newest))
    at_risk = newest.geometry.parities and dirty and lacking
    if at_risk and Flag.JOURNAL not in newest.flags and not force:
        yield (
            "it was not stopped cleanly, and members are missing or not rebuilt yet: what they "
            "held may come out wrong where stripes were being written; find them, or take the "
            "risk (--force)"
        )
