"""A step of the demo, and what it finds out."""

from collections.abc import Callable
from dataclasses import dataclass

from pmblkd.compare import fio


class CheckFailed(Exception):
    """Something is not as it has to be: what."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a step found out. `check` is empty where there was nothing to check."""

    said: str = ""
    check: str = ""
    side: fio.Side | None = None


@dataclass(frozen=True, kw_only=True)
class Step:
    """`is_short`: half of it would leave something behind, so a signal waits for its end."""

    title: str
    work: Callable[[], Outcome]
    is_short: bool = False
