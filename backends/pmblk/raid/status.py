"""What an array tells about itself: plain values, for a command line or a program. Pure.

Sizes and positions are bytes, speeds bytes a second.
"""

import uuid
from typing import Literal

import msgspec

SweepKind = Literal["rebuild", "resync", "check", "repair", "replace", "reshape"]


class MemberStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of the table of roles. `slot` is None for a spare, `place` for who is missing.

    `state`: active, rebuilding, spare, faulty, missing or empty. `reason`: why it is faulty.
    `errors`: rounds of I/O that it failed since it has the slot.
    """

    slot: int | None
    place: str | None
    member: uuid.UUID
    state: str
    checkpoint: int = 0
    bad_blocks: int = 0
    errors: int = 0
    reason: str = ""


class SweepStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Work that takes long: from 0 to `end`, now at `position`; `findings` are in its words."""

    kind: SweepKind
    position: int
    end: int
    bytes_per_second: float
    findings: tuple[str, ...] = ()

    @property
    def part(self) -> float:
        """0 to 1."""
        return self.position / self.end if self.end else 1.0

    @property
    def seconds_left(self) -> float | None:
        """None while nobody can tell."""
        rest = self.end - self.position
        return rest / self.bytes_per_second if self.bytes_per_second else None


class ArrayStatus(msgspec.Struct, frozen=True, kw_only=True):
    """`state`: clean, active, degraded or failed. `scrub`: what the last one came to, or None.

    `dirty_bytes`: of regions that a resync would have to look at after a crash now; None without a
    bitmap. `member_read_bytes` and `member_write_bytes` count what went over the members.
    """

    name: str
    array: uuid.UUID
    level: int
    layout: str
    chunk_bytes: int
    size_bytes: int
    member_bytes: int
    state: str
    events: int
    write_hole: str
    integrity: bool
    bitmap_chunk_bytes: int
    dirty_bytes: int | None
    members: tuple[MemberStatus, ...]
    sweep: SweepStatus | None
    scrub: SweepStatus | None
    member_read_bytes: int
    member_write_bytes: int
