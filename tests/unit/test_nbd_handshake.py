import struct
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pmblkd.nbd.handshake import OPTIONS_MAX, Export, Handshake, State
from tests.unit import nbd_client as client
from tests.unit.nbd_client import ACK, ERR_INVALID, ERR_TOO_BIG, ERR_UNKNOWN, ERR_UNSUP

EXPORTS = {
    "a": Export("a", "first", 1 << 20, read_only=False, preferred_block=4096),
    "ro": Export("ro", "second", 1 << 30, read_only=True, preferred_block=512),
}
EXPORT_NAME, ABORT, LIST, STARTTLS, INFO, GO, STRUCTURED, LIST_META, SET_META, EXTENDED = (
    *(1, 2, 3, 5, 6, 7, 8, 9, 10, 11),
)


def shake(*messages: bytes, flags: int = 3) -> tuple[Handshake, list[client.OptionReply]]:
    handshake = Handshake(EXPORTS, default="a")
    out = handshake.receive(client.flags(flags) + b"".join(messages))
    return handshake, client.option_replies(out)


def kinds(replies: Sequence[client.OptionReply]) -> list[int]:
    return [reply.kind for reply in replies]


def test_the_greeting_offers_fixed_newstyle_and_no_zeroes() -> None:
    greeting = Handshake(EXPORTS, default="a").greeting()
    assert greeting == b"NBDMAGICIHAVEOPT\0\3"


def test_go_tells_size_and_flags_and_starts_the_transmission() -> None:
    handshake, replies = shake(client.info(GO, "a"))
    assert kinds(replies) == [client.INFO, ACK]
    info_type, size, flags = struct.unpack(">HQH", replies[0].data)
    assert (info_type, size) == (0, 1 << 20)
    assert flags == 0b1101_0110_1101, "all but read-only, rotational, DF and resize"
    assert handshake.state is State.READY
    assert handshake.export is EXPORTS["a"]


def test_df_is_offered_with_structured_replies_only() -> None:
    handshake, replies = shake(client.option(STRUCTURED), client.info(GO, "a"))
    assert struct.unpack(">HQH", replies[1].data)[2] & 1 << 7
    assert handshake.structured


def test_a_read_only_export_offers_nothing_that_writes() -> None:
    _, replies = shake(client.info(GO, "ro"))
    flags = struct.unpack(">HQH", replies[0].data)[2]
    assert flags & 0b10
    assert not flags & (1 << 5 | 1 << 6 | 1 << 11), "TRIM, WRITE_ZEROES, FAST_ZERO"


def test_the_empty_name_is_the_default_export() -> None:
    handshake, _ = shake(client.info(GO, ""))
    assert handshake.export is EXPORTS["a"]


def test_info_and_go_answer_alike_and_info_goes_on_haggling() -> None:
    wanted = (1, 2, 3, 77)
    handshake, told = shake(client.info(INFO, "ro", *wanted))
    _, went = shake(client.info(GO, "ro", *wanted))
    assert [reply.data for reply in told] == [reply.data for reply in went]
    assert handshake.state is State.HAGGLING
    by_type = {reply.data[:2]: reply.data[2:] for reply in told if reply.kind == client.INFO}
    assert by_type[b"\0\1"] == b"ro"
    assert by_type[b"\0\2"] == b"second"
    assert struct.unpack(">III", by_type[b"\0\3"]) == (1, 512, 32 << 20)
    assert len(by_type) == 4, "an unknown information type is ignored"


@pytest.mark.parametrize("number", [INFO, GO])
def test_an_unknown_export_is_an_error_and_haggling_goes_on(number: int) -> None:
    handshake, replies = shake(client.info(number, "nope"), client.option(LIST))
    assert replies[0].kind == ERR_UNKNOWN
    assert kinds(replies[1:]) == [client.SERVER, client.SERVER, ACK]
    assert handshake.state is State.HAGGLING


def test_list_names_and_describes_every_export() -> None:
    _, replies = shake(client.option(LIST))
    assert replies[0].data == client.string("a") + b"first"
    assert replies[1].data == client.string("ro") + b"second"


