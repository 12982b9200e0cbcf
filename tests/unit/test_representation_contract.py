"""One contract for every representation, with every option: the same bytes as a model.

The model is a byte array and a set of bad pages. Commands go through `Namespace`, as in the daemon,
so the contract holds the namespace to its word too. Holds stay out over later commands, as slow
clients' do, and are given back when a command waits for them. In the middle of a history the
namespace may get another size and another representation.

`PMBLK_EXAMPLES` sets how many histories each kind goes through, for a longer hunt.
"""

import itertools
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pmblk import Command, Namespace, pages, representations
from pmblk.errors import PmblkError
from pmblk.media import create, open_media
from pmblk.nvme.command import (
    ALLOCATE,
    DATASET_MANAGEMENT,
    FLUSH,
    FUA,
    GET_LBA_STATUS,
    KEEP,
    PREALLOCATE,
    READ,
    WRITE,
    WRITE_ZEROES,
)
from pmblk.nvme.data_pointer import prp_entries, prp_list_pages
from pmblk.nvme.status import Status
from pmblk.pages import PAGE_BYTES
from pmblk.representations import Representation, make, needs_reserve, parse_options
from pmblk.switching import resize, switch
from tests.unit.conftest import content

EXAMPLES = int(os.environ.get("PMBLK_EXAMPLES", "40"))
SIZE = 3 << 20  # more than the smallest arena: eviction happens
SIZE_ODD = SIZE + 512  # and an end that is no page boundary
SIZE_MAX = 5 << 20  # more than is cleared in one go
EVERYTHING = (0, SIZE_MAX)

Options = dict[str, Any]
Buffer = bytes | bytearray
KINDS: list[tuple[str, Options]] = [
    ("page-cache", {}),
    ("page-cache", {"arena": "1MiB"}),
    *(
        ("struct-page", {"init": init, "memmap": memmap, "compound": compound})
        for init, memmap, compound in itertools.product(
            ("lazy", "eager"), ("dram", "device"), ("none", "2MiB")
        )
    ),
    ("transient-page", {}),
    ("transient-page", {"pool_pages": 256}),
    ("pfn", {"locking": "range"}),
    ("pfn", {"locking": "none"}),
    ("extent", {"fragments": 1}),
    ("extent", {"fragments": 7}),
    ("extent", {"fragments": 100}),
]


def test_every_kind_is_under_contract() -> None:
    assert {kind for kind, _ in KINDS} == set(representations.KINDS)


