"""Assembling an array: who is in, who is left out and why, and when nobody may start."""

import itertools
import random
import uuid

import msgspec
import pytest

from pmblk.raid.assembly import Assembly, Candidate, NoArray, assemble
from pmblk.raid.geometry import Geometry, layouts_of
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

ARRAY = uuid.UUID(int=1)
MEMBERS = [uuid.UUID(int=100 + number) for number in range(8)]


def member(
    slot: int,
    *,
    level: int = 5,
    members: int = 4,
    events: int = 5,
    flags: Flag = Flag.SETTLED,
    states: dict[int, State] | None = None,
    generation: int = 0,
) -> Superblock:
    """The superblock of the member in a slot; `states` are roles that are not ACTIVE."""
    states = states or {}
    entries = [
        Entry(MEMBERS[number], states.get(number, State.ACTIVE))
        if states.get(number) != State.EMPTY
        else EMPTY
        for number in range(max(members, *states) + 1 if states else members)
    ]
    return Superblock(
        array=ARRAY,
        member=MEMBERS[slot],
        name="disks",
        created_ns=0,
        updated_ns=0,
        events=events,
        generation=generation,
        geometry=Geometry(
            level=level,  # type: ignore[arg-type]
            members=members,
            member_bytes=1 << 30,
            layout=layouts_of(level)[0],  # type: ignore[arg-type]
        ),
        entries=tuple(entries),
        flags=flags,
    )


def candidates(*found: "Superblock | SuperblockError") -> list[Candidate]:
    return [Candidate(f"/d{number}", one) for number, one in enumerate(found)]


def four(**changes: object) -> list[Superblock]:
    return [msgspec.structs.replace(member(slot), **changes) for slot in range(4)]


def obstacle(assembly: Assembly) -> str:
    (line,) = assembly.obstacles
    return line


# ---- well


def test_the_order_of_the_paths_does_not_matter() -> None:
    for order in itertools.permutations(candidates(*four())):
        assembly = assemble(order)
        assert assembly.slots == ("/d0", "/d1", "/d2", "/d3")
        assert (assembly.obstacles, assembly.notes, assembly.dirty) == ((), (), False)


def test_spares_are_found_behind_the_slots() -> None:
    states = {4: State.SPARE}
    found = [member(slot, states=states) for slot in (4, 3, 2, 1, 0)]
    assembly = assemble(candidates(*found))
    assert assembly.slots == ("/d4", "/d3", "/d2", "/d1")
    assert assembly.spares == ("/d0",)


def test_one_that_says_dirty_is_enough() -> None:
    found = four()
    found[2] = msgspec.structs.replace(found[2], flags=Flag.SETTLED | Flag.DIRTY, generation=1)
    assert assemble(candidates(*found)).dirty


# ---- stale members


def test_a_stale_member_is_left_out_by_one_change_already() -> None:
    states = {3: State.FAULTY}
    found = [*(member(slot, events=6, states=states) for slot in range(3)), member(3, events=5)]
    assembly = assemble(candidates(*found))
    assert assembly.slots == ("/d0", "/d1", "/d2", None)
    assert "marked faulty" in assembly.left_out["/d3"]
    assert assembly.obstacles == (), "it was known to be missing: no need to allow it"


def test_an_old_image_of_a_member_is_left_out() -> None:
    found = [*four(events=7)[:3], member(3, events=6)]
    assembly = assemble(candidates(*found), degraded=True)
    assert "stale: 1 changes" in assembly.left_out["/d3"]
    assert assembly.slots[3] is None


@pytest.mark.parametrize("told", [1, 2, 3])
def test_a_crash_amid_a_change_of_roles_loses_nobody_but_who_failed(told: int) -> None:
    """Slot 3 fails; only `told` of the others have heard of it when the power goes."""
    states = {3: State.FAULTY}
    after = [member(slot, events=6, states=states, flags=Flag(0)) for slot in range(told)]
    before = [member(slot, events=5) for slot in range(told, 4)]
    assembly = assemble(candidates(*after, *before))
    assert assembly.slots == ("/d0", "/d1", "/d2", None)
    assert assembly.obstacles == ()