@pytest.mark.parametrize("no_zeroes", [True, False])
def test_export_name_is_answered_with_size_flags_and_padding(no_zeroes: bool) -> None:
    handshake = Handshake(EXPORTS, default="a")
    flags = 3 if no_zeroes else 1
    out = handshake.receive(client.flags(flags) + client.option(EXPORT_NAME, b"ro"))
    assert len(out) == (10 if no_zeroes else 134)
    assert struct.unpack_from(">Q", out)[0] == 1 << 30
    assert handshake.state is State.READY


def test_export_name_of_nothing_closes() -> None:
    handshake, replies = shake(client.option(EXPORT_NAME, b"nope"))
    assert (handshake.state, replies) == (State.CLOSED, [])


def test_export_name_that_is_no_text_closes() -> None:
    handshake, replies = shake(client.option(EXPORT_NAME, b"\xff\xfe"))
    assert (handshake.state, replies) == (State.CLOSED, [])


def test_abort_is_acknowledged_and_closes() -> None:
    handshake, replies = shake(client.option(ABORT, b"bye"))
    assert (handshake.state, kinds(replies)) == (State.CLOSED, [ACK])


@pytest.mark.parametrize("number", [STARTTLS, EXTENDED, 4, 0, 2**32 - 1])
def test_an_unknown_option_is_unsupported_and_the_stream_stays_in_sync(number: int) -> None:
    handshake, replies = shake(client.option(number, b"xyz" * 50), client.info(GO, "a"))
    assert kinds(replies) == [ERR_UNSUP, client.INFO, ACK]
    assert handshake.state is State.READY


@pytest.mark.parametrize("number", [LIST, STRUCTURED])
def test_options_without_data_refuse_data(number: int) -> None:
    handshake, replies = shake(client.option(number, b"x"))
    assert kinds(replies) == [ERR_INVALID]
    assert not handshake.structured


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0",
        struct.pack(">I", 100) + b"a\0\0",
        client.string("a") + b"\0",
        client.string("a") + b"\0\2\0\1",
        client.string("a") + b"\0\0extra",
        client.string("a\0b") + b"\0\0",
        struct.pack(">I", 1) + b"\xff\0\0",
        struct.pack(">I", 5000) + b"n" * 5000 + b"\0\0",
    ],
)
def test_malformed_info_is_invalid_and_haggling_goes_on(data: bytes) -> None:
    handshake, replies = shake(client.option(INFO, data), client.info(GO, "a"))
    assert replies[0].kind == ERR_INVALID
    assert handshake.state is State.READY


def test_meta_contexts_need_structured_replies() -> None:
    _, replies = shake(client.meta(LIST_META, "a"), client.meta(SET_META, "a", "base:allocation"))
    assert kinds(replies) == [ERR_INVALID, ERR_INVALID]


@pytest.mark.parametrize(
    ("queries", "found"),
    [
        ((), 1),
        (("base:",), 1),
        (("base:allocation",), 1),
        (("x-other:thing",), 0),
        (("x-other:thing", "base:allocation"), 1),
        (("base:nothing",), 0),
    ],
)
def test_listing_meta_contexts(queries: tuple[str, ...], found: int) -> None:
    _, replies = shake(client.option(STRUCTURED), client.meta(LIST_META, "a", *queries))
    assert kinds(replies[1:]) == [client.META_CONTEXT] * found + [ACK]


@pytest.mark.parametrize(
    ("queries", "selected"),
    [((), False), (("base:",), False), (("base:allocation",), True), (("qemu:x",), False)],
)
def test_setting_meta_contexts(queries: tuple[str, ...], selected: bool) -> None:
    handshake, replies = shake(
        client.option(STRUCTURED), client.meta(SET_META, "a", *queries), client.info(GO, "a")
    )
    assert handshake.allocation_context is selected
    assert (client.META_CONTEXT in kinds(replies)) is selected


def test_a_context_counts_for_its_own_export_only() -> None:
    handshake, _ = shake(
        client.option(STRUCTURED),
        client.meta(SET_META, "ro", "base:allocation"),
        client.info(GO, "a"),
    )
    assert not handshake.allocation_context


