"""How the engine describes the memory under an I/O: one contract, interchangeable kinds."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import msgspec

from pmblk.errors import PmblkError
from pmblk.media import Media
from pmblk.representations.base import Lease, Representation, RepresentationCounters
from pmblk.representations.extent import ExtentRepresentation
from pmblk.representations.page_cache import PageCacheRepresentation
from pmblk.representations.pfn import PfnRepresentation
from pmblk.representations.struct_page import StructPageRepresentation
from pmblk.representations.transient_page import TransientPageRepresentation

KINDS: Mapping[str, type[Representation]] = MappingProxyType(
    {
        kind.kind: kind
        for kind in (
            PageCacheRepresentation,
            StructPageRepresentation,
            TransientPageRepresentation,
            PfnRepresentation,
            ExtentRepresentation,
        )
    }
)

_NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})


def parse_options(
    kind: str, options: Mapping[str, Any] = _NO_OPTIONS, *, strict: bool = True
) -> Representation.Options:
    """The options as that kind's type. Raises KeyError, or msgspec.ValidationError.

    `strict` false takes numbers as text too, as a command line has them.
    """
    return msgspec.convert(dict(options), KINDS[kind].Options, strict=strict)


def needs_reserve(options: Representation.Options) -> bool:
    """Whether the media have to be opened with a reserve for a page table."""
    return getattr(options, "memmap", None) == "device"


def make(kind: str, media: Media, options: Representation.Options) -> Representation:
    """A representation of that kind. Raises PmblkError when it cannot be had here.

    It may take seconds (an eager page table of a large device), and touches nothing of another
    representation of the same media, so it can run in a thread while that one serves.
    """
    try:
        return KINDS[kind].over(media, options)
    except (OSError, MemoryError, OverflowError) as error:
        raise PmblkError(
            f"there is no memory for {kind} over {media.path}: {error}",
            hint="make it smaller by its options, or choose another kind",
        ) from error


__all__ = [
    "KINDS",
    "Lease",
    "Representation",
    "RepresentationCounters",
    "make",
    "needs_reserve",
    "parse_options",
]
