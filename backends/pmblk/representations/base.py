"""The contract of a representation: how it describes memory, holds it, and remembers its state.

A representation stands between a namespace and its media. The namespace has already checked the
range, reserved the pages of a write, and cut the holes out of a read, so a representation only
ever sees memory that is there. It runs on the event loop and never blocks: where it cannot go on
(an exhausted pool, every frame pinned) it says so, and the namespace asks again after a release.
Poisoned pages and media that refuse a store are an OSError; then nothing is held, and nothing that
was written is lost.

The invariants that the contract test holds every kind to:

- what `hold` returns reads as the last bytes written to the range, and the memory behind it is
  not put to another use until `release`;
- while `busy` says that a range is held, its pages are not given back to the file system;
- after `write_back` of a range, the media hold every byte that was written to it;
- after `forget` of a range, nothing that the representation remembers of it can come back;
- a poisoned page fails every read and every write of a part of it, until it is written, zeroed or
  discarded as a whole;
- every lease is released exactly once; `leases` is 0 when none is out.
"""

import abc
import errno
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import msgspec

from pmblk import pages
from pmblk.media import Media
from pmblk.pages import PAGE_BYTES
from pmblk.ranges import round_out, whole_units


class Lease(msgspec.Struct, gc=False, eq=False):
    """Held memory. `views` add up to the range, in order; the rest is the kind's own.

    The views belong to the representation and are read-only to the caller by agreement.
    """

    views: list[memoryview]
    first: int = 0
    count: int = 0
    descriptors: Any = None  # what the kind built to describe the memory, in its own form


class RepresentationCounters(msgspec.Struct, kw_only=True):
    """What a representation cost so far: bytes, or plain counts. A kind leaves 0 what it lacks."""

    bytes_copied: int = 0  # by the representation itself; a front end's transfer is not in it
    descriptors_built: int = 0
    descriptor_bytes: int = 0  # written for I/Os: bio_vecs, PFNs, extents, structs that were filled
    metadata_bytes: int = 0  # what it needs for the whole namespace
    metadata_resident_bytes: int = 0  # what of that has memory now (DRAM)
    metadata_device_bytes: int = 0  # what of that lies on the media
    pins: int = 0  # references taken, in the kind's own unit
    unpins: int = 0
    peak_pins: int = 0
    splits: int = 0  # runs that had to be cut
    merges: int = 0  # neighbours that became one run
    iovecs: int = 0  # views that reads were handed out in
    sgl_descriptors: int = 0  # runs that an SGL would name, reads and writes
    pool_waits: int = 0  # refusals for want of descriptors or frames
    pool_peak_bytes: int = 0  # of descriptors, the most that were out of their pool at once
    cache_hits: int = 0
    cache_misses: int = 0
    cache_write_backs: int = 0
    cached_bytes: int = 0
    dirty_bytes: int = 0  # at most; struct-page knows it to 2 MiB
    poisoned_bytes: int = 0


def beyond(offset: int, length: int, *, unit: int) -> tuple[int, int]:
    """The range without the unit that it starts in the middle of; the length may be 0."""
    head = min(-offset % unit, length)
    return offset + head, length - head


def poison_error(offset: int, length: int) -> OSError:
    return OSError(errno.EIO, f"poisoned memory in {length} bytes at {offset}")


