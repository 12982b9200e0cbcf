"""What every member says of itself and of its array: the superblock, byte by byte. Pure.

Two slots of 4 KiB take turns, so a torn write leaves the one before. All members of one array carry
the same but for `member`, so any of them tells the roles of all. Two counts order them: `events`
goes up when a role changes, `generation` with every other update. A change of roles is written to
all who stay, and then once more as SETTLED; only then may a write skip whoever left. A version that
is not known is refused and never rewritten.

    0        nothing: a boot sector, or another format's label, stays where it is
    4 KiB    slot 0        8 KiB  slot 1
    64 KiB   write-intent bitmap, 64 KiB
    128 KiB  log of bad blocks, 64 KiB
    256 KiB  nothing yet, up to `data_offset`

Integers are little-endian. Sizes and offsets are bytes.
"""

import enum
import struct
import uuid
from typing import Any

import msgspec

from pmblk.checksum import crc32c
from pmblk.raid.geometry import MEMBERS_MAX, Geometry

MAGIC = b"PMBLKRD1"
VERSION = 1
BLOCK_BYTES = 4096
SLOT_OFFSETS = (4096, 8192)
BITMAP_OFFSET, BITMAP_BYTES = 64 << 10, 64 << 10
BAD_BLOCKS_OFFSET, BAD_BLOCKS_BYTES = 128 << 10, 64 << 10
DATA_OFFSET = 1 << 20
NAME_BYTES_MAX = 64
ENTRIES_MAX = MEMBERS_MAX + 16  # slots, and spares behind them

_LAYOUTS = (
    *("", "left-asymmetric", "right-asymmetric", "left-symmetric", "right-symmetric"),
    *("parity-first", "parity-last", "near", "far", "offset"),
)


class State(enum.IntEnum):
    """What an entry of the table of roles holds."""

    EMPTY = 0  # nobody, or a slot whose member was removed
    ACTIVE = 1
    FAULTY = 2
    SPARE = 3
    REBUILDING = 4  # whole up to its checkpoint


class Flag(enum.IntFlag):
    DIRTY = 1 << 0  # written to since the last clean stop: parity may not fit
    INTEGRITY = 1 << 1  # a CRC-32C is kept for each 4 KiB block
    JOURNAL = 1 << 2  # stripes are journaled, so that no write hole is left
    RESHAPING = 1 << 3  # the data are on their way to the geometry, from that of fewer members
    SETTLED = 1 << 4  # every member that stays has these roles
    DOUBT = 1 << 5  # writes have failed: what the bitmap marks may not fit, journal or not


class Entry(msgspec.Struct, frozen=True):
    """One member's role. `checkpoint`: how much of its data area a rebuild has filled.
    `left_events`: what `events` became as it was counted out, if it is faulty; 0: nobody knows.
    """

    member: uuid.UUID
    state: State
    checkpoint: int = 0
    left_events: int = 0


EMPTY = Entry(uuid.UUID(int=0), State.EMPTY)


class Superblock(msgspec.Struct, frozen=True, kw_only=True):
    """`entries` are the slots of the geometry in their order, and then the spares.

    `resync_position`: up to there parity and copies were made right since the last unclean stop;
    with a journal, since the array was made.
    `reshape_members` are those that an array under RESHAPING had before, and `reshape_offset` is
    where their data began; up to `reshape_position`, in bytes of the array, all is where the
    geometry says.
    `whole_events`: what `events` was when every slot was whole last. Who left then or later lacks
    no more than what the write-intent bitmap names.
    """

    array: uuid.UUID
    member: uuid.UUID
    name: str
    created_ns: int
    updated_ns: int
    events: int
    generation: int
    geometry: Geometry
    entries: tuple[Entry, ...]
    data_offset: int = DATA_OFFSET
    flags: Flag = Flag(0)
    resync_position: int = 0
    reshape_position: int = 0
    reshape_members: int = 0
    reshape_offset: int = 0
    bitmap_chunk_bytes: int = 0
    journal_offset: int = 0
    journal_bytes: int = 0
    checksums_offset: int = 0
    whole_events: int = 0

    @property
    def age(self) -> tuple[int, int]:
        """What is larger is newer."""
        return self.events, self.generation

    @property
    def slots(self) -> tuple[Entry, ...]:
        """The entries of the geometry's slots, without the spares behind them."""
        return self.entries[: self.geometry.members]

    @property
    def free_entry(self) -> int:
        """The number of the first entry behind the slots that nobody has."""
        members = self.geometry.members
        behind = self.entries[members:]
        return members + next((i for i, one in enumerate(behind) if one == EMPTY), len(behind))

    @property
    def entry_of_itself(self) -> int | None:
        """The number of the entry that names this member."""
        return next((i for i, one in enumerate(self.entries) if one.member == self.member), None)


class SuperblockError(ValueError):
    """Not a superblock that this version can use; the words say why."""


class Unknown(SuperblockError):
    """A newer version's: whole, and not to be touched."""


class Absent(SuperblockError):
    """No superblock at all."""


# magic, crc, version, array, member, name, created, updated, events, generation
_IDENTITY = struct.Struct("<8sII16s16s64sQQQQ")
# level, layout, members, copies, chunk bytes, member bytes, data offset
_SHAPE = struct.Struct("<BBHHxxIQQ")
# flags, resync position, reshape position, reshape members, bitmap chunk, journal offset and bytes,
# checksums offset, entries, whole events, reshape offset
_STATE = struct.Struct("<IxxxxQQIIQQQI4xQQ")
# member, state, left events, checkpoint
_ENTRY = struct.Struct("<16sB3xIQ")
_SHAPE_OFFSET = 192
_STATE_OFFSET = 256
_ENTRIES_OFFSET = 1024
_CRC_OFFSET = 8

