"""Any bytes from the kernel, in any order; and any history of one file, against a model.

`PMBLK_EXAMPLES` sets how many histories each kind goes through, for a longer hunt.
"""

import errno
import mmap
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pmblk import Namespace
from pmblk.media import create, open_media
from pmblk.representations import make, needs_reserve, parse_options
from pmblkd.config import Dax, NamespaceConfig
from pmblkd.fuse.files import Files
from pmblkd.fuse.passthrough import Passthrough
from pmblkd.fuse.session import Session, Work
from pmblkd.registry import Registry, Served
from tests.unit.conftest import memory
from tests.unit.fuse_kernel import (
    BackingFiles,
    FallocateIn,
    InHeader,
    InitIn,
    Kernel,
    LseekIn,
    LseekOut,
    Op,
    OpenIn,
    OpenOut,
    SetattrIn,
    WriteOut,
    io,
    message,
    split,
)
from tests.unit.test_representation_contract import EXAMPLES, KINDS, Options

PAGE = 4096
PASSTHROUGH = 128  # FOPEN_PASSTHROUGH
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16


@contextmanager
def namespace_in(
    directory: Path, name: str, size: int, kind: str, options: Options, *, read_only: bool = False
) -> Iterator[Namespace]:
    parsed = parse_options(kind, options)
    path = directory / name
    create(path, size)
    media = open_media(path, read_only=read_only, with_reserve=needs_reserve(parsed))
    try:
        namespace = Namespace(name, media, make(kind, media, parsed), lba_bytes=512)
        yield namespace
        namespace.representation.close()
    finally:
        media.close()


def serve(registry: Registry, namespace: Namespace, dax: Dax) -> Served:
    config = NamespaceConfig(name=namespace.name, path=str(namespace.media.path), dax=dax)
    served = Served(config, namespace, created=False)
    registry.add(served)
    return served


# ---- any bytes at all

SIZE = (256 << 10) + 512  # an end that is no page boundary
NAMESPACES: list[tuple[str, str, Dax, bool]] = [
    ("dax", "extent", "auto", False),
    ("fast", "pfn", "fast", False),
    ("cached", "page-cache", "auto", False),
    ("fixed", "struct-page", "fast", True),
]

numbers = st.one_of(
    st.integers(0, 2 * SIZE),
    st.sampled_from([0, 1, 512, PAGE, SIZE - 1, SIZE, SIZE + 1, 1 << 31, 1 << 32, 1 << 63]),
    st.integers(0, (1 << 64) - 1),
)
words = st.one_of(st.integers(0, 2 * SIZE), st.integers(0, (1 << 32) - 1))
inodes = st.one_of(st.integers(0, 6), st.just((1 << 64) - 1))
flags = st.one_of(st.sampled_from([0, 1, 2, 3, os.O_TRUNC, os.O_RDWR | os.O_CLOEXEC]), words)
modes = st.one_of(st.integers(0, 0x7F), words)


def writes(offset: int, data: bytes, slip: int) -> bytes:
    return io(offset, len(data) + slip, data)


bodies: dict[int, st.SearchStrategy[Any]] = {
    Op.INIT: st.builds(InitIn, st.integers(0, 9), st.integers(0, 99), words, words, words),
    Op.LOOKUP: st.one_of(
        st.sampled_from([b"dax\0", b"fast\0", b"nope\0", b"\0"]), st.binary(max_size=20)
    ),
    Op.SETATTR: st.builds(SetattrIn, st.integers(0, 0xFFF), st.just(0), numbers, numbers),
    Op.OPEN: st.builds(OpenIn, flags, words),
    Op.READ: st.builds(io, numbers, words),
    Op.WRITE: st.builds(writes, numbers, st.binary(max_size=9000), st.sampled_from([0, 0, 0, 1])),
    Op.FALLOCATE: st.builds(FallocateIn, numbers, numbers, numbers, modes),
    Op.LSEEK: st.builds(LseekIn, numbers, numbers, st.one_of(st.integers(0, 5), words)),
    Op.READDIR: st.builds(io, st.one_of(st.integers(0, 6), numbers), words),
}


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """Mostly what a kernel could send, and now and then cut, lengthened or with a false length."""
    opcode = draw(st.one_of(st.sampled_from(Op), st.sampled_from([Op.OPEN, Op.RELEASE]), words))
    body = bytes(draw(st.one_of(bodies.get(opcode, st.just(bytes(40))), st.binary(max_size=99))))
    unique = draw(st.one_of(st.integers(0, 9), st.integers(0, (1 << 64) - 1)))
    whole = message(opcode, draw(inodes), body, unique=unique)
    slip = draw(st.sampled_from(["", "", "", "", "cut", "longer", "length"]))
    if slip == "cut":
        return whole[: draw(st.integers(0, len(whole)))]
    if slip == "longer":
        return whole + draw(st.binary(min_size=1, max_size=50))
    if slip == "length":
        return draw(words).to_bytes(4, "little") + whole[4:]
    return whole