ranges = st.one_of(
    st.tuples(
        st.one_of(
            st.integers(0, SIZE_ODD - 1), st.integers(0, SIZE // 4096).map(lambda n: n * 4096)
        ),
        st.one_of(st.integers(1, 20_000), st.integers(1, 1 << 20), st.just(4096)),
    ),
    st.just(EVERYTHING),
)
nowhere = st.just((0, 0))
steps = st.lists(
    st.one_of(
        st.tuples(st.just(WRITE), ranges, st.sampled_from([0, FUA])),
        st.tuples(st.just(READ), ranges, st.just(0)),
        st.tuples(st.just("hold"), ranges, st.just(0)),
        st.tuples(st.just("release"), nowhere, st.just(0)),
        st.tuples(st.just("poison"), ranges, st.just(0)),
        st.tuples(
            st.just(WRITE_ZEROES), ranges, st.sampled_from([0, FUA, ALLOCATE, KEEP, KEEP | FUA])
        ),
        st.tuples(st.just(PREALLOCATE), ranges, st.sampled_from([0, FUA])),
        st.tuples(st.just(DATASET_MANAGEMENT), ranges, st.just(0)),
        st.tuples(st.just(FLUSH), nowhere, st.just(0)),
        st.tuples(st.just(GET_LBA_STATUS), ranges, st.just(0)),
        st.tuples(
            st.just("resize"),
            st.integers(1, SIZE_MAX // 512).map(lambda blocks: (0, blocks * 512)),
            st.just(0),
        ),
        st.tuples(st.just("switch"), nowhere, st.integers(0, len(KINDS) - 1)),
    ),
    max_size=25,
)


class Checker:
    """Runs commands on a namespace and on the model, and compares."""

    def __init__(self, namespace: Namespace) -> None:
        self.namespace = namespace
        self.model = bytearray(namespace.size)
        self.bad: set[int] = set()  # pages; what they hold is anybody's guess
        self.held: list[tuple[Command, list[bytes]]] = []  # with every version since the hold
        self.number = 0
        self.prp_entries = self.prp_list_pages = 0

    @property
    def representation(self) -> Representation:
        return self.namespace.representation

    @property
    def protects(self) -> bool:
        """Whether the kind keeps the memory of a lease from being given back."""
        options = self.representation.options
        return self.representation.kind != "page-cache" and (
            getattr(options, "locking", "range") == "range"
        )

    # ---- running

    async def finish(self, work: Callable[[], Awaitable[object]]) -> bool:
        """Run to the end what may wait for leases: they are given back then, as clients do.

        Whether they had to be.
        """
        released = False
        outcome: list[Exception | None] = []

        async def run() -> None:
            try:
                await work()
            except Exception as error:
                outcome.append(error)
            else:
                outcome.append(None)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            while not outcome:
                await trio.testing.wait_all_tasks_blocked()
                if self.namespace.starved and not outcome:
                    assert self.held, "it waits for a release, and nothing is held"
                    self.release_all()
                    released = True
        if outcome[0] is not None:
            raise outcome[0]
        return released

    async def run(self, command: Command) -> bool:
        """Whether the command had to wait for what is held."""
        waited = False
        waiting = self.namespace.execute((command,))
        if waiting:
            waited = await self.finish(lambda: self.namespace.complete(waiting))
        if command.opcode in (READ, WRITE) and not command.status:
            entries = prp_entries(command.offset % PAGE_BYTES, command.length)
            self.prp_entries += entries
            self.prp_list_pages += prp_list_pages(entries)
        return waited

    async def step(self, kind: int | str, offset: int, length: int, number: int) -> None:
        offset = min(offset, self.namespace.size)
        if kind == "resize":
            await self.resize(length)
            return
        length = min(length, self.namespace.size - offset)
        if kind == WRITE:
            await self.write(offset, length, number)
        elif kind in (WRITE_ZEROES, DATASET_MANAGEMENT):
            await self.clear(Command(int(kind), number, offset, length))
        elif kind == PREALLOCATE:
            await self.preallocate(Command(PREALLOCATE, number, offset, length))
        elif kind == FLUSH:
            await self.flush()
        elif kind == GET_LBA_STATUS:
            status = Command(GET_LBA_STATUS, 0, offset, length)
            await self.run(status)
            self.check_extents(status)
        elif kind == "release":
            self.release_all()
        elif kind == "poison":
            self.poison(offset, length)
        elif kind == "switch":
            await self.switch(*KINDS[number])
        else:
            await self.read(offset, length, keep=kind == "hold")

    # ---- one step each

    async def read(self, offset: int, length: int, *, keep: bool = False) -> None:
        command = Command(READ, 0, offset, length)
        await self.run(command)
        if self.bad.intersection(touched(offset, length)):
            assert command.status == Status.UNRECOVERED_READ_ERROR
            assert not command.leases
            return
        assert command.status == 0, command
        assert content(command) == self.model[offset : offset + length]
        if not keep or not command.leases:
            self.namespace.release((command,))
            return
        self.held.append((command, [bytes(self.model[offset : offset + length])]))
        counters = self.representation.counters()
        assert counters.peak_pins >= counters.pins - counters.unpins
        if self.protects:
            assert self.representation.busy(offset, length)

    async def write(self, offset: int, length: int, flags: int) -> None:
        self.number += 1
        payload = (self.number.to_bytes(2, "big") * (length // 2 + 1))[:length]
        command = Command(WRITE, flags, offset, length, payload=memoryview(payload))
        limit = self.representation.io_bytes_max
        await self.run(command)
        if self.half_bad(offset, length):
            assert command.status == Status.WRITE_FAULT
            in_pieces = limit is not None and length > limit
            await self.settle(offset, payload if in_pieces else None)
            return
        assert command.status == 0, command
        self.changed(offset, payload)
        if flags & FUA:
            assert self.on_media()[offset : offset + length] == payload

    async def clear(self, command: Command) -> None:
        """A discard waits for leases on pages that it gives back, and for nothing else."""
        offset, length = command.offset, command.length
        punching = self.namespace.media.punches and not command.flags & (ALLOCATE | KEEP)
        allocated = self.namespace.media.allocated_bytes()
        in_the_way = self.protects and punching and self.holds_whole_pages(offset, length)
        protects = self.protects
        waited = await self.run(command)
        if command.opcode == DATASET_MANAGEMENT and not punching:
            assert command.status == 0
        elif self.half_bad(offset, length):
            assert command.status == Status.WRITE_FAULT
            await self.settle(offset, bytes(length))
        else:
            assert command.status == 0, command
            self.changed(offset, bytes(length))
            assert waited or not in_the_way, "pages were taken away from a lease"
        assert not waited or (protects and punching), "there was nothing to wait for"
        if command.flags & KEEP and not self.namespace.media.reserve_user:  # a table may grow
            assert self.namespace.media.allocated_bytes() == allocated

    async def preallocate(self, command: Command) -> None:
        """What the range holds it keeps, what is bad stays bad, and nobody is waited for."""
        assert not await self.run(command)
        assert command.status == 0
        if command.length:
            assert self.namespace.media.allocation.covers(command.offset, command.length)

    async def flush(self) -> None:
        command = Command(FLUSH, 0, 0, 0)
        await self.run(command)
        assert command.status == 0
        assert not self.representation.dirty()
        self.check_media()

    def poison(self, offset: int, length: int) -> None:
        if not length:
            return
        self.namespace.poison(offset, length)
        self.bad.update(touched(offset, length))

    async def resize(self, size: int) -> None:
        if self.namespace.media.reserve_bytes:
            with pytest.raises(PmblkError, match="reserve at its end"):
                await resize(self.namespace, size)
            return
        before = self.representation
        self.check_when_closed(before)
        await self.finish(lambda: resize(self.namespace, size))
        assert self.representation is not before
        assert self.namespace.size == size
        del self.model[size:]
        self.model += bytes(size - len(self.model))
        self.bad.intersection_update(touched(0, size))
        self.check_media()

    async def switch(self, kind: str, options: Options) -> None:
        before = self.representation
        parsed = parse_options(kind, options)
        media = self.namespace.media
        if needs_reserve(parsed) and (media.reserve_user or not media.reserve_bytes):
            with pytest.raises(PmblkError, match="reserve"):
                await switch(self.namespace, kind, parsed)
            assert self.representation is before
            return
        self.check_when_closed(before)
        await self.finish(lambda: switch(self.namespace, kind, parsed))
        assert (self.representation.kind, self.representation.options) == (kind, parsed)
        self.check_media()

    # ---- the model

    def changed(self, offset: int, payload: bytes) -> None:
        """The range holds that now; a held range may show the old bytes or the new, by the byte."""
        if not payload:
            return
        self.model[offset : offset + len(payload)] = payload
        self.bad.difference_update(pages.whole(offset, len(payload), limit=self.namespace.size))
        for command, versions in self.held:
            versions.append(bytes(self.model[command.offset : command.offset + command.length]))

    async def settle(self, offset: int, payload: bytes | None) -> None:
        """After a write that failed: old bytes everywhere, or new ones where it says `payload`."""
        still_bad = set(self.representation.poisoned())
        if payload is None:
            assert still_bad == self.bad
            return
        healed = pages.whole(offset, len(payload), limit=self.namespace.size)
        assert still_bad <= self.bad <= still_bad.union(healed)
        found = bytearray(payload)
        for position, piece in pages.pieces(offset, len(payload)):
            at = position - offset
            if position // PAGE_BYTES in still_bad:
                found[at : at + piece] = self.model[position : position + piece]
                continue
            command = Command(READ, 0, position, piece)
            await self.run(command)
            assert command.status == 0
            found[at : at + piece] = content(command)
            self.namespace.release((command,))
            if position // PAGE_BYTES in self.bad:
                assert found[at : at + piece] == payload[at : at + piece]
            else:
                assert every_byte_in(
                    found[at : at + piece],
                    [self.model[position : position + piece], payload[at : at + piece]],
                )
        self.changed(offset, bytes(found))
        self.bad = still_bad

    def half_bad(self, offset: int, length: int) -> bool:
        if not length:
            return False
        written = pages.whole(offset, length, limit=self.namespace.size)
        return any(page in self.bad and page not in written for page in touched(offset, length))

    def holds_whole_pages(self, offset: int, length: int) -> bool:
        """Whether something is held of the pages that the range covers whole."""
        gone = pages.whole(offset, length, limit=self.namespace.size) if length else range(0)
        for command, _ in self.held:
            position = command.offset
            for segment in command.segments or ():
                segment_bytes = segment.length if hasattr(segment, "length") else len(segment)
                if isinstance(segment, memoryview) and any(
                    page in gone for page in touched(position, segment_bytes)
                ):
                    return True
                position += segment_bytes
        return False

    def release_all(self) -> None:
        for command, versions in self.held:
            assert every_byte_in(content(command), versions), "held memory was put to another use"
        self.namespace.release(command for command, _ in self.held)
        self.held.clear()

    # ---- checking

    def on_media(self) -> bytes:
        return Path(self.namespace.media.path).read_bytes()[: self.namespace.size]

    def check_media(self) -> None:
        """After a flush, the media hold everything: what power would leave on real pmem."""
        found, expected = bytearray(self.on_media()), bytearray(self.model)
        for page in self.bad:
            for side in (found, expected):
                side[page * PAGE_BYTES : (page + 1) * PAGE_BYTES] = b""
                side[page * PAGE_BYTES : page * PAGE_BYTES] = bytes(
                    min(PAGE_BYTES, self.namespace.size - page * PAGE_BYTES)
                )
        assert found == expected

    def check_extents(self, command: Command) -> None:
        assert command.extents is not None
        position = command.offset
        for extent in command.extents:
            assert extent.offset == position
            position += extent.length
            if extent.hole:
                assert not any(self.model[extent.offset : position]), "a hole that is not zero"
                assert not self.bad.intersection(touched(extent.offset, extent.length))
        assert position == command.offset + command.length

    def check_bad(self) -> None:
        assert self.representation.poisoned() == sorted(self.bad)
        assert self.representation.has_poison == bool(self.bad)

    def check_when_closed(self, representation: Representation) -> None:
        close = representation.close

        def check_and_close() -> None:
            self.check_at_rest(representation)
            close()

        representation.close = check_and_close  # type: ignore[method-assign]

    def check_at_rest(self, representation: Representation) -> None:
        """Nothing is held: what was taken has been given back, and the sums are right."""
        counters = representation.counters()
        assert representation.leases == 0
        assert counters.pins == counters.unpins <= counters.descriptors_built
        assert counters.peak_pins <= counters.pins
        if self.namespace.size == representation.media.size:
            assert not representation.busy(0, self.namespace.size)
        if representation.kind != "page-cache":
            assert counters.bytes_copied == 0

    async def check_all(self) -> None:
        self.release_all()
        self.check_at_rest(self.representation)
        if not self.bad:
            await self.read(0, self.namespace.size)
        else:
            for position, piece in pages.pieces(0, self.namespace.size):
                await self.read(position, piece)
        await self.flush()
        self.check_at_rest(self.representation)
        counters = self.namespace.counters
        assert counters.prp_entries == self.prp_entries
        assert counters.prp_list_pages == self.prp_list_pages
        found = self.representation.counters()
        assert found.poisoned_bytes == len(self.bad) * PAGE_BYTES
        assert found.dirty_bytes == 0


def touched(offset: int, length: int) -> range:
    if not length:
        return range(0)
    first, count = pages.span(offset, length)
    return range(first, first + count)


def every_byte_in(found: Buffer, versions: Sequence[Buffer]) -> bool:
    """Whether each byte is that of one of the versions."""
    array = np.frombuffer(found, np.uint8)
    return bool(np.any([array == np.frombuffer(v, np.uint8) for v in versions], axis=0).all())


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=str)
@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.too_slow])
@given(steps, st.sampled_from([SIZE, SIZE_ODD]), st.booleans(), st.booleans())
def test_any_mix_of_commands_reads_as_the_model(
    kind: str, options: Options, history: list[Any], size: int, punches: bool, reserve: bool
) -> None:
    async def run() -> None:
        checker = Checker(namespace)
        for name, (offset, length), number in history:
            await checker.step(name, offset, length, number)
            checker.check_bad()
        await checker.check_all()
        namespace.representation.close()

    parsed = parse_options(kind, options)
    reserve = reserve or needs_reserve(parsed)
    path = Path(f"/dev/shm/pmblk-contract-{os.getpid()}")
    create(path, SIZE if reserve else size)
    media = open_media(path, with_reserve=reserve)
    try:
        media.punches = punches
        namespace = Namespace("ns", media, make(kind, media, parsed), lba_bytes=512)
        trio.run(run)
    finally:
        media.close()
        path.unlink()
