"""The contract of a representation: how it hands out memory, holds it and remembers what is dirty.

A representation stands between a namespace and its media. The namespace has already checked the
range, reserved the pages of a write, and cut the holes out of a read, so a representation only
ever sees memory that is there. It runs on the event loop and never blocks: where it cannot go on
(an exhausted pool, every frame pinned) it says so, and the namespace asks again after a release.
The media may refuse a store (OSError); then nothing is held, and nothing that was written is lost.

The invariants that the contract test holds every kind to:

- what `hold` returns reads as the last bytes written to the range, and the memory behind it is
  not put to another use until `release`;
- after `write_back` of a range, the media hold every byte that was written to it;
- after `forget` of a range, nothing that the representation remembers of it can come back;
- every lease is released exactly once; `leases` is 0 when none is out.
"""

import abc
from collections.abc import Sequence
from typing import ClassVar

import msgspec

from pmblk.media import Media

Lease = list[memoryview]


class Representation(abc.ABC):
    """One kind over one namespace's media. `Options` are what a config may say about the kind."""

    class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
        """No options. A value that cannot be is a ValueError of `__post_init__`."""

    kind: ClassVar[str]
    io_bytes_max: int | None = None  # more than this at once can never be held or written
    has_windows = False  # whether `window` is worth asking for

    def __init__(self, media: Media, options: Options) -> None:
        self.media = media
        self.options = options
        self.leases = 0
        self.bytes_copied = 0

    @abc.abstractmethod
    def hold(self, offset: int, length: int) -> Lease | None:
        """The memory of the range, in order, held until `release`; None: ask again later.

        The views belong to the representation, are read-only to the caller by agreement, and
        their lengths add up to `length`.
        """

    def release(self, leases: Sequence[Lease]) -> None:
        """These I/Os are done. Their views may be looked at until the next await, not after."""
        self.leases -= len(leases)

    @abc.abstractmethod
    def write(self, offset: int, payload: "memoryview | bytes") -> bool:
        """Take `payload` in before returning; False: nothing was taken, ask again later."""

    def window(self, offset: int, length: int) -> memoryview | None:
        """Memory to store a write's bytes to directly, until the next await; None: use `write`.

        Say `stored` of what was stored.
        """
        return None

    def stored(self, offset: int, length: int) -> None:
        """A part of a window has been filled."""
        self.media.stored(offset, length)

    def zero(self, offset: int, length: int) -> None:
        """Zeroes over a reserved range, in memory: the way for ranges that must not be punched."""
        self.forget(offset, length)
        self.media.fill_with_zeroes(offset, length)

    def dirty(self) -> bool:
        """Whether the media lack something that was written."""
        return False

    def dirty_extents(self) -> list[tuple[int, int]]:
        """What the media lack, as (offset, length), sorted; what is written later is not in it."""
        return []

    def write_back(self, offset: int, length: int) -> None:
        """Bring what was written to the range to the media. It is not durable by that."""

    def forget(self, offset: int, length: int) -> None:
        """The whole range is about to become zeroes: drop what is remembered of it."""
