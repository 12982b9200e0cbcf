"""Errors of the daemon's own, and exception groups, as trio's nurseries raise them."""

import difflib
from collections.abc import Sequence
from pathlib import Path

from pmblk import PmblkError


class WorkFailed(PmblkError):
    """What was asked could be done, and then failed: exit status 1, where others mean 2."""


class ConfigError(PmblkError):
    """What is wrong at which key of which file."""

    def __init__(self, file: Path | str, key: str, message: str, *, hint: str = "") -> None:
        super().__init__(f"{file}: {key}: {message}" if key else f"{file}: {message}", hint=hint)


class RepresentationError(PmblkError):
    """A representation that cannot be; `option` is the one that is wrong, empty for the kind."""

    def __init__(self, option: str, message: str, *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.option = option


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """A hint: the known word that is nearest, or all of them."""
    close = difflib.get_close_matches(word, known, n=1)
    if close:
        return f'did you mean "{close[0]}"?'
    return f"known are {', '.join(known)}" if known else ""


def first_leaf(error: BaseException) -> BaseException:
    """The first exception in a group of groups; any other exception as it is."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def only_ours(error: BaseException) -> PmblkError | None:
    """The first PmblkError, if `error` holds nothing else; None where a defect hides in it."""
    if isinstance(error, BaseExceptionGroup):
        ours, others = error.split(PmblkError)
        if ours is None or others is not None:
            return None
    leaf = first_leaf(error)
    return leaf if isinstance(leaf, PmblkError) else None
