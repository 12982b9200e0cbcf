"""Copying a namespace to a file or a block device, straight from the memory it is in.

Each piece is held like a read, and the views that the representation yields are what the device
writes from (O_DIRECT): no byte is copied on the way, but where the representation itself copies.
Clients go on meanwhile, so this is what `dd` of a live disk is: a moment in time only when nobody
writes.
"""

import errno
import mmap
from collections.abc import Sequence

import msgspec
import trio

from pmblk.errors import PmblkError
from pmblk.media.target import Target
from pmblk.namespace import RESTORE, Namespace
from pmblk.nvme.command import READ, Command, Hole, Segment
from pmblk.ranges import slices

PIECE_BYTES = 1 << 20

_ZEROES = memoryview(mmap.mmap(-1, PIECE_BYTES))  # page aligned, as O_DIRECT wants it


class Saved(msgspec.Struct, frozen=True, kw_only=True):
    """`copied_bytes`: by the representation, while this went on."""

    written_bytes: int
    hole_bytes: int
    copied_bytes: int
    seconds: float


async def save(namespace: Namespace, target: Target) -> Saved:
    """All of the namespace, as large as it is now, to the start of `target`, durably.

    Holes are skipped in a file, which is empty at first, and written as zeroes to a device. Raises
    PmblkError, and then `target` is not finished. When it is cancelled, a write that is under way
    is left to itself: the process is about to end.
    """
    begun = trio.current_time()
    size = namespace.size
    holes = copied = 0
    try:
        for offset, length in slices(0, size, slice_bytes=PIECE_BYTES):
            representation = namespace.representation
            before = representation.costs().bytes_copied
            holes += await _save_piece(namespace, target, offset, length)
            _refuse_failed(namespace)  # before `finish`: what was written may be made up
            if namespace.representation is representation:
                copied += representation.costs().bytes_copied - before
        await trio.to_thread.run_sync(target.finish, size, abandon_on_cancel=True)
    except OSError as error:
        _refuse_failed(namespace)  # EFAULT is about its memory, not about the target
        raise PmblkError(
            f"{namespace.name} is not saved: {target.path}: {error.strerror}",
            hint=_hint(error),
        ) from error
    return Saved(
        written_bytes=size - (holes if target.is_file else 0),
        hole_bytes=holes,
        copied_bytes=copied,
        seconds=trio.current_time() - begun,
    )


async def _save_piece(namespace: Namespace, target: Target, offset: int, length: int) -> int:
    """One piece; the bytes of it that are holes."""
    read = Command(READ, 0, offset, length)
    waiting = namespace.execute((read,))
    if waiting:
        await namespace.complete(waiting)
    try:
        if read.status:
            _refuse_failed(namespace)
            raise PmblkError(
                f"{namespace.name} is not saved: it cannot be read between {offset} "
                f"and {offset + length}",
                hint="write, zero or discard what is poisoned there",
            )
        segments = read.segments or ()
        await trio.to_thread.run_sync(_write, target, offset, segments, abandon_on_cancel=True)
    except OSError:
        namespace.examine(view for view in segments if isinstance(view, memoryview))
        raise
    finally:
        namespace.release((read,))
    return sum(segment.length for segment in segments if isinstance(segment, Hole))


def _refuse_failed(namespace: Namespace) -> None:
    """Raises PmblkError."""
    if namespace.examine():
        raise PmblkError(f"{namespace.name} is not saved: {namespace.failure()}", hint=RESTORE)


def _write(target: Target, offset: int, segments: "Sequence[Segment]") -> None:
    """In a worker thread. Neighbouring views go out together."""
    views: list[memoryview] = []
    start = position = offset
    for segment in segments:
        if isinstance(segment, Hole) and target.is_file:
            target.write(start, views)
            views, position = [], position + segment.length
            start = position
            continue
        view = _ZEROES[: segment.length] if isinstance(segment, Hole) else segment
        views.append(view)
        position += len(view)
    target.write(start, views)


def _hint(error: OSError) -> str:
    if error.errno == errno.EINVAL:
        return "its blocks are larger than the namespace's, or it has no O_DIRECT"
    return "what was written so far is no copy"