def test_once_settled_nobody_may_be_behind() -> None:
    states = {3: State.FAULTY}
    found = [
        member(0, events=6, states=states, flags=Flag.SETTLED),
        member(1, events=6, states=states, flags=Flag(0)),
        member(2, events=5),
    ]
    assembly = assemble(candidates(*found), degraded=True)
    assert "stale" in assembly.left_out["/d2"]
    assert "cannot be without them" in obstacle(assembly)


# ---- split brain


def test_two_halves_that_went_on_without_each_other_do_not_start() -> None:
    def half(slot: int, other: int, events: int) -> Superblock:
        return member(slot, level=1, members=2, events=events, states={other: State.FAULTY})

    for first, second in ((6, 6), (6, 7), (9, 6)):
        assembly = assemble(candidates(half(0, 1, first), half(1, 0, second)), degraded=True)
        assert any("split brain" in line for line in assembly.obstacles)


def test_a_member_that_only_slept_is_no_split_brain() -> None:
    found = [
        member(0, level=1, members=2, events=9, states={1: State.FAULTY}),
        member(1, level=1, members=2, events=5),
    ]
    assert assemble(candidates(*found)).obstacles == ()


@pytest.mark.parametrize(
    ("events", "flags", "split"),
    [
        (6, Flag.SETTLED, True),
        (8, Flag.SETTLED, True),
        (5, Flag.SETTLED, False),  # it slept
        (6, Flag(0), False),  # a change that was cut off
    ],
)
def test_who_went_on_alone_is_found_out_though_it_has_removed_the_others(
    events: int, flags: Flag, split: bool
) -> None:
    current = member(0, level=1, members=2, events=9, states={1: State.FAULTY})
    left = msgspec.structs.replace(current.entries[1], left_events=6)
    current = msgspec.structs.replace(current, entries=(current.entries[0], left))
    alone = member(1, level=1, members=2, events=events, flags=flags, states={0: State.EMPTY})
    lines = assemble(candidates(current, alone), degraded=True).obstacles
    assert [line.split(";")[0] for line in lines] == split * [
        "split brain: /d1 went on without /d0, and they without it"
    ]


# ---- what is missing


def test_missing_members_have_to_be_allowed() -> None:
    found = candidates(*four())[:3]
    line = obstacle(assemble(found))
    assert "1 of 4 members are missing (slot 3: " in line
    assert str(MEMBERS[3]) in line
    assert "--degraded" in line
    assert assemble(found, degraded=True).obstacles == ()


def test_one_loss_too_many_cannot_be_allowed() -> None:
    line = obstacle(assemble(candidates(*four())[:2], degraded=True, force=True))
    assert "2 of 4 members are missing" in line
    assert "level 5 cannot be without them" in line


def test_a_dirty_array_does_not_make_up_what_is_missing() -> None:
    found = candidates(*four(flags=Flag.SETTLED | Flag.DIRTY))[1:]
    assert "not stopped cleanly" in obstacle(assemble(found, degraded=True))
    assert assemble(found, degraded=True, force=True).obstacles == ()
    journaled = candidates(*four(flags=Flag.SETTLED | Flag.DIRTY | Flag.JOURNAL))[1:]
    assert assemble(journaled, degraded=True).obstacles == ()


def test_a_dirty_array_does_not_make_up_what_is_not_rebuilt_yet() -> None:
    found = four(flags=Flag.SETTLED | Flag.DIRTY)
    entries = (*found[0].entries[:3], Entry(MEMBERS[3], State.REBUILDING))
    found = [msgspec.structs.replace(one, entries=entries) for one in found]
    assert "not stopped cleanly" in obstacle(assemble(candidates(*found)))
    assert assemble(candidates(*found), force=True).obstacles == ()


