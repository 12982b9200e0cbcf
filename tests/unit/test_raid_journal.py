"""The journal's records as bytes, and what is decided about the logs that are found."""

import random
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmblk.raid.journal import (
    BLOCK_BYTES,
    Mark,
    Piece,
    Record,
    Source,
    Write,
    decide,
    decode,
    decode_mark,
    encode_into,
    encode_mark,
    header_bytes_of,
    mark_offset,
    record_bytes_for,
    settle,
)

NONCE = b"n" * 16
OTHER = b"o" * 16

writes = st.lists(
    st.tuples(st.integers(0, 1 << 40), st.integers(1, 40), st.booleans()), min_size=1, max_size=90
)


def encoded(parts: list[Write], *, sequence: int = 7, slot: int = 3) -> bytes:
    view = memoryview(bytearray(record_bytes_for(parts)))
    encode_into(view, parts, sequence=sequence, nonce=NONCE, slot=slot, participants={0, slot, 63})
    return bytes(view)


def decoded(content: bytes, position: int = 0) -> Record | None:
    header_bytes = header_bytes_of(content[:BLOCK_BYTES], NONCE)
    return None if header_bytes is None else decode(content[:header_bytes], position)


@given(writes)
def test_a_record_says_what_is_going_to_be_written(shapes: list[tuple[int, int, bool]]) -> None:
    parts = [
        Write(number * BLOCK_BYTES, memoryview(random.randbytes(count * BLOCK_BYTES)), bare)
        for number, count, bare in shapes
    ]
    content = encoded(parts)
    record = decoded(content, position=8192)
    assert record is not None
    assert (record.sequence, record.slot) == (7, 3)
    assert record.participants == {0, 3, 63}
    assert record.length == len(content) == record_bytes_for(parts)
    assert [(one.offset, one.length, one.bare) for one in record.pieces] == [
        (offset, len(view), bare) for offset, view, bare in parts
    ]
    for one, part in zip(record.pieces, parts, strict=True):
        assert one.fits(bytes(part.content))
    found = [content[at - 8192 : at - 8192 + piece.length] for at, piece in record.payload()]
    assert found == [bytes(view) for _, view, bare in parts if not bare]


def a_record() -> bytes:
    return encoded([Write(4096, memoryview(random.Random(1).randbytes(8192)), False)])


def test_a_header_that_is_damaged_anywhere_is_no_record() -> None:
    content = a_record()
    for place in range(0, BLOCK_BYTES, 37):
        damaged = bytearray(content)
        damaged[place] ^= 1
        assert decoded(bytes(damaged)) is None, place


def test_a_piece_that_is_damaged_does_not_fit() -> None:
    content = a_record()
    record = decoded(content)
    assert record is not None
    ((position, piece),) = record.payload()
    assert piece.fits(content[position : position + piece.length])
    for place in range(position, position + piece.length, 511):
        damaged = bytearray(content)
        damaged[place] ^= 1
        assert not piece.fits(bytes(damaged[position : position + piece.length]))


def test_a_record_of_another_session_is_none() -> None:
    assert header_bytes_of(a_record()[:BLOCK_BYTES], OTHER) is None
    assert header_bytes_of(bytes(BLOCK_BYTES), NONCE) is None


def test_a_length_that_cannot_be_is_none() -> None:
    for length in (0, 100):
        content = bytearray(a_record())
        content[12:16] = struct.pack("<I", length)
        assert decoded(bytes(content)) is None


def test_marks_take_turns_and_damage_is_known() -> None:
    block = encode_mark(Mark(5, NONCE))
    assert decode_mark(block) == Mark(5, NONCE)
    assert decode_mark(bytes(BLOCK_BYTES)) is None
    for place in range(BLOCK_BYTES):
        assert decode_mark(block[:place] + bytes([block[place] ^ 1]) + block[place + 1 :]) is None
    assert [mark_offset(session) for session in (4, 5, 6)] == [0, 4096, 0]


# ---- decisions


def one(sequence: int, slot: int, participants: set[int], *pieces: Piece) -> Record:
    return Record(0, 4096, sequence, slot, frozenset(participants), pieces)


def test_a_transaction_is_whole_when_all_who_are_there_have_it() -> None:
    logs = {
        0: [one(1, 0, {0, 1}), one(2, 0, {0, 2})],
        1: [one(1, 1, {0, 1}), one(3, 1, {1})],
    }
    decision = decide(logs)  # 2 is missing
    assert decision.whole == (1, 2, 3)
    assert not decision.ignored
    assert not decision.damaged


def test_the_last_one_is_ignored_when_somebody_lacks_it() -> None:
    logs = {0: [one(1, 0, {0, 1}), one(2, 0, {0, 1})], 1: [one(1, 1, {0, 1})]}
    decision = decide(logs)
    assert (decision.whole, decision.ignored, decision.damaged) == ((1,), (2,), frozenset())


def test_who_lacks_an_earlier_one_has_a_damaged_journal() -> None:
    logs = {0: [one(1, 0, {0, 1}), one(2, 0, {0})], 1: []}
    decision = decide(logs)
    assert decision.damaged == {1}
    del logs[1]
    assert decide(logs).whole == (1, 2)


def test_nothing_is_decided_of_nothing() -> None:
    assert decide({0: [], 1: []}).whole == ()
    assert decide({}).whole == ()


def piece(offset: int, *crcs: int, bare: bool = False) -> Piece:
    return Piece(offset, len(crcs) * BLOCK_BYTES, bare, crcs)


def test_the_newest_whole_word_on_a_block_counts() -> None:
    def record(position: int, sequence: int, *pieces: Piece) -> Record:
        return Record(position, 4096, sequence, 0, frozenset({0}), pieces)

    log = [
        record(0, 1, piece(0, 11, 12, 13)),
        record(16384, 2, piece(4096, 22, bare=True)),
        record(20480, 3, piece(0, 31)),
        record(28672, 4, piece(8192, 43)),
    ]
    assert settle({0: log}, {1, 2, 3}) == {
        0: {0: Source(31, 24576), 4096: Source(22, None), 8192: Source(13, 12288)}
    }


@pytest.mark.parametrize("seed", range(5))
def test_settled_is_what_replaying_in_order_leaves(seed: int) -> None:
    chosen = random.Random(seed)
    log, position = [], 0
    for sequence in range(1, 30):
        first = chosen.randrange(8)
        crcs = [sequence * 100 + i for i in range(chosen.randint(1, 3))]
        one = piece(first * BLOCK_BYTES, *crcs, bare=chosen.random() < 0.3)
        log.append(Record(position, 4096, sequence, 0, frozenset({0}), (one,)))
        position += log[-1].length
    model: dict[int, int] = {}
    for record in log:
        for one in record.pieces:
            model.update(one.blocks())
    chosen.shuffle(log)
    found = settle({0: log}, set(range(1, 30)))[0]
    assert {offset: source.crc for offset, source in found.items()} == model
