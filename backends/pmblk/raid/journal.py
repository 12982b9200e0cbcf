"""The journal of stripes, byte by byte, and what a start makes of it. Pure.

Each member has an area of its own: two blocks that take turns to hold the *mark*, and behind them
the *log*. A mark opens a session: a number that only grows, and a nonce. The log is what was
recorded in that session, one record behind the other from its start; whatever has another nonce is
from a session that is over.

A *transaction* is one round of writes to members. Before it begins, each member that takes part
gets a record: a header, then the very bytes that are going to be written in place on that member.
The header names all who take part, and has a CRC-32C for every 4 KiB of every piece. A piece of a
full stripe is *bare*: its bytes are not in the record.

    mark     magic, CRC-32C, session, nonce
    record   0   magic, CRC-32C of the header, its length, sequence, nonce, who takes part (a bit
                 for each slot), slot, pieces
             64  for each piece: offset on the device, length, whether it is bare
             then  a CRC-32C for each block of each piece; then zeroes up to a whole block
             then  the bytes of the pieces that are not bare, in their order

Integers are little-endian. Sizes, offsets and positions are bytes; positions count in the log.

Why replaying the log is right:

1. A transaction begins in place only when all of its records are durable, except on members that
   have failed, durably, by then; and the next one is recorded only after that. So one that lacks a
   record on a member that is there has not begun, or is the journal of that member damaged; and
   not begun can only be the last one (`decide`).
2. Nothing in the log is overwritten in its session. A session ends with a flush of all members
   after its last write in place, and only then the next mark is written. So whatever of a
   session's writes may not be in place is in the log of the newest mark.
3. A block's newest record has what was written there last, since writes in place without a record
   (heals, rebuilds) change nothing that a record says. `settle` takes only that one, so nothing
   older comes over anything newer.
4. The records of one transaction have data and parity that fit. So what a member that is missing
   should hold follows from the others, whenever it went: one that fails while records are written
   takes no part in the round in place, and is missing, durably, before that begins; one that fails
   in the round in place has its record like everybody, or is missing.
5. One that was given up (a member did not take its record, and cannot be let go) must never be
   replayed: later parity was computed without it. The session ends before the next one.
"""

import struct
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import msgspec

from pmblk.checksum import crc32c
from pmblk.raid.geometry import MEMBERS_MAX

BLOCK_BYTES = 4096
MARK_SLOTS = 2
LOG_OFFSET = MARK_SLOTS * BLOCK_BYTES
NONCE_BYTES = 16

_MARK_MAGIC, _RECORD_MAGIC = b"PMBLKJM1", b"PMBLKJR1"
_MARK = struct.Struct("<8sIxxxxQ16s")
# magic, crc, header bytes, sequence, nonce, participants, slot, pieces
_HEAD = struct.Struct("<8sIIQ16sQHxxIxxxxxxxx")
_PIECE = struct.Struct("<QII")
_CRC_OFFSET = 8

assert _MARK.size == 40
assert _HEAD.size == 64
assert _PIECE.size == 16
assert MEMBERS_MAX <= 64, "participants are bits"


# ---- marks


class Mark(NamedTuple):
    """Sessions order marks."""

    session: int
    nonce: bytes


def encode_mark(mark: Mark) -> bytes:
    block = bytearray(BLOCK_BYTES)
    _MARK.pack_into(block, 0, _MARK_MAGIC, 0, mark.session, mark.nonce)
    struct.pack_into("<I", block, _CRC_OFFSET, crc32c(bytes(block)))
    return bytes(block)


def decode_mark(block: bytes) -> Mark | None:
    magic, crc, session, nonce = _MARK.unpack_from(block)
    if magic != _MARK_MAGIC or crc != crc32c(_without_crc(block)):
        return None
    return Mark(session, nonce)


def mark_offset(session: int) -> int:
    """Where its mark goes, in the area: never over the one before it."""
    return session % MARK_SLOTS * BLOCK_BYTES


# ---- records


class Piece(msgspec.Struct, frozen=True, gc=False):
    """Whole blocks at `offset` on the device, with a CRC-32C for each. `bare`: not in the log."""

    offset: int
    length: int
    bare: bool
    crcs: tuple[int, ...]

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Offset and CRC-32C of each."""
        for number, crc in enumerate(self.crcs):
            yield self.offset + number * BLOCK_BYTES, crc

    def fits(self, content: bytes) -> bool:
        return self.crcs == crcs_of(content)


class Record(msgspec.Struct, frozen=True, gc=False):
    """One member's part of a transaction. `position`: where it is in the log."""

    position: int
    header_bytes: int
    sequence: int
    slot: int
    participants: frozenset[int]
    pieces: tuple[Piece, ...]

    @property
    def length(self) -> int:
        """Of all of it, in the log."""
        return self.header_bytes + sum(piece.length for piece in self.pieces if not piece.bare)

    def payload(self) -> Iterator[tuple[int, Piece]]:
        """The pieces whose bytes are in the log, and where."""
        position = self.position + self.header_bytes
        for piece in self.pieces:
            if not piece.bare:
                yield position, piece
                position += piece.length


class Write(NamedTuple):
    """What is going to be written to a member in place."""

    offset: int
    content: memoryview
    bare: bool


