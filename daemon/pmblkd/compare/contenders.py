"""Who is compared: the representations, and the variants of them. Pure.

A name is the kind, and what makes a variant one: `struct-page memmap=device`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from pmblk import PmblkError
from pmblk.representations import KINDS
from pmblk.units import format_size

ARENA_BYTES_MAX = 64 << 20
ARENA_SHARE = 8  # the arena is at most an eighth of what is worked on, or it would cache all of it
MIB = 1 << 20

VARIANTS: Sequence[tuple[str, Mapping[str, Any]]] = (
    ("struct-page", {"memmap": "device"}),
    ("struct-page", {"compound": "2MiB"}),
    ("pfn", {"locking": "none"}),
    ("extent", {"fragments": 1024}),
)


class Contender(msgspec.Struct, frozen=True):
    """One representation with its options; the name is unique among all that are compared."""

    name: str
    kind: str
    options: dict[str, Any]

    @property
    def takes_reserve(self) -> bool:
        """Whether it cannot take over from its like: there is one reserve for a page table."""
        return self.options.get("memmap") == "device"


def contender(kind: str, options: Mapping[str, Any]) -> Contender:
    """A contender that is named after its options."""
    words = [kind, *(f"{key}={value}" for key, value in options.items())]
    return Contender(" ".join(words), kind, dict(options))


def arena_bytes(size: int) -> int:
    """What page-cache gets for frames when `size` bytes are worked on; whole MiB."""
    return max(MIB, min(ARENA_BYTES_MAX, size // ARENA_SHARE // MIB * MIB))


def contenders(size: int, *, variants: bool, only: Sequence[str] = ()) -> list[Contender]:
    """All that are to be compared on `size` bytes, variants behind their kind.

    `only` are kinds. Raises PmblkError for one that there is not.
    """
    for kind in only:
        if kind not in KINDS:
            raise PmblkError(f"--only: no representation {kind}", hint=f"known are {_known()}")
    found = []
    for kind in KINDS:
        if only and kind not in only:
            continue
        found.append(_plain(kind, size))
        if variants:
            found += [contender(*variant) for variant in VARIANTS if variant[0] == kind]
    return found


def rotated(these: Sequence[Contender], index: int) -> list[Contender]:
    """Each has its turn to be first."""
    first = index % len(these)
    return [*these[first:], *these[:first]]


def _plain(kind: str, size: int) -> Contender:
    if kind != "page-cache":
        return Contender(kind, kind, {})
    return Contender(kind, kind, {"arena": format_size(arena_bytes(size)).replace(" ", "")})


def _known() -> str:
    return ", ".join(KINDS)
