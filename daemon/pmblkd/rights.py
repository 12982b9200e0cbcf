"""Who owns the files of the mount, as numbers, from the names in the config.

Asks the machine's user and group databases.
"""

import grp
import os
import pwd

import msgspec

from pmblk import PmblkError
from pmblkd.config import FuseConfig


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
    """The user's number, and that of his group."""
    try:
        entry = pwd.getpwuid(int(name)) if name.isascii() and name.isdigit() else pwd.getpwnam(name)
    except KeyError:
        if name.isascii() and name.isdigit():
            return int(name), int(name)
        raise PmblkError(
            f'no user "{name}"', hint="name one of this machine, or a number"
        ) from None
    return entry.pw_uid, entry.pw_gid


def _group(name: str) -> int:
    if name.isascii() and name.isdigit():
        return int(name)
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise PmblkError(
            f'no group "{name}"', hint="name one of this machine, or a number"
        ) from None