def header_bytes_for(pieces: int, blocks: int) -> int:
    """How long the header for so many is."""
    length = _HEAD.size + pieces * _PIECE.size + blocks * 4
    return -(-length // BLOCK_BYTES) * BLOCK_BYTES


def record_bytes_for(writes: Iterable[Write]) -> int:
    """What a record of them takes of the log."""
    pieces = blocks = payload = 0
    for write in writes:
        pieces += 1
        blocks += len(write.content) // BLOCK_BYTES
        payload += 0 if write.bare else len(write.content)
    return header_bytes_for(pieces, blocks) + payload


def encode_into(
    target: memoryview,
    writes: Sequence[Write],
    *,
    sequence: int,
    nonce: bytes,
    slot: int,
    participants: Collection[int],
) -> None:
    """A record into zeroed memory of `record_bytes_for` its writes."""
    crcs = [crc for write in writes for crc in crcs_of(bytes(write.content))]
    header_bytes = header_bytes_for(len(writes), len(crcs))
    bits = sum(1 << one for one in set(participants))
    fields = (sequence, nonce, bits, slot, len(writes))
    _HEAD.pack_into(target, 0, _RECORD_MAGIC, 0, header_bytes, *fields)
    place, position = _HEAD.size, header_bytes
    for offset, content, bare in writes:
        assert offset % BLOCK_BYTES == len(content) % BLOCK_BYTES == 0 < len(content)
        _PIECE.pack_into(target, place, offset, len(content), bare)
        place += _PIECE.size
        if not bare:
            target[position : position + len(content)] = content
            position += len(content)
    struct.pack_into(f"<{len(crcs)}I", target, place, *crcs)
    struct.pack_into("<I", target, _CRC_OFFSET, crc32c(bytes(target[:header_bytes])))
    assert position == len(target)


def header_bytes_of(block: bytes, nonce: bytes) -> int | None:
    """How long the header is that begins with this block; None: none of that session does."""
    magic, _, header_bytes, _, found, *_ = _HEAD.unpack_from(block)
    if magic != _RECORD_MAGIC or found != nonce or header_bytes % BLOCK_BYTES or not header_bytes:
        return None
    return int(header_bytes)


def decode(header: bytes, position: int) -> Record | None:
    """A whole header; None: it is torn, or damaged."""
    _, crc, _, sequence, _, bits, slot, count = _HEAD.unpack_from(header)
    if crc != crc32c(_without_crc(header)):
        return None
    shapes = [_PIECE.unpack_from(header, _HEAD.size + i * _PIECE.size) for i in range(count)]
    place, pieces = _HEAD.size + count * _PIECE.size, []
    for offset, length, bare in shapes:
        crcs = struct.unpack_from(f"<{length // BLOCK_BYTES}I", header, place)
        place += 4 * len(crcs)
        pieces.append(Piece(offset, length, bool(bare), crcs))
    participants = frozenset(one for one in range(MEMBERS_MAX) if bits >> one & 1)
    return Record(position, len(header), sequence, slot, participants, tuple(pieces))


def crcs_of(content: bytes) -> tuple[int, ...]:
    """One for each block."""
    steps = range(0, len(content), BLOCK_BYTES)
    return tuple(crc32c(content[step : step + BLOCK_BYTES]) for step in steps)


def _without_crc(block: bytes) -> bytes:
    return block[:_CRC_OFFSET] + bytes(4) + block[_CRC_OFFSET + 4 :]


# ---- what to do with the logs of those who are there

Logs = Mapping[int, Sequence[Record]]
"""By slot, of every member that is there, in the order of the log."""


class Decision(msgspec.Struct, frozen=True):
    """Sequences in order. `damaged`: slots that must have had a record and do not."""

    whole: tuple[int, ...]
    ignored: tuple[int, ...]
    damaged: frozenset[int]


def decide(logs: Logs) -> Decision:
    """Which transactions are whole."""
    holders: dict[int, set[int]] = {}
    participants: dict[int, frozenset[int]] = {}
    for slot, records in logs.items():
        for record in records:
            holders.setdefault(record.sequence, set()).add(slot)
            participants[record.sequence] = record.participants
    whole, ignored = [], []
    damaged: set[int] = set()
    for sequence in sorted(holders):
        lacking = (participants[sequence] & logs.keys()) - holders[sequence]
        if not lacking:
            whole.append(sequence)
        elif sequence == max(holders):
            ignored.append(sequence)
        else:
            damaged |= lacking
    return Decision(tuple(whole), tuple(ignored), frozenset(damaged))


class Source(NamedTuple):
    """What a block must hold: its CRC-32C, and where in the log it is. None: nowhere."""

    crc: int
    position: int | None


Settled = Mapping[int, Mapping[int, Source]]
"""By slot, by the offset of a block on the device."""


def settle(logs: Logs, whole: Collection[int]) -> Settled:
    """The newest word on each block that whole transactions speak of."""
    settled: dict[int, dict[int, Source]] = {}
    for slot, records in logs.items():
        blocks = settled[slot] = {}
        for record in sorted(records, key=lambda one: one.sequence):
            if record.sequence in whole:
                blocks.update(_sources(record))
    return settled


def _sources(record: Record) -> Iterator[tuple[int, Source]]:
    for piece in record.pieces:
        if piece.bare:
            yield from ((offset, Source(crc, None)) for offset, crc in piece.blocks())
    for position, piece in record.payload():
        for offset, crc in piece.blocks():
            yield offset, Source(crc, position + offset - piece.offset)
