"""What a namespace and a daemon ask of an array in service (`pmblk.raid.running` is one).

Places are paths or NBD URIs, sizes and offsets bytes.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from pmblk.raid.geometry import Geometry
from pmblk.raid.status import ArrayStatus


class Blocks(Protocol):
    """The bytes of an array (`pmblk.raid.array`). All of them raise OSError, but `write`."""

    async def read(self, offset: int, length: int) -> memoryview: ...
    async def write(self, writes: Sequence[tuple[int, memoryview]]) -> Sequence[OSError | None]: ...
    async def zero(self, offset: int, length: int) -> None: ...
    async def flush(self) -> None: ...


class Running(Protocol):
    """An array in service (`pmblk.raid.running`)."""

    @property
    def array(self) -> Blocks: ...
    @property
    def geometry(self) -> Geometry: ...
    @property
    def size(self) -> int: ...
    def status(self) -> ArrayStatus: ...

    async def run(self) -> None:
        """Its background work, until it is cancelled."""

    async def stop(self) -> None:
        """All is durable, and its members are closed. Raises OSError, with them closed too."""

    def close(self) -> None:
        """Let the members go, as they are; after `stop` there is nothing left to do."""

    # What people ask for; all of it raises PmblkError.
    async def fail(self, place: str) -> None: ...
    async def remove(self, place: str) -> None: ...
    async def add(self, place: str) -> None: ...
    async def replace(self, old: str, new: str) -> None: ...
    def scrub(self, *, repair: bool) -> None: ...
    def stop_scrub(self) -> None: ...


@runtime_checkable
class Growable(Protocol):
    """An array that can grow.

    `resized` is called when the size changes later: data may have to move to new members first.
    """

    resized: Callable[[], None]

    async def grow(self, *, size: int | None, add: Sequence[str]) -> None:
        """`size` None is as much as the members have room for. Raises PmblkError."""