def test_a_dirty_mirror_may_start_degraded() -> None:
    found = [member(0, level=1, members=2, flags=Flag.SETTLED | Flag.DIRTY)]
    assert assemble(candidates(*found), degraded=True).obstacles == ()


# ---- what is no member


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (Absent("no superblock"), "never a member, or is erased"),
        (SuperblockError("its checksum is wrong: torn, or damaged"), "checksum is wrong"),
        (Unknown("version 9; this program knows version 1"), "nothing is changed on it"),
        (msgspec.structs.replace(member(0), array=uuid.UUID(int=2)), "another array"),
        (msgspec.structs.replace(member(0), member=uuid.UUID(int=2)), "does not name it"),
    ],
)
def test_a_stranger_is_left_out_with_its_reason(
    found: "Superblock | SuperblockError", words: str
) -> None:
    assembly = assemble([*candidates(*four()), Candidate("/x", found)], array=ARRAY)
    assert words in assembly.left_out["/x"]
    assert assembly.obstacles == ()
    assert any(line.startswith("/x: left out: ") for line in assembly.notes)


def test_a_copy_of_a_member_is_told() -> None:
    assembly = assemble([*candidates(*four()), Candidate("/copy", member(2))])
    assert "/d2 and /copy are both member" in obstacle(assembly)


def test_several_arrays_have_to_be_told_apart() -> None:
    other = msgspec.structs.replace(member(0), array=uuid.UUID(int=2), name="other")
    with pytest.raises(NoArray, match=r"several arrays: disks \(.*, other \("):
        assemble(candidates(*four(), other))
    assert assemble(candidates(*four(), other), array=ARRAY).obstacles == ()


@pytest.mark.parametrize("found", [[], [Absent("no superblock")]])
def test_nothing_to_assemble_is_said(found: list[SuperblockError]) -> None:
    with pytest.raises(NoArray, match="none of these devices"):
        assemble(candidates(*found))
    with pytest.raises(NoArray, match="no member of"):
        assemble(candidates(*found), array=ARRAY)


def test_a_history_of_failures_never_seats_a_member_that_missed_a_write() -> None:
    """Members fail, and the power goes at any moment of it; who is seated has seen every write."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    chosen = random.Random(seed)
    for _ in range(2000):
        _one_history(chosen, members=5)


def _one_history(chosen: random.Random, *, members: int) -> None:
    shown = [member(slot, level=6, members=members) for slot in range(members)]
    last_write = [0] * members  # that each of them has seen
    states: dict[int, State] = {}
    for write in range(1, chosen.randrange(1, 4)):
        working = [slot for slot in range(members) if slot not in states]
        states[chosen.choice(working)] = State.FAULTY
        if not _announce(chosen, shown, states):
            break  # the power went before all had heard, so nothing was written
        for slot in set(range(members)) - set(states):
            last_write[slot] = write
    present = chosen.sample(range(members), chosen.randint(1, members))
    assembly = assemble(
        [Candidate(str(slot), shown[slot]) for slot in present], degraded=True, force=True
    )
    if not assembly.obstacles:
        newest = max(last_write[slot] for slot in present)
        for place in assembly.slots:
            assert place is None or last_write[int(place)] == newest


def _announce(chosen: random.Random, shown: list[Superblock], states: dict[int, State]) -> bool:
    """Write the roles to all who stay, then as settled, in any order; False: cut short."""
    events = max(one.events for one in shown) + 1
    for flags in (Flag(0), Flag.SETTLED):
        staying = [slot for slot in range(len(shown)) if slot not in states]
        chosen.shuffle(staying)
        for slot in staying:
            if chosen.random() < 0.05:
                return False
            shown[slot] = member(
                slot, level=6, members=len(shown), events=events, states=states, flags=flags
            )
    return True