class Representation(abc.ABC):
    """One kind over one namespace's media. `Options` are what a config may say about the kind."""

    class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
        """No options. A value that cannot be is a ValueError of `__post_init__`."""

    kind: ClassVar[str]
    io_bytes_max: int | None = None  # more than this at once can never be held or written
    keeps_copies: ClassVar[bool] = False  # beside the media, which may then be out of date
    has_windows = False  # whether `window` is worth asking for

    def __init__(self, media: Media, options: Options) -> None:
        """Raises PmblkError when it cannot be had here (memory, the media's format)."""
        self.media = media
        self.options = options
        self.leases = 0
        self.has_poison = False
        self._bad_pages: set[int] = set()

    @classmethod
    def over(cls, media: Media, options: Any) -> "Representation":
        """A representation of this kind; its options may choose how it is built."""
        return cls(media, options)

    # ---- holding

    @abc.abstractmethod
    def hold(self, offset: int, length: int) -> Lease | None:
        """The memory of the range, held until `release`; None: ask again later. Raises OSError."""

    @abc.abstractmethod
    def release(self, leases: Sequence[Lease]) -> None:
        """These I/Os are done. Their views may be looked at until the next await, not after."""

    @abc.abstractmethod
    def busy(self, offset: int, length: int) -> bool:
        """Whether somebody holds the memory of the range, so that it cannot be given back yet."""

    def lifetime_unit(self, offset: int, length: int) -> tuple[int, int]:
        """What must be kept free of new holds so that `busy` of the range comes to an end."""
        return round_out(offset, length, unit=PAGE_BYTES)

    # ---- writing

    @abc.abstractmethod
    def write(self, offset: int, payload: "memoryview | bytes") -> bool:
        """Take `payload` in before returning; False: nothing was taken, ask again later."""

    def window(self, offset: int, length: int) -> memoryview | None:
        """Memory to store a write's bytes to directly, until the next await; None: use `write`.

        Say `stored` of what was stored. Raises OSError, and then `write` would too.
        """
        if not self.has_windows or self.has_poison:
            return None
        return self.media.view[offset : offset + length]

    def stored(self, offset: int, length: int, *, continued: bool) -> None:
        """A part of a window has been filled; `continued`: not the first one of its write.

        The pieces of one write touch each other, and what two of them share is described once.
        """
        raise AssertionError(f"{self.kind} has no windows")

    def zero(self, offset: int, length: int) -> None:
        """Zeroes over a reserved range, in memory: the way for ranges that must not be punched."""
        if self.has_poison:
            self._refuse_half_poisoned(offset, length)
        self.media.fill_with_zeroes(offset, length)
        self.forget(offset, length)

    # ---- what is dirty

    def dirty(self) -> bool:
        """Whether the media lack something that was written, or its durability does."""
        return False

    def dirty_extents(self) -> Iterator[tuple[int, int]]:
        """What `dirty` is about, as (offset, length), in order and looked up as it goes.

        It may be written back meanwhile. All that was written before the first is in it, of later
        writes perhaps some.
        """
        return iter(())

    def write_back(self, offset: int, length: int) -> None:
        """Bring what was written to the range to the media; a sync makes it durable."""

    def forget(self, offset: int, length: int) -> None:
        """The whole range has become zeroes on the media: drop what is remembered of it."""
        if self.has_poison:
            self._heal(offset, length)

    # ---- poison: a page whose memory has failed. `has_poison` guards the path of an I/O.

    def poison(self, first: int, count: int) -> None:
        """These pages are bad from now on."""
        self._bad_pages.update(range(first, first + count))
        self.has_poison = True

    def poisoned(self) -> list[int]:
        """The bad pages, sorted."""
        return sorted(self._bad_pages)

    def _heal(self, offset: int, length: int) -> None:
        """The whole pages of the range are good again."""
        self._bad_pages -= self._bad_in(pages.whole(offset, length, limit=self.media.size))
        self.has_poison = bool(self._bad_pages)

    def _bad_in(self, run: range) -> set[int]:
        """The bad pages of a run; looks through the shorter of the two, for a run may be long."""
        if len(self._bad_pages) < len(run):
            return {page for page in self._bad_pages if page in run}
        return self._bad_pages.intersection(run)

    def _refuse_poisoned(self, offset: int, length: int) -> None:
        """Raises OSError (EIO) when the range touches a bad page."""
        first, count = pages.span(offset, length)
        if self._bad_in(range(first, first + count)):
            raise poison_error(offset, length)

    def _refuse_half_poisoned(self, offset: int, length: int) -> None:
        """Raises OSError (EIO) when a bad page is to be written in part; whole ones are welcome."""
        start, end = whole_units(offset, length, unit=PAGE_BYTES, limit=self.media.size)
        if start > offset:
            self._refuse_poisoned(offset, min(start - offset, length))
        if start <= end < offset + length:
            self._refuse_poisoned(end, offset + length - end)

    # ---- what it cost

    @abc.abstractmethod
    def built(self) -> tuple[int, int]:
        """Descriptors that were built so far, and the bytes that were written for them."""

    @abc.abstractmethod
    def costs(self) -> RepresentationCounters:
        """Everything but `metadata_resident_bytes`, at the cost of a look."""

    def resident_bytes(self) -> int:
        """DRAM that the metadata take now. May take 10 ms for a large table; any thread may ask."""
        return 0

    def counters(self) -> RepresentationCounters:
        """All of it, now."""
        counters = self.costs()
        counters.metadata_resident_bytes = self.resident_bytes()
        return counters

    def close(self) -> None:
        """Give its own memory back; no lease is out."""
        assert self.leases == 0
