"""A new array: its superblocks on members that hold nothing anybody needs.

A crash at any point leaves either no array, or one that is whole. First every member gets a
superblock with `events` 0, which says that the array is being made; nobody starts such a one. Then
all get the next, as at any change of roles, and from the first of those on the array is there.

Parity fits from the start where all members can be made zero at once; where not, the array is
dirty from birth, and its first start makes it right.
"""

import errno
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence

import msgspec
import trio
from msgspec.structs import replace

from pmblk.errors import PmblkError
from pmblk.raid import areas
from pmblk.raid.areas import Areas, TooSmall
from pmblk.raid.bitmap import AREA_ALL_SET, region_bytes_for
from pmblk.raid.buffers import aligned, buffer
from pmblk.raid.geometry import CHUNK_BYTES_DEFAULT, Geometry, Layout, Level, layouts_of
from pmblk.raid.keeper import Keeper, Seat
from pmblk.raid.labels import erase_label, read_label
from pmblk.raid.member import Member, Request
from pmblk.raid.superblock import (
    BAD_BLOCKS_BYTES,
    BAD_BLOCKS_OFFSET,
    BITMAP_BYTES,
    BITMAP_OFFSET,
    ENTRIES_MAX,
    NAME_BYTES_MAX,
    Entry,
    Flag,
    State,
    Superblock,
    SuperblockError,
    Unknown,
)

ZERO_BYTES = 1 << 20  # what is written at once where nothing else makes zeroes


class Wishes(msgspec.Struct, frozen=True, kw_only=True):
    """What kind of array it is to be. `layout` None: the level's default.

    `assume_clean`: take the members as they are; parity and copies fit, or nobody minds.
    `force`: also over members of another array.
    """

    name: str
    level: Level
    layout: Layout | None = None
    chunk_bytes: int = CHUNK_BYTES_DEFAULT
    copies: int = 2
    integrity: bool = False
    journal: bool = True
    bitmap: bool = True
    assume_clean: bool = False
    force: bool = False
    array: uuid.UUID | None = None


async def create(
    wishes: Wishes,
    places: Sequence[str],
    *,
    spares: Sequence[str] = (),
    open_member: Callable[[str], Awaitable[Member]],
) -> Superblock:
    """The array is on its members when this returns. Raises PmblkError, with nothing changed
    unless it was a member that failed.
    """
    everybody = [*places, *spares]
    _check_places(everybody)
    members: list[Member] = []
    try:
        for place in everybody:
            members.append(await open_member(place))
        if not wishes.force:
            for member in members:
                _refuse_member(member.place, (await read_label(member)).found)
        superblock = _design(wishes, members, len(places))
        return await _write(superblock, members, assume_clean=wishes.assume_clean)
    except OSError as error:
        raise PmblkError(
            f"cannot make the array: {error.strerror or error}",
            hint="there is none now: leave away the member that fails, and make it again",
        ) from error
    finally:
        for member in members:
            member.close()


def _check_places(places: Sequence[str]) -> None:
    for place in places:
        if places.count(place) > 1:
            raise PmblkError(f"{place} is named twice", hint="name each member once")


def _refuse_member(place: str, found: "Superblock | SuperblockError") -> None:
    if isinstance(found, Superblock) and found.events:
        raise PmblkError(
            f"{place} is a member of {found.name} ({found.array})",
            hint="stop that array, and use --force if nobody needs it",
        )
    if isinstance(found, Unknown):
        raise PmblkError(f"{place} is a member of an array of {found}", hint="use --force")


def _design(wishes: Wishes, members: Sequence[Member], count: int) -> Superblock:
    """The superblock of an array that is being made, in the words of no member."""
    for member in members:
        if member.block_bytes > areas.BLOCK_BYTES:
            raise PmblkError(
                f"{member.place} has blocks of {member.block_bytes} bytes",
                hint=f"members have blocks of {areas.BLOCK_BYTES} bytes at most",
            )
    level = wishes.level
    if wishes.integrity and wishes.assume_clean:
        raise PmblkError(
            "checksums of what members hold already are not known",
            hint="leave out --assume-clean, or --integrity",
        )
    if len(wishes.name.encode()) > NAME_BYTES_MAX:
        raise PmblkError(f"{wishes.name} is too long a name", hint=f"{NAME_BYTES_MAX} bytes")
    smallest = min(members, key=lambda member: member.size)
    try:
        found = areas.divide(
            smallest.size,
            chunk_bytes=wishes.chunk_bytes,
            journal=wishes.journal and level in (4, 5, 6),
            integrity=wishes.integrity,
        )
        geometry = Geometry(
            level=level,
            members=count,
            member_bytes=found.member_bytes,
            chunk_bytes=wishes.chunk_bytes,
            layout=wishes.layout if wishes.layout is not None else _default_layout(level),
            copies=wishes.copies,
        )
    except TooSmall as error:
        raise PmblkError(f"{smallest.place}: {error}", hint="use a larger one") from None
    except ValueError as error:
        raise PmblkError(str(error)) from None
    if len(members) > ENTRIES_MAX:
        raise PmblkError(
            f"{len(members)} members and spares", hint=f"at most {ENTRIES_MAX} together"
        )
    return _superblock(wishes, geometry, found, len(members))


