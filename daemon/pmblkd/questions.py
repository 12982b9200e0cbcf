"""What may be asked on the control socket: the arguments of each command, for both ends.

`pmblkd.reports` has the answers. Sizes are bytes. An argument that is not known is refused, so
that a command line and a daemon of different versions never misunderstand each other silently.
"""

from typing import Any

import msgspec


class Question(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`list`, `reload`: nothing but the command itself."""


class NamespaceQuestion(Question, frozen=True):
    """`stats`: about one namespace."""

    name: str


class SwitchQuestion(NamespaceQuestion, frozen=True):
    """`switch`: numbers may be text, as a command line has them."""

    kind: str
    options: dict[str, Any] = {}


class RangeQuestion(NamespaceQuestion, frozen=True):
    """`describe`, `poison`: about a range of one namespace."""

    offset: int
    length: int


class SaveQuestion(NamespaceQuestion, frozen=True):
    """`save`: all of one namespace to a file or block device; an absolute path."""

    target: str


# ---- arrays; places are absolute paths or NBD URIs


class RaidStatusQuestion(Question, frozen=True):
    """`raid-status`: of one array, or of all."""

    name: str | None = None


class MemberQuestion(NamespaceQuestion, frozen=True):
    """`raid-fail`, `raid-remove`, `raid-add`: about one member of an array."""

    member: str


class ReplaceQuestion(NamespaceQuestion, frozen=True):
    """`raid-replace`: `new` takes the slot of `old`."""

    old: str
    new: str


class ScrubQuestion(NamespaceQuestion, frozen=True):
    """`raid-scrub`: compare, mend what differs, or end the one that runs."""

    repair: bool = False
    stop: bool = False


class GrowQuestion(NamespaceQuestion, frozen=True):
    """`raid-grow`: to a size (None: as much as there is room for), and over more members."""

    size: int | None = None
    add: list[str] = []


class AssembleQuestion(NamespaceQuestion, frozen=True):
    """`raid-assemble`: an array of the config that was stopped."""

    degraded: bool = False
    force: bool = False
