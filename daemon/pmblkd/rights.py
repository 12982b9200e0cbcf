"""Who owns the files of the mount, as numbers, from the names in the config.

Asks the machine's user and group databases.
"""

import grp
import os
import pwd

import msgspec

from pmblk import PmblkError
from pmblkd.config import FuseConfig

ID_MAX = (1 << 32) - 2  # the one after it is nobody's: chown(2) takes it for "as it is"


class Rights(msgspec.Struct, frozen=True):
    """Who owns the files, and what they may do; a read-only file has no write bits."""

    uid: int
    gid: int
    mode: int = 0o600


def rights_of(fuse: FuseConfig) -> Rights:
    """Raises PmblkError for a user or a group that is not known."""
    if fuse.owner is None:
        return Rights(os.getuid(), os.getgid(), fuse.mode_bits)
    user, _, group = fuse.owner.partition(":")
    uid, gid = _user(user)
    return Rights(uid, _group(group) if group else gid, fuse.mode_bits)


def _user(name: str) -> tuple[int, int]:
    """The user's number, and that of their group."""
    number = _number(name)
    try:
        entry = pwd.getpwnam(name) if number is None else pwd.getpwuid(number)
    except (KeyError, ValueError):  # ValueError: no name of this machine has a NUL
        if number is not None:
            return number, number
        raise PmblkError(
            f'no user "{name}"', hint="name one of this machine, or a number"
        ) from None
    return entry.pw_uid, entry.pw_gid


def _group(name: str) -> int:
    number = _number(name)
    if number is not None:
        return number
    try:
        return grp.getgrnam(name).gr_gid
    except (KeyError, ValueError):
        raise PmblkError(
            f'no group "{name}"', hint="name one of this machine, or a number"
        ) from None


def _number(name: str) -> int | None:
    """None for what is no number. Raises PmblkError for a number that nobody can have."""
    if not (name.isascii() and name.isdigit()):
        return None
    if len(name) > len(str(ID_MAX)) or int(name) > ID_MAX:
        raise PmblkError(f"{name} is too large for a user or a group", hint=f"at most {ID_MAX}")
    return int(name)