class Conversation:
    """A session with real namespaces, and what its opens must add up to."""

    def __init__(self, served: list[Served], registry: Registry, backing: BackingFiles) -> None:
        self.served = served
        self.backing = backing
        self.backings = Passthrough()
        self.backings.attach(-1, minor=40, refusal="")
        self.files = Files(registry)
        self.kernel = Kernel(Session(self.files, self.backings))
        self.opens: Counter[int] = Counter()
        self.dax_opens: Counter[int] = Counter()

    async def say(self, request: bytes) -> None:
        outcome = self.kernel.receive(request)
        if len(request) < 40:
            assert outcome is None
            return
        header = InHeader.from_buffer_copy(request)
        assert (outcome is None) == (header.opcode in (Op.FORGET, Op.BATCH_FORGET))
        if isinstance(outcome, Work):
            outcome = await self._execute(outcome)
        if outcome is not None:
            answer, body = split(outcome)
            assert answer.unique == header.unique
            if not answer.error:
                self._count(header.opcode, header.nodeid, body)
        self.check()

    async def _execute(self, work: Work) -> list[bytes]:
        waiting = work.namespace.execute((work.command,))
        if waiting:
            assert not await work.namespace.complete(waiting)
        reply = [bytes(piece) for piece in self.kernel.session.answer(work)]
        work.namespace.release((work.command,))
        return reply

    def _count(self, opcode: int, inode: int, body: bytes) -> None:
        if opcode == Op.OPEN:
            self.opens[inode] += 1
            if OpenOut.from_buffer_copy(body).open_flags & PASSTHROUGH:
                self.dax_opens[inode] += 1
        elif opcode == Op.RELEASE:
            assert self.opens[inode], "released, and was not open"
            self.opens[inode] -= 1
            if self.dax_opens[inode]:
                self.dax_opens[inode] -= 1

    def check(self) -> None:
        assert self.files.users == sum(self.opens.values())
        for served in self.served:
            inode = served.number + 1
            assert served.users == self.opens[inode]
            assert served.dax_opens == self.dax_opens[inode]
            assert memory(served).representation.leases == 0
            assert memory(served).media.path.stat().st_size == SIZE
        assert len(self.backing.open) == sum(1 for opens in self.dax_opens.values() if opens)

    def close(self) -> None:
        for inode in [one for one, opens in self.opens.items() for _ in range(opens)]:
            self.kernel.release(inode)
            self._count(Op.RELEASE, inode, b"")
        self.check()
        assert not self.backing.open
        assert not self.files.users


@settings(max_examples=3 * EXAMPLES, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.one_of(requests(), requests(), st.binary(max_size=200)), max_size=40))
def test_whatever_the_kernel_says_is_answered_and_nothing_leaks(history: list[bytes]) -> None:
    async def run() -> None:
        for request in history:
            await conversation.say(request)

    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        registry = Registry()
        served = [
            serve(
                registry,
                stack.enter_context(
                    namespace_in(directory, name, SIZE, kind, {}, read_only=read_only)
                ),
                dax,
            )
            for name, kind, dax, read_only in NAMESPACES
        ]
        backing = BackingFiles(stack.enter_context(pytest.MonkeyPatch.context()))
        conversation = Conversation(served, registry, backing)
        trio.run(run)
        conversation.close()


# ---- any history of one file

FILE_BYTES = 5 << 20  # more than is zeroed or reserved in one go

ranges = st.tuples(
    st.one_of(
        st.integers(0, FILE_BYTES + PAGE),
        st.integers(0, FILE_BYTES // PAGE).map(lambda n: n * PAGE),
    ),
    st.one_of(st.integers(1, 20_000), st.integers(1, 1 << 20), st.just(PAGE)),
)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("write"), ranges),
        st.tuples(st.just("read"), ranges),
        st.tuples(st.sampled_from(["punch", "zero", "allocate"]), ranges),
        st.tuples(st.sampled_from(["punch", "zero", "allocate"]), st.just((0, FILE_BYTES))),
        st.tuples(st.sampled_from(["data", "hole"]), ranges),
        st.tuples(st.sampled_from(["sync", "store"]), ranges),
    ),
    max_size=20,
)
MODES = {
    "punch": PUNCH_HOLE | KEEP_SIZE,
    "zero": ZERO_RANGE | KEEP_SIZE,
    "allocate": KEEP_SIZE,
}