assert _IDENTITY.size == 144 <= _SHAPE_OFFSET
assert _SHAPE.size == 28 <= _STATE_OFFSET - _SHAPE_OFFSET
assert _STATE.size == 80 <= _ENTRIES_OFFSET - _STATE_OFFSET
assert _ENTRY.size == 32
assert _ENTRIES_OFFSET + ENTRIES_MAX * _ENTRY.size <= BLOCK_BYTES


def encode(superblock: Superblock) -> bytes:
    """A slot's 4 KiB."""
    block = bytearray(BLOCK_BYTES)
    name = superblock.name.encode()
    geometry, entries = superblock.geometry, superblock.entries
    assert len(name) <= NAME_BYTES_MAX
    assert geometry.members <= len(entries) <= ENTRIES_MAX
    _IDENTITY.pack_into(
        block,
        0,
        *(MAGIC, 0, VERSION),
        *(superblock.array.bytes, superblock.member.bytes, name),
        *(superblock.created_ns, superblock.updated_ns),
        *(superblock.events, superblock.generation),
    )
    _SHAPE.pack_into(
        block,
        _SHAPE_OFFSET,
        *(geometry.level, _LAYOUTS.index(geometry.layout), geometry.members, geometry.copies),
        *(geometry.chunk_bytes, geometry.member_bytes, superblock.data_offset),
    )
    _STATE.pack_into(
        block,
        _STATE_OFFSET,
        *(superblock.flags, superblock.resync_position),
        *(superblock.reshape_position, superblock.reshape_members),
        superblock.bitmap_chunk_bytes,
        *(superblock.journal_offset, superblock.journal_bytes),
        *(superblock.checksums_offset, len(entries), superblock.whole_events),
        superblock.reshape_offset,
    )
    for number, entry in enumerate(entries):
        place = _ENTRIES_OFFSET + number * _ENTRY.size
        fields = (entry.state, entry.left_events, entry.checkpoint)
        _ENTRY.pack_into(block, place, entry.member.bytes, *fields)
    struct.pack_into("<I", block, _CRC_OFFSET, crc32c(bytes(block)))
    return bytes(block)


def decode(block: bytes) -> Superblock:
    """What a slot's 4 KiB say. Raises SuperblockError: Absent, Unknown, or what is wrong."""
    assert len(block) == BLOCK_BYTES
    magic, crc, version, *identity = _IDENTITY.unpack_from(block)
    if magic != MAGIC:
        raise Absent("no superblock")
    whole = block[:_CRC_OFFSET] + bytes(4) + block[_CRC_OFFSET + 4 :]
    if crc32c(whole) != crc:
        raise SuperblockError("its checksum is wrong: torn, or damaged")
    if version != VERSION:
        raise Unknown(f"version {version}; this program knows version {VERSION}")
    try:
        return _decode_fields(block, identity)
    except SuperblockError:
        raise
    except (ValueError, IndexError) as error:  # whole, but nothing that we would have written
        raise SuperblockError(f"it cannot be: {error}") from error


def _decode_fields(block: bytes, identity: list[Any]) -> Superblock:
    array, member, name, created_ns, updated_ns, events, generation = identity
    shape = _SHAPE.unpack_from(block, _SHAPE_OFFSET)
    level, layout, members, copies, chunk_bytes, member_bytes, data_offset = shape
    state = _STATE.unpack_from(block, _STATE_OFFSET)
    flags, resync, reshape, reshape_members, bitmap_chunk, journal, length, checksums, *rest = state
    count, whole_events, reshape_offset = rest
    if unknown := flags & ~int(~Flag(0)):
        raise Unknown(f"features {unknown:#x}, which this program does not know")
    geometry = Geometry(
        level=level,
        members=members,
        member_bytes=member_bytes,
        chunk_bytes=chunk_bytes,
        layout=_LAYOUTS[layout],  # type: ignore[arg-type]  # Geometry checks it
        copies=copies,
    )
    if not members <= count <= ENTRIES_MAX:
        raise ValueError(f"{count} roles for {members} members")
    return Superblock(
        array=uuid.UUID(bytes=array),
        member=uuid.UUID(bytes=member),
        name=name.rstrip(b"\0").decode(),
        created_ns=created_ns,
        updated_ns=updated_ns,
        events=events,
        generation=generation,
        geometry=geometry,
        entries=tuple(_decode_entry(block, number) for number in range(count)),
        data_offset=data_offset,
        flags=Flag(flags),
        resync_position=resync,
        reshape_position=reshape,
        reshape_members=reshape_members,
        reshape_offset=reshape_offset,
        bitmap_chunk_bytes=bitmap_chunk,
        journal_offset=journal,
        journal_bytes=length,
        checksums_offset=checksums,
        whole_events=whole_events,
    )


def _decode_entry(block: bytes, number: int) -> Entry:
    place = _ENTRIES_OFFSET + number * _ENTRY.size
    member, state, left_events, checkpoint = _ENTRY.unpack_from(block, place)
    return Entry(uuid.UUID(bytes=member), State(state), checkpoint, left_events)


def newest(slots: "tuple[bytes, bytes]") -> tuple[Superblock, int]:
    """The newer of two slots that are whole, and its number. Raises SuperblockError for neither.

    A slot of an unknown version rules: its writer knows more than we do.
    """
    found: list[tuple[Superblock, int]] = []
    problems: list[SuperblockError] = []
    for number, block in enumerate(slots):
        try:
            found.append((decode(block), number))
        except Unknown:
            raise
        except SuperblockError as error:
            problems.append(error)
    if found:
        return max(found, key=lambda one: one[0].age)
    raise next((one for one in problems if not isinstance(one, Absent)), problems[0])
