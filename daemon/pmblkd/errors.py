"""Errors of the daemon's own, and exception groups, as trio's nurseries raise them."""

from pmblk import PmblkError


class WorkFailed(PmblkError):
    """What was asked could be done, and then failed: exit status 1, where others mean 2."""


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
