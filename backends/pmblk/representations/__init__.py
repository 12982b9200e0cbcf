"""How the engine describes the memory under an I/O: one contract, interchangeable kinds."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import msgspec

from pmblk.media import Media
from pmblk.representations.base import Representation
from pmblk.representations.extent import ExtentRepresentation
from pmblk.representations.page_cache import PageCacheRepresentation

# Any: each kind takes its own Options, which `make` brings together.
KINDS: Mapping[str, Any] = MappingProxyType(
    {
        ExtentRepresentation.kind: ExtentRepresentation,
        PageCacheRepresentation.kind: PageCacheRepresentation,
    }
)


def make(
    kind: str, media: Media, options: Mapping[str, Any] = MappingProxyType({})
) -> Representation:
    """A representation of that kind. Raises KeyError, or msgspec.ValidationError."""
    chosen = KINDS[kind]
    made: Representation = chosen(media, msgspec.convert(dict(options), chosen.Options))
    return made


__all__ = ["KINDS", "ExtentRepresentation", "PageCacheRepresentation", "Representation", "make"]
