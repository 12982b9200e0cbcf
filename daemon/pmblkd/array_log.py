"""The log of what happens to arrays: a line each, once. What is bad news is a warning.

The engine tells of it (`pmblk.raid.events`); what led to it is in `pmblk raid status`.
"""

from typing import Any

import structlog

from pmblk.raid.events import (
    Event,
    MemberFailed,
    MemberNeeded,
    MemberSeated,
    StateChanged,
    SweepBegan,
    SweepEnded,
    WorkEnded,
)

_log = structlog.get_logger(__name__)


def tell(name: str, event: Event) -> None:
    """`name` is the namespace's."""
    match event:
        case MemberFailed(slot=slot, place=place, reason=reason):
            _log.warning("array member failed", name=name, slot=slot, member=place, reason=reason)
        case MemberNeeded(slot=slot, place=place, reason=reason):
            _log.error(
                "array cannot be without a member that fails",
                name=name,
                slot=slot,
                member=place,
                reason=reason,
                now="what nobody else can make up for is an error",
                mend="see pmblk raid status, and bring members back",
            )
        case MemberSeated(slot=slot, place=place, returned=returned):
            what = "array member is back" if returned else "spare takes over"
            _log.info(what, name=name, slot=slot, member=place)
        case SweepBegan(kind=kind, slot=slot):
            _log.info(f"array {kind} begins", name=name, **_slot(slot))
        case SweepEnded():
            _sweep_ended(name, event)
        case StateChanged(state="active"):
            _log.info("array is whole", name=name)
        case StateChanged(state=state):
            _log.warning(f"array is {state}", name=name)
        case WorkEnded(reason=reason):
            _log.error(
                "array cannot tell its members of a change",
                name=name,
                reason=reason,
                now="nothing is rebuilt or scrubbed any more",
                mend="see pmblk raid status; stop and assemble it",
            )


def _sweep_ended(name: str, event: SweepEnded) -> None:
    fields = _slot(event.slot)
    if event.findings:
        fields["findings"] = list(event.findings)
    if event.error:
        _log.warning(f"array {event.kind} failed", name=name, reason=event.error, **fields)
        return
    say = _log.warning if event.findings else _log.info
    say(f"array {event.kind} {'stopped' if event.stopped else 'ended'}", name=name, **fields)


def _slot(slot: int | None) -> dict[str, Any]:
    return {} if slot is None else {"slot": slot}
