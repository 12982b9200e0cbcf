"""Clients that write blocks and flush, and the check that nothing they were promised got lost.

Each writes blocks of its own over a connection of its own, in pieces of random lengths, and flushes
now and then, until the daemon is gone. A block has a version for content, so its bytes tell which
write they are of: after a crash it may be the last one that a flush covered, or a later one.
"""

import contextlib
import random
import struct
import threading
from collections.abc import Iterator
from typing import Any

import nbd

from tests.harness.daemon import Daemon

BLOCK_BYTES = 4096
PIECE_BLOCKS = 8  # a client has every so manieth piece, so that stripes are everybody's
CLIENTS = 4
WRITES_A_FLUSH = 6


def content(block: int, version: int) -> bytes:
    """Zeroes are version 0: never written."""
    return struct.pack("<QQ", block, version) * (BLOCK_BYTES // 16) if version else bytes(4096)


class Blocks:
    """What each of the first blocks of a namespace may hold, by their versions."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.kept = [0] * count
        self.later: list[set[int]] = [set() for _ in range(count)]

    def wrong(self, daemon: Daemon, name: str) -> list[str]:
        """Blocks that hold what they must not; what they do hold is what they have to, from now."""
        with connected(daemon, name) as handle:
            found = b"".join(
                bytes(handle.pread(BLOCK_BYTES * PIECE_BLOCKS, at * BLOCK_BYTES))
                for at in range(0, self.count, PIECE_BLOCKS)
            )
        return [
            words
            for block in range(self.count)
            if (words := self.take(block, found[block * BLOCK_BYTES :][:BLOCK_BYTES]))
        ]

    def take(self, block: int, found: bytes) -> str:
        """What is wrong with it, if anything."""
        allowed = {self.kept[block], *self.later[block]}
        for version in allowed:
            if found == content(block, version):
                self.kept[block] = version
                self.later[block].clear()
                return ""
        return f"block {block} has {found[:16].hex()}, and none of the versions {sorted(allowed)}"


@contextlib.contextmanager
def connected(daemon: Daemon, name: str) -> Iterator[Any]:
    handle = nbd.NBD()
    handle.connect_uri(daemon.uri(name))
    try:
        yield handle
    finally:
        with contextlib.suppress(nbd.Error):
            handle.shutdown()


class Writing:
    """Clients at work. `await_flushes` is the moment that a test chooses; `end` waits for them."""

    def __init__(self, daemon: Daemon, name: str, blocks: Blocks, seed: int) -> None:
        self._daemon = daemon
        self._name = name
        self._blocks = blocks
        self._flushes = 0
        self._news = threading.Condition()
        self._enough = False
        self._errors: list[str] = []
        self._clients = [
            threading.Thread(
                target=self._run, args=(number, random.Random(seed * CLIENTS + number))
            )
            for number in range(CLIENTS)
        ]
        for one in self._clients:
            one.start()

    def await_flushes(self, count: int, *, seconds: float = 30) -> None:
        """So many more were acknowledged, of all clients together."""
        with self._news:
            wanted = self._flushes + count
            done = self._news.wait_for(lambda: self._flushes >= wanted, seconds)
        assert done, f"they hang, or have seen errors: {self._errors}"

    def end(self) -> None:
        """They end of themselves when the daemon is gone."""
        self._enough = True
        for one in self._clients:
            one.join(30)
            assert not one.is_alive(), "a client hangs"

    def _run(self, number: int, chosen: random.Random) -> None:
        try:
            with connected(self._daemon, self._name) as handle:
                while not self._enough:
                    self._write_and_flush(handle, number, chosen)
        except nbd.Error as error:  # the daemon is gone, as the test wants it
            self._errors.append(str(error))

    def _write_and_flush(self, handle: Any, number: int, chosen: random.Random) -> None:
        covered: dict[int, int] = {}
        for _ in range(WRITES_A_FLUSH):
            first, count = self._choose(number, chosen)
            version = chosen.randrange(1, 1 << 62)
            written = range(first, first + count)
            for block in written:
                self._blocks.later[block].add(version)
                covered[block] = version
            data = b"".join(content(block, version) for block in written)
            handle.pwrite(data, first * BLOCK_BYTES)
        handle.flush()
        for block, version in covered.items():
            self._blocks.kept[block] = version
            self._blocks.later[block].clear()
        with self._news:
            self._flushes += 1
            self._news.notify_all()

    def _choose(self, number: int, chosen: random.Random) -> tuple[int, int]:
        """Some blocks of one piece: the first, and how many."""
        pieces = self._blocks.count // PIECE_BLOCKS
        piece = chosen.randrange(number, pieces, CLIENTS)
        start = chosen.randrange(PIECE_BLOCKS)
        return piece * PIECE_BLOCKS + start, chosen.randint(1, PIECE_BLOCKS - start)


@contextlib.contextmanager
def writing(daemon: Daemon, name: str, blocks: Blocks, seed: int) -> Iterator[Writing]:
    """Ended with the block."""
    clients = Writing(daemon, name, blocks, seed)
    try:
        yield clients
    finally:
        clients.end()