def _default_layout(level: int) -> Layout:
    return layouts_of(level)[0]  # type: ignore[return-value]  # its words are Layout's


def _superblock(wishes: Wishes, geometry: Geometry, found: Areas, count: int) -> Superblock:
    flags = Flag.DIRTY if geometry.redundancy and not wishes.assume_clean else Flag(0)
    flags |= Flag.INTEGRITY if wishes.integrity else Flag(0)
    flags |= Flag.JOURNAL if found.journal_bytes else Flag(0)
    now = time.time_ns()
    return Superblock(
        array=wishes.array or uuid.uuid4(),
        member=uuid.UUID(int=0),
        name=wishes.name,
        created_ns=now,
        updated_ns=now,
        events=0,
        generation=0,
        geometry=geometry,
        entries=tuple(
            Entry(uuid.uuid4(), State.ACTIVE if number < geometry.members else State.SPARE)
            for number in range(count)
        ),
        data_offset=found.data_offset,
        flags=flags,
        bitmap_chunk_bytes=region_bytes_for(geometry.size)
        if wishes.bitmap and geometry.redundancy
        else 0,
        journal_offset=found.journal_offset,
        journal_bytes=found.journal_bytes,
        checksums_offset=found.checksums_offset,
    )


async def _write(
    superblock: Superblock, members: Sequence[Member], *, assume_clean: bool
) -> Superblock:
    for member in members:
        await erase_label(member)  # of all of them, before anything of an array there before is
    async with trio.open_nursery() as nursery:
        for member in members:
            nursery.start_soon(blank, member, superblock)
    if Flag.INTEGRITY in superblock.flags and not superblock.geometry.redundancy:
        for member in members:  # there is nothing that could make its checksums fit later
            await write_zeroes(member, superblock.data_offset, superblock.geometry.member_bytes)
    if Flag.DIRTY in superblock.flags and await _zeroed(superblock, members):
        superblock = replace(superblock, flags=superblock.flags & ~Flag.DIRTY)
    if Flag.DIRTY not in superblock.flags:
        superblock = replace(superblock, resync_position=superblock.geometry.size)
    if Flag.DIRTY in superblock.flags and superblock.bitmap_chunk_bytes:
        for member in members:
            await member.write((Request(BITMAP_OFFSET, aligned(AREA_ALL_SET)),))
    seats = {number: Seat(member, 0) for number, member in enumerate(members)}
    keeper = Keeper(superblock, seats, out=_give_up)
    await keeper.update(lambda one: one)  # events 0: it is being made
    await keeper.change_roles(lambda one: one)
    return keeper.superblock


def _give_up(_number: int, error: OSError) -> None:
    """A new array does not begin with a member that fails."""
    raise PmblkError(f"a member failed: {error.strerror or error}", hint="leave it away")


async def blank(member: Member, superblock: Superblock) -> None:
    """Nothing of an earlier array is in the areas that this one has on each member, besides the
    superblock and the data. Raises OSError.
    """
    await write_zeroes(member, BITMAP_OFFSET, BITMAP_BYTES)
    await write_zeroes(member, BAD_BLOCKS_OFFSET, BAD_BLOCKS_BYTES)
    await blank_journal(member, superblock)
    if superblock.checksums_offset:
        length = areas.checksums_bytes(areas.summed_bytes(superblock))
        await write_zeroes(member, superblock.checksums_offset, length)
    await member.flush()


async def blank_journal(member: Member, superblock: Superblock) -> None:
    """Nothing that was recorded once is found in it. Raises OSError."""
    if superblock.journal_bytes:
        await write_zeroes(member, superblock.journal_offset, superblock.journal_bytes)


async def _zeroed(superblock: Superblock, members: Sequence[Member]) -> bool:
    """Whether all the data could be made zero at once: then parity and copies fit."""
    geometry = superblock.geometry
    for member in members[: geometry.members]:
        try:
            await member.zero(superblock.data_offset, geometry.member_bytes)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            return False
    return True


async def write_zeroes(member: Member, offset: int, length: int) -> None:
    """The range is zero, however the member does it. Raises OSError."""
    try:
        await member.zero(offset, length)
        return
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
    zeroes = buffer(min(length, ZERO_BYTES))
    while length:
        piece = min(length, ZERO_BYTES)
        await member.write((Request(offset, zeroes[:piece]),))
        offset, length = offset + piece, length - piece
