"""Fixtures of the unit tests. A test that logs a warning or worse fails, unless it expects it."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import settings

from pmblk import Command, Namespace
from pmblk.media import Media, create, open_media
from pmblk.media.durability import Durability
from pmblk.namespace import memory_of
from pmblk.nvme.command import DATASET_MANAGEMENT, READ, WRITE, Hole
from pmblk.representations import make, needs_reserve, parse_options
from pmblkd.config import NamespaceConfig
from pmblkd.registry import Registry, Served

MakeNamespace = Callable[..., Namespace]

# No deadline: a busy machine is no defect. The blob makes a failing example repeatable anywhere.
settings.register_profile("pmblk", deadline=None, print_blob=True)
settings.load_profile("pmblk")


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory on tmpfs: media there are of the level `memory`."""
    with tempfile.TemporaryDirectory(prefix="pmblk-unit-", dir="/dev/shm") as path:
        yield Path(path)


@pytest.fixture
def make_media(directory: Path) -> Iterator[Callable[..., Media]]:
    """Makes and opens media; closes them at the end."""
    opened: list[Media] = []

    def make_one(size: int = 1 << 20, name: str = "media.img", **options: Any) -> Media:
        path = directory / name
        if not path.exists():
            create(path, size)
        opened.append(open_media(path, **options))
        return opened[-1]

    yield make_one
    for media in opened:
        media.close()


@pytest.fixture
def make_namespace(make_media: Callable[..., Media]) -> MakeNamespace:
    def make_one(
        size: int = 1 << 20,
        *,
        kind: str = "extent",
        options: dict[str, Any] | None = None,
        read_only: bool = False,
        name: str = "media.img",
    ) -> Namespace:
        parsed = parse_options(kind, options or {})
        media = make_media(size, name=name, read_only=read_only, with_reserve=needs_reserve(parsed))
        representation = make(kind, media, parsed)
        return Namespace("ns", media, representation, lba_bytes=512)

    return make_one


def write(offset: int, payload: bytes, flags: int = 0) -> Command:
    return Command(WRITE, flags, offset, len(payload), payload=payload)


def discard(offset: int, length: int) -> Command:
    return Command(DATASET_MANAGEMENT, 0, offset, length)


def hold(namespace: Namespace, offset: int, length: int) -> Command:
    """A read whose reply has not left: what it holds is given back by `release`."""
    command = Command(READ, 0, offset, length)
    assert not namespace.execute([command])
    assert command.status == 0
    return command


class RecordedDurability(Durability):
    """Stands in for persistent memory: what is written back, store by store, is in `ranges`."""

    level = "pmem"
    follows_stores = True
    sync_blocks = False

    def __init__(self) -> None:
        super().__init__("a test")
        self.ranges: list[tuple[int, int]] = []

    def sync(self) -> None:
        raise AssertionError("never blocks, so nobody has to sync")

    def stored(self, offset: int, length: int) -> None:
        self.ranges.append((offset, length))

    def taken(self) -> list[tuple[int, int]]:
        """The ranges since the last call."""
        ranges, self.ranges = self.ranges, []
        return ranges


def recorded(media: Media) -> RecordedDurability:
    """From now on these media are persistent memory; before a representation is made over them."""
    media.durability = durability = RecordedDurability()
    media.store, media.store_only = media._choose_store(), media._store
    return durability


def memory(served: Served) -> Namespace:
    """The namespace, which is none of an array."""
    return memory_of(served.namespace, "memory")


def registered(*namespaces: Namespace) -> Registry:
    """A registry with them in service."""
    registry = Registry()
    for namespace in namespaces:
        config = NamespaceConfig(name=namespace.name, path=str(namespace.media.path))
        registry.add(Served(config, namespace, created=False))
    return registry


def content(command: Command) -> bytes:
    """What a finished read holds, holes as zeroes."""
    return b"".join(
        bytes(segment.length) if isinstance(segment, Hole) else bytes(segment)
        for segment in command.segments or ()
    )


class LogRecord(list[dict[str, Any]]):
    """What was logged; `expect` takes a record out of the check at the end of the test."""

    def expect(self, event: str) -> dict[str, Any]:
        for record in self:
            if record["event"] == event:
                self.remove(record)
                return record
        raise AssertionError(f"{event!r} was not logged: {list(self)}")


@pytest.fixture(autouse=True)
def logged() -> Iterator[LogRecord]:
    records = LogRecord()

    def capture(_logger: Any, method: str, event: Any) -> Any:
        records.append({**event, "level": method})
        raise structlog.DropEvent

    structlog.configure(processors=[capture], cache_logger_on_first_use=False)
    yield records
    structlog.reset_defaults()
    unexpected = [r for r in records if r["level"] not in ("debug", "info")]
    assert not unexpected, f"logged, and not expected: {unexpected}"