class History:
    """One file through a session, and the bytes that it has to have."""

    def __init__(self, kernel: Kernel, namespace: Namespace, *, punch: bool) -> None:
        self.kernel = kernel
        self.namespace = namespace
        self.punch = punch
        self.size = namespace.size
        self.model = bytearray(self.size)
        self.has_memory = [False] * -(-self.size // PAGE)  # pages that were given memory for sure
        self.number = 0
        self.inode = kernel.lookup(b"ns").nodeid

    async def ask(self, opcode: Op, body: bytes) -> bytes:
        return await self.kernel.ask_slowly(opcode, self.inode, body)

    async def step(self, what: str, offset: int, length: int) -> None:
        if what == "write":
            await self.write(offset, length)
        elif what == "read":
            await self.read(offset, length)
        elif what in MODES:
            await self.fallocate(what, offset, length)
        elif what == "store":
            self.store(offset, length)
        elif what == "sync":
            await self.sync()
        else:
            await self.seek(offset, os.SEEK_DATA if what == "data" else os.SEEK_HOLE)

    def payload(self, length: int) -> bytes:
        self.number += 1
        return (self.number.to_bytes(2, "big") * (length // 2 + 1))[:length]

    async def write(self, offset: int, length: int) -> None:
        data = self.payload(length)
        fits = max(0, min(length, self.size - offset))
        if not fits:
            with pytest.raises(OSError, match="No space left"):
                await self.ask(Op.WRITE, io(offset, length, data))
            return
        reply = await self.ask(Op.WRITE, io(offset, length, data))
        assert WriteOut.from_buffer_copy(reply).size == fits
        self.model[offset : offset + fits] = data[:fits]
        self.given_memory(offset, fits)

    async def read(self, offset: int, length: int) -> None:
        assert await self.ask(Op.READ, io(offset, length)) == self.model[offset : offset + length]

    async def fallocate(self, what: str, offset: int, length: int) -> None:
        body = bytes(FallocateIn(offset=offset, length=length, mode=MODES[what]))
        if what != "punch" and length > self.size - offset:
            with pytest.raises(OSError, match="No space left"):
                await self.ask(Op.FALLOCATE, body)
            return
        before = self.namespace.media.allocated_bytes()
        assert await self.ask(Op.FALLOCATE, body) == b""
        if what == "punch":
            if not self.punch and not self.namespace.media.reserve_user:  # a table may grow
                assert self.namespace.media.allocated_bytes() == before, "memory is kept, not taken"
        else:
            self.given_memory(offset, length)
        if what != "allocate":
            end = min(offset + length, self.size)
            self.model[offset:end] = bytes(max(0, end - offset))
        if what == "punch" and self.punch:
            self.forget_memory(offset, length)

    def store(self, offset: int, length: int) -> None:
        """By a client that maps the media, where that can be."""
        fits = min(length, self.size - offset)
        if fits <= 0 or self.namespace.representation.keeps_copies:
            return
        data = self.payload(fits)
        with (
            self.namespace.media.path.open("r+b") as file,
            mmap.mmap(file.fileno(), 0) as mapping,
        ):
            mapping[offset : offset + fits] = data
        self.model[offset : offset + fits] = data

    async def sync(self) -> None:
        assert await self.ask(Op.FSYNC, bytes(16)) == b""
        assert self.namespace.media.path.read_bytes()[: self.size] == self.model

    async def seek(self, offset: int, whence: int) -> None:
        body = bytes(LseekIn(offset=offset, whence=whence))
        reply = await self.kernel.answer_slowly(Op.LSEEK, self.inode, body)
        if isinstance(reply, OSError):
            assert reply.errno == errno.ENXIO
            assert offset >= self.size or not any(self.model[offset:])
            return
        found = LseekOut.from_buffer_copy(reply).offset
        assert offset <= found <= self.size
        if whence == os.SEEK_DATA:
            assert not any(self.model[offset:found]), "data were taken for a hole"
        else:
            assert found == self.size or not self.has_memory[found // PAGE]
            assert not self.model[found : found + 1].strip(b"\0")

    def given_memory(self, offset: int, length: int) -> None:
        for page in range(offset // PAGE, -(-(offset + length) // PAGE)):
            self.has_memory[page] = True

    def forget_memory(self, offset: int, length: int) -> None:
        for page in range(offset // PAGE, min(-(-(offset + length) // PAGE), len(self.has_memory))):
            self.has_memory[page] = False

    async def check_all(self) -> None:
        for offset in range(0, self.size, 1 << 20):
            await self.read(offset, 1 << 20)
        await self.sync()
        assert self.namespace.representation.leases == 0
        known = self.namespace.media.allocation
        for page, has_memory in enumerate(self.has_memory):
            assert not has_memory or known.covers(page * PAGE, 1)


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=str)
@settings(max_examples=EXAMPLES // 2, suppress_health_check=[HealthCheck.too_slow])
@given(steps, st.booleans())
def test_any_history_of_a_file_reads_as_the_model(
    kind: str, options: Options, history: list[Any], punch: bool
) -> None:
    async def run() -> None:
        one = History(kernel, namespace, punch=punch)
        for what, (offset, length) in history:
            await one.step(what, offset, length)
        await one.check_all()

    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        namespace = stack.enter_context(namespace_in(directory, "ns", FILE_BYTES, kind, options))
        registry = Registry()
        serve(registry, namespace, "auto")
        kernel = Kernel(Session(Files(registry, punch=punch), Passthrough()))
        trio.run(run)
