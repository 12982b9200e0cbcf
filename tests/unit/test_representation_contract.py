"""One contract for every representation, with every option: the same bytes as a model.

The model is a byte array. Commands go through `Namespace`, as in the daemon, so the contract holds
the namespace to its word too; holds stay out over later commands, as slow clients' do.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from pmblk import Command, Namespace, representations
from pmblk.media import create, open_media
from pmblk.nvme.command import (
    ALLOCATE,
    DATASET_MANAGEMENT,
    FLUSH,
    FUA,
    GET_LBA_STATUS,
    READ,
    WRITE,
    WRITE_ZEROES,
)
from pmblk.representations import make, parse_options
from tests.unit.conftest import content

SIZE = 3 << 20  # more than the smallest arena: eviction happens
SIZE_ODD = SIZE + 512  # and an end that is no page boundary

KINDS: list[tuple[str, dict[str, Any]]] = [
    ("page-cache", {}),
    ("page-cache", {"arena": "1MiB"}),
    ("struct-page", {}),
    ("struct-page", {"init": "eager"}),
    ("struct-page", {"compound": "2MiB"}),
    ("transient-page", {}),
    ("transient-page", {"pool_pages": 256}),
    ("pfn", {}),
    ("pfn", {"locking": "none"}),
    ("extent", {}),
    ("extent", {"fragments": 100}),
]


def test_every_kind_is_under_contract() -> None:
    assert {kind for kind, _ in KINDS} == set(representations.KINDS)


ranges = st.tuples(
    st.one_of(st.integers(0, SIZE_ODD - 1), st.integers(0, SIZE // 4096).map(lambda n: n * 4096)),
    st.one_of(st.integers(1, 20_000), st.integers(1, 1 << 20), st.just(4096)),
)
steps = st.lists(
    st.one_of(
        st.tuples(st.just(WRITE), ranges, st.sampled_from([0, FUA])),
        st.tuples(st.just(READ), ranges, st.just(0)),
        st.tuples(st.just("hold"), ranges, st.just(0)),
        st.tuples(st.just("release"), ranges, st.just(0)),
        st.tuples(st.just(WRITE_ZEROES), ranges, st.sampled_from([0, FUA, ALLOCATE])),
        st.tuples(st.just(DATASET_MANAGEMENT), ranges, st.just(0)),
        st.tuples(st.just(FLUSH), st.just((0, 0)), st.just(0)),
        st.tuples(st.just(GET_LBA_STATUS), ranges, st.just(0)),
    ),
    max_size=25,
)


class Checker:
    """Runs commands on a namespace and on the model, and compares."""

    def __init__(self, namespace: Namespace) -> None:
        self.namespace = namespace
        self.model = bytearray(namespace.size)
        self.held: list[tuple[Command, list[bytes]]] = []  # with every version since the hold
        self.number = 0

    async def run(self, command: Command) -> Command:
        waiting = self.namespace.execute((command,))
        if waiting:
            with trio.move_on_after(0.01) as scope:
                await self.namespace.complete(waiting)
            if scope.cancelled_caught:  # every frame is held: give some back, as clients do
                self.release_all()
                await self.namespace.complete(waiting)
        assert command.status == 0, command
        return command

    def changed(self) -> None:
        """The model has changed: a held range may show the old bytes or the new, by the byte."""
        for command, versions in self.held:
            versions.append(bytes(self.model[command.offset : command.offset + command.length]))

    async def step(self, kind: int | str, offset: int, length: int, flags: int) -> None:
        offset = min(offset, self.namespace.size)
        length = min(length, self.namespace.size - offset)
        span = slice(offset, offset + length)
        if kind == WRITE:
            self.number += 1
            payload = self.number.to_bytes(2, "big") * (length // 2 + 1)
            payload = payload[:length]
            await self.run(Command(WRITE, flags, offset, length, payload=memoryview(payload)))
            self.model[span] = payload
            self.changed()
        elif kind in (WRITE_ZEROES, DATASET_MANAGEMENT):
            await self.run(Command(int(kind), flags, offset, length))
            if kind == WRITE_ZEROES or self.namespace.media.punches:
                self.model[span] = bytes(length)
                self.changed()
        elif kind == FLUSH:
            await self.run(Command(FLUSH, 0, 0, 0))
            self.check_media()
        elif kind == GET_LBA_STATUS:
            self.check_extents(await self.run(Command(GET_LBA_STATUS, 0, offset, length)))
        elif kind == "release":
            self.release_all()
        else:
            command = await self.run(Command(READ, 0, offset, length))
            assert content(command) == self.model[span]
            if kind == "hold":
                self.held.append((command, [bytes(self.model[span])]))
            else:
                self.namespace.release((command,))

    def release_all(self) -> None:
        for command, versions in self.held:
            for found, *allowed in zip(content(command), *versions, strict=True):
                assert found in allowed, "held memory was put to another use"
        self.namespace.release(command for command, _ in self.held)
        self.held.clear()

    def check_media(self) -> None:
        """After a flush, the media hold everything: what power would leave on real pmem."""
        assert Path(self.namespace.media.path).read_bytes() == self.model

    def check_extents(self, command: Command) -> None:
        assert command.extents is not None
        position = command.offset
        for extent in command.extents:
            assert extent.offset == position
            position += extent.length
            if extent.hole:
                assert not any(self.model[extent.offset : position]), "a hole that is not zero"
        assert position == command.offset + command.length


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=str)
@settings(max_examples=150)
@given(steps, st.sampled_from([SIZE, SIZE_ODD]), st.booleans())
def test_any_mix_of_commands_reads_as_the_model(
    kind: str, options: dict[str, Any], history: list[Any], size: int, punches: bool
) -> None:
    async def run() -> None:
        checker = Checker(namespace)
        for name, (offset, length), flags in history:
            await checker.step(name, offset, length, flags)
        checker.release_all()
        await checker.step(READ, 0, size, 0)
        await checker.step(FLUSH, 0, 0, 0)
        assert namespace.representation.leases == 0

    path = Path(f"/dev/shm/pmblk-contract-{os.getpid()}")
    create(path, size)
    media = open_media(path)
    try:
        media.punches = punches
        namespace = Namespace(
            "ns", media, make(kind, media, parse_options(kind, options)), lba_bytes=512
        )
        trio.run(run)
    finally:
        media.close()
        path.unlink()
