"""What happens to an array in service, as whoever watches it is told: once, when it happens. Pure.

`place` is a path or a URI; the member's UUID where nobody knows that. `slot` None: a spare.
"""

from collections.abc import Callable

import msgspec

from pmblk.raid.status import SweepKind


class MemberFailed(msgspec.Struct, frozen=True, kw_only=True):
    """It is out, and the array goes on without it."""

    slot: int | None
    place: str
    reason: str


class MemberNeeded(msgspec.Struct, frozen=True, kw_only=True):
    """It does not read or write something, and nobody can make up for it: that is an error."""

    slot: int
    place: str
    reason: str


class MemberSeated(msgspec.Struct, frozen=True, kw_only=True):
    """It has the slot from now on, and is to be filled; `returned`: with what it lacks."""

    slot: int
    place: str
    returned: bool


class SweepBegan(msgspec.Struct, frozen=True, kw_only=True):
    """`slot` is of the member that is filled, or None."""

    kind: SweepKind
    slot: int | None


class SweepEnded(msgspec.Struct, frozen=True, kw_only=True):
    """`error`: why it could not go on. `stopped`: by somebody, or for more urgent work."""

    kind: SweepKind
    slot: int | None
    findings: tuple[str, ...]
    error: str = ""
    stopped: bool = False


class StateChanged(msgspec.Struct, frozen=True, kw_only=True):
    """As in the status of an array: active, degraded or failed."""

    state: str


class WorkEnded(msgspec.Struct, frozen=True, kw_only=True):
    """Members cannot be told of a change: nothing behind the I/O goes on, before a new start."""

    reason: str


Event = (
    MemberFailed | MemberNeeded | MemberSeated | SweepBegan | SweepEnded | StateChanged | WorkEnded
)
Tell = Callable[[Event], None]


def nobody(_event: Event) -> None:
    """For an array that nobody watches."""
