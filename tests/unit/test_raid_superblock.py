"""The superblock: what is written is read, and a byte that changed is never taken for good."""

import random
import struct
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmblk.checksum import crc32c
from pmblk.raid import superblock
from pmblk.raid.geometry import MEMBERS_MIN, Geometry, layouts_of
from pmblk.raid.superblock import (
    BLOCK_BYTES,
    EMPTY,
    ENTRIES_MAX,
    Absent,
    Entry,
    Flag,
    State,
    Superblock,
    SuperblockError,
    Unknown,
    decode,
    encode,
    newest,
)

GEOMETRY = Geometry(level=5, members=4, member_bytes=1 << 30, layout="left-symmetric")
U64 = st.integers(0, 2**64 - 1)
U32 = st.integers(0, 2**32 - 1)


def example(*, events: int = 7) -> Superblock:
    members = [uuid.UUID(int=number) for number in range(1, 5)]
    return Superblock(
        array=uuid.UUID(int=99),
        member=members[2],
        name="disks",
        created_ns=1,
        updated_ns=2,
        events=events,
        generation=3,
        geometry=GEOMETRY,
        entries=tuple(Entry(member, State.ACTIVE) for member in members),
    )


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    level = draw(st.sampled_from(sorted(MEMBERS_MIN)))
    members = draw(st.integers(MEMBERS_MIN[level], 64))
    return Geometry(
        level=level,  # type: ignore[arg-type]
        members=members,
        member_bytes=draw(st.integers(64 << 20, 1 << 50)),
        chunk_bytes=1 << draw(st.integers(12, 20)),
        layout=draw(st.sampled_from(layouts_of(level))),
        copies=draw(st.integers(2, min(members, 4))) if level == 10 else 2,
    )


@st.composite
def superblocks(draw: st.DrawFn) -> Superblock:
    geometry = draw(geometries())
    entry = st.builds(Entry, st.uuids(), st.sampled_from(State), U64)
    least = geometry.members
    entries = draw(st.lists(entry | st.just(EMPTY), min_size=least, max_size=ENTRIES_MAX))
    letters = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
    return Superblock(
        array=draw(st.uuids()),
        member=draw(st.uuids()),
        name=draw(st.text(letters, max_size=16)),
        created_ns=draw(U64),
        updated_ns=draw(U64),
        events=draw(U64),
        generation=draw(U64),
        geometry=geometry,
        entries=tuple(entries),
        data_offset=draw(U64),
        flags=Flag(draw(st.integers(0, 31))),
        resync_position=draw(U64),
        reshape_position=draw(U64),
        reshape_members=draw(U32),
        bitmap_chunk_bytes=draw(U32),
        journal_offset=draw(U64),
        journal_bytes=draw(U64),
        checksums_offset=draw(U64),
    )


@given(superblocks())
def test_what_is_written_is_read(one: Superblock) -> None:
    assert decode(encode(one)) == one


def test_every_changed_byte_is_found_out() -> None:
    block = encode(example())
    for place in range(BLOCK_BYTES):
        changed = bytearray(block)
        changed[place] ^= 0x10
        with pytest.raises(SuperblockError):
            decode(bytes(changed))


@given(st.integers(0, 2**32), st.booleans())
def test_noise_is_refused(seed: int, magic: bool) -> None:
    noise = random.Random(seed).randbytes(BLOCK_BYTES)
    block = superblock.MAGIC + noise[8:] if magic else noise
    with pytest.raises(SuperblockError):
        decode(block)


def signed(block: bytearray) -> bytes:
    """With a checksum that fits, as a hostile or a broken writer would leave it."""
    block[8:12] = bytes(4)
    block[8:12] = struct.pack("<I", crc32c(bytes(block)))
    return bytes(block)


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (192, 2, "level 2"),
        (193, 200, "index out of range"),
        (193, 7, 'layout "near" is not for level 5'),
        (194, 1, "members 1"),
        (1024 + 16, 77, "77 is not a valid State"),
    ],
)
def test_what_cannot_be_is_refused_although_its_checksum_fits(
    place: int, value: int, words: str
) -> None:
    block = bytearray(encode(example()))
    block[place] = value
    with pytest.raises(SuperblockError, match=words):
        decode(signed(block))


def test_a_newer_version_is_told_from_damage() -> None:
    block = bytearray(encode(example()))
    block[12] = 9
    with pytest.raises(Unknown, match="version 9"):
        decode(signed(block))
    with pytest.raises(Unknown):
        newest((encode(example()), signed(block)))
    block = bytearray(encode(example()))
    block[256] = 0x80
    with pytest.raises(Unknown, match="features 0x80"):
        decode(signed(block))


def test_the_newer_slot_counts_and_a_torn_one_does_not() -> None:
    old, new = encode(example(events=7)), encode(example(events=8))
    assert newest((old, new))[1] == 1
    assert newest((new, old))[1] == 0
    for cut in range(512, BLOCK_BYTES, 512):
        found, number = newest((old, new[:cut] + old[cut:]))
        assert (found.events, number) in ((7, 0), (8, 1))
    torn = new[:512] + bytes(BLOCK_BYTES - 512)
    assert newest((old, torn)) == (example(events=7), 0)
    with pytest.raises(Absent):
        newest((bytes(BLOCK_BYTES), bytes(BLOCK_BYTES)))
    with pytest.raises(SuperblockError, match="checksum"):
        newest((bytes(BLOCK_BYTES), torn))


def test_a_member_finds_its_own_role() -> None:
    assert example().entry_of_itself == 2
