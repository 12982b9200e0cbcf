"""Changing a namespace that is in use: its representation, its size. Clients see a pause, no error.

Both build what is new, quiesce at a request boundary, exchange, and resume. When something cannot
be had, the old state serves on, and a PmblkError says why. What is bad stays bad: poisoned pages
are handed over.
"""

import time

import msgspec
import trio

from pmblk import page_runs
from pmblk.errors import PmblkError
from pmblk.namespace import Namespace
from pmblk.pages import PAGE_SHIFT
from pmblk.representations import Representation, make

_SIZE_MAX = (1 << 63) - 1  # off_t


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
            try:
                new = make(old.kind, media, old.options)
                _hand_over_poison(old, new)
                media.trim()
            except (PmblkError, OSError):
                media.resize(before)
                media.trim()
                raise
        except OSError as error:
            raise PmblkError(
                f"cannot make {media.path} {size} bytes long: {error.strerror}",
                hint="choose another size",
            ) from error
        namespace.install(new)
        old.close()


def _check_size(namespace: Namespace, size: int) -> None:
    if not 0 < size <= _SIZE_MAX or size % namespace.lba_bytes:
        raise PmblkError(
            f"{namespace.name}: {size} bytes are no whole number of blocks that a file can have",
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
    """By runs, and with memory: a new size may have made a hole of a last page. Raises PmblkError.

    What was reserved and never written is one to lseek, and a hole reads as zeroes without a fault.
    """
    media = new.media
    bad = [page for page in old.poisoned() if page << PAGE_SHIFT < media.size]
    try:
        for offset, length in page_runs.extents(bad):
            if not media.read_only:
                media.reserve(offset, min(length, media.size - offset))
            new.poison(offset >> PAGE_SHIFT, length >> PAGE_SHIFT)
    except OSError as error:
        raise PmblkError(
            f"{new.kind} has no room to remember bad pages: {error.strerror}",
            hint=f"make space on the file system of {media.path}",
        ) from error
