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
