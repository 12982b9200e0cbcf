"""Changing a namespace that is in use: its representation, its size. Clients see a pause, no error.

Both build what is new, quiesce at a request boundary, exchange, and resume. When something cannot
be had, the old state serves on, and a PmblkError says why. What is bad stays bad: poisoned pages
are handed over.
"""

import time

import msgspec
import trio

from pmblk import pages
from pmblk.errors import PmblkError
from pmblk.namespace import Namespace
from pmblk.representations import Representation, make


class Switched(msgspec.Struct, frozen=True, kw_only=True):
    """How long it took to build the new representation, and how long clients had to wait."""

    build_seconds: float
    pause_seconds: float


async def switch(namespace: Namespace, kind: str, options: Representation.Options) -> Switched:
    """Describe the memory of the namespace another way from now on.

    What takes long is done before the pause: the new representation is built in a thread, and what
    the old one holds back is flushed. Raises PmblkError, and then the old one serves on.
    """
    async with namespace.changing:
        begun = time.perf_counter()
        new = await trio.to_thread.run_sync(make, kind, namespace.media, options)
        built = time.perf_counter()
        try:
            await _flush(namespace)
            paused = time.perf_counter()
            async with namespace.quiesced():
                old = namespace.representation
                _hand_over_poison(old, new)
                namespace.install(new)
        except BaseException:
            if namespace.representation is not new:
                new.close()
            raise
        resumed = time.perf_counter()
        old.close()
    return Switched(build_seconds=built - begun, pause_seconds=resumed - paused)


async def resize(namespace: Namespace, size: int) -> None:
    """Grow or shrink the namespace and its file to `size` bytes; what is cut off is lost.

    Raises PmblkError, and then nothing has changed.
    """
    _check_size(namespace, size)
    async with namespace.changing, namespace.quiesced():
        media, old = namespace.media, namespace.representation
        before = media.size
        try:
            media.resize(size)
        except OSError as error:
            raise PmblkError(
                f"cannot make {media.path} {size} bytes long: {error.strerror}",
                hint="choose another size",
            ) from error
        try:
            new = make(old.kind, media, old.options)
        except PmblkError:
            media.resize(before)
            raise
        _hand_over_poison(old, new)
        namespace.install(new)
        old.close()


def _check_size(namespace: Namespace, size: int) -> None:
    if size <= 0 or size % namespace.lba_bytes:
        raise PmblkError(
            f"{namespace.name}: {size} bytes are no whole number of blocks",
            hint=f"choose a multiple of {namespace.lba_bytes}",
        )
    if namespace.read_only or namespace.media.reserve_bytes:
        why = "is read-only" if namespace.read_only else "has a reserve at its end"
        raise PmblkError(f"{namespace.name} {why}: its size is fixed")


async def _flush(namespace: Namespace) -> None:
    try:
        await namespace.flush()
    except OSError as error:
        raise PmblkError(str(error.strerror), hint="nothing was changed") from error


def _hand_over_poison(old: Representation, new: Representation) -> None:
    page_count = -(-new.media.size // pages.PAGE_BYTES)
    for page in old.poisoned():
        if page < page_count:
            new.poison(page, 1)
