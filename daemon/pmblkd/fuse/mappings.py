"""Clients' mappings of the media, and a representation that keeps copies: never both at once.

A client with a DAX mapping loads and stores the media; page-cache reads and writes its frames. So
a switch to such a kind is refused while files are open that way, or are mapped: a mapping outlives
the descriptor that it was made with, and the daemon hears nothing of it. proc(5) knows, by the name
that the file had on its mount. When that mount is gone (its daemon was killed), only the kernel's
count of those who have the media open knows.
"""

import contextlib
from collections.abc import AsyncIterator

import trio

from pmblk import PmblkError
from pmblk.namespace import memory_of
from pmblk.representations import KINDS
from pmblkd.mappers import stays_open, who_maps_media
from pmblkd.registry import Served

_HINT = 'close it, set dax = "off" for the namespace, and open it again'


@contextlib.asynccontextmanager
async def kept_out(served: Served, kind: str) -> AsyncIterator[None]:
    """Inside, nobody maps the media if `kind` keeps copies of them. Raises PmblkError."""
    if not KINDS[kind].keeps_copies:
        yield
        return
    served.dax_kept_out += 1  # before anybody is counted
    try:
        await _refuse_if_mapped(served, kind)
        yield
    finally:
        served.dax_kept_out -= 1


async def _refuse_if_mapped(served: Served, kind: str) -> None:
    problem = f"{kind} keeps copies of the media, and"
    if served.dax_opens:
        raise PmblkError(
            f"{served.name}: {problem} {served.dax_opens} open files may map them", hint=_HINT
        )
    # In a thread: the maps of a process that is busy with its memory can take their time.
    pids = await trio.to_thread.run_sync(_who_maps, served)
    if pids:
        raise PmblkError(
            f"{served.name}: {problem} process {pids[0]} maps them",
            hint=f"end it (of {len(pids)}), or have it unmap the file",
        )
    media = memory_of(served.namespace, "media to map").media
    if await trio.to_thread.run_sync(stays_open, media.is_open_elsewhere):
        raise PmblkError(
            f"{served.name}: {problem} others have its file open or mapped",
            hint="clients of a daemon that was killed, perhaps; end them",
        )


def _who_maps(served: Served) -> list[int]:
    media = memory_of(served.namespace, "media to map").media
    is_open = media.is_open_elsewhere()
    return who_maps_media(media.path, media.status(), is_open=is_open, mapped_as=served.mapped_as)