def test_a_context_for_the_default_export_counts_for_its_name() -> None:
    handshake, _ = shake(
        client.option(STRUCTURED),
        client.meta(SET_META, "", "base:allocation"),
        client.info(GO, "a"),
    )
    assert handshake.allocation_context


@pytest.mark.parametrize(
    "second", [client.meta(SET_META, "nope", "base:allocation"), client.option(SET_META, b"\0")]
)
def test_a_set_that_fails_clears_the_selection(second: bytes) -> None:
    handshake, _ = shake(
        client.option(STRUCTURED),
        client.meta(SET_META, "a", "base:allocation"),
        second,
        client.info(GO, "a"),
    )
    assert not handshake.allocation_context


def test_queries_that_run_over_the_end_are_invalid() -> None:
    data = client.string("a") + struct.pack(">I", 2**32 - 1) + client.string("base:")
    _, replies = shake(client.option(STRUCTURED), client.option(LIST_META, data))
    assert replies[1].kind == ERR_INVALID


@pytest.mark.parametrize("flags", [4, 0x80000001, 0xFFFFFFFF])
def test_flags_that_were_not_offered_close(flags: int) -> None:
    handshake, _ = shake(flags=flags)
    assert handshake.state is State.CLOSED


def test_an_option_without_its_magic_closes() -> None:
    handshake, replies = shake(b"IHAVEOPS" + bytes(8))
    assert (handshake.state, replies) == (State.CLOSED, [])


def test_an_endless_option_is_too_big_and_closes() -> None:
    handshake, replies = shake(b"IHAVEOPT" + struct.pack(">II", LIST, 2**32 - 1))
    assert (handshake.state, kinds(replies)) == (State.CLOSED, [ERR_TOO_BIG])


def test_endless_haggling_closes() -> None:
    handshake, replies = shake(*[client.option(STRUCTURED)] * (OPTIONS_MAX + 1))
    assert handshake.state is State.CLOSED
    assert kinds(replies) == [ACK] * OPTIONS_MAX + [ERR_TOO_BIG]


def test_what_follows_go_is_left_for_the_transmission() -> None:
    handshake, _ = shake(client.info(GO, "a"), b"first request")
    assert handshake.leftover == b"first request"


messages = st.lists(
    st.sampled_from(
        [
            client.option(LIST),
            client.option(STRUCTURED),
            client.option(99, b"junk"),
            client.info(INFO, "ro", 1, 2, 3),
            client.info(INFO, "nope"),
            client.meta(SET_META, "a", "base:allocation"),
            client.meta(LIST_META, "a"),
            client.info(GO, "a", 3),
            client.option(EXPORT_NAME, b"a"),
            client.option(ABORT),
            b"IHAVEOPS" + bytes(8),
        ]
    ),
    max_size=8,
)


@given(messages, st.lists(st.integers(1, 40), min_size=1, max_size=30))
def test_any_split_of_the_stream_is_answered_alike(parts: list[bytes], cuts: list[int]) -> None:
    stream = client.flags() + b"".join(parts)
    whole = Handshake(EXPORTS, default="a")
    expected = whole.receive(stream)
    split = Handshake(EXPORTS, default="a")
    out, position, turn = b"", 0, 0
    while position < len(stream):
        cut = cuts[turn % len(cuts)]
        turn += 1
        out += split.receive(stream[position : position + cut])
        position += cut
        if split.state in (State.READY, State.CLOSED):
            break
    leftover = split.leftover + stream[position:] if split.state is State.READY else b""
    assert out == expected
    assert split.state is whole.state
    assert leftover == whole.leftover


@settings(max_examples=300)
@given(st.binary(max_size=400), st.booleans())
def test_no_bytes_break_the_handshake(junk: bytes, after_magic: bool) -> None:
    handshake = Handshake(EXPORTS, default="a")
    handshake.receive(client.flags())
    handshake.receive(b"IHAVEOPT" + junk if after_magic else junk)
    assert handshake.state in State
