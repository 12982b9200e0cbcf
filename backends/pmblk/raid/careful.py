"""One row, or one chunk and its copies, read block by block: what sweeps do when a batch fails.

What cannot be read is made from the rest, block by block, and written back, which heals a bad
sector. So two bad sectors in one row are no loss as long as they are not in the same blocks.
"""

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from pmblk.raid.batches import SECTOR_ERRORS, Work
from pmblk.raid.buffers import buffer, numbers
from pmblk.raid.findings import BLOCK_BYTES, spans
from pmblk.raid.layout import Place, Stripe
from pmblk.raid.member import Request
from pmblk.raid.parity import Bytes, combine
from pmblk.raid.recovery import TooManyLost, recipe

Bad = dict[int, dict[int, OSError]]
"""By block, by slot: why it could not be read."""


class Image(msgspec.Struct):
    """`views` are by slot, of everybody who can be read; `made` blocks were made up in some of
    them, and in `lost` blocks not even that could be done.
    """

    views: dict[int, memoryview]
    made: set[int]
    lost: set[int]


async def read_row(work: Work, row: int, stripe: Stripe) -> Image:
    """The row's lock is held. Raises OSError when a member is gone that cannot be made up for."""
    gone = work.devices.unreadable(row)
    chunks = {slot: row for slot in range(work.geometry.members) if slot not in gone}
    image, bad = await _read(work, chunks)
    heals: dict[int, list[int]] = {}
    for block, errors in sorted(bad.items()):
        try:
            made = recipe(stripe, lost=gone | set(errors), wanted=sorted(errors))
        except TooManyLost:
            _lose(work, image, block, chunks, errors)
            continue
        combine(
            list(made.rows.values()),
            [_block(image, slot, block) for slot in made.sources],
            [_block(image, slot, block) for slot in made.rows],
        )
        for slot in made.rows:
            heals.setdefault(slot, []).append(block)
    await _heal(work, image, chunks, heals)
    return image


async def read_copies(work: Work, places: Iterable[Place]) -> Image:
    """All copies of a chunk; its lock is held. Raises OSError when every one of them is gone."""
    chunks = dict(places)
    image, bad = await _read(work, chunks)
    heals: dict[int, list[int]] = {}
    for block, errors in sorted(bad.items()):
        good = next((slot for slot in chunks if slot not in errors), None)
        if good is None:
            _lose(work, image, block, chunks, errors)
            continue
        for slot in errors:
            _block(image, slot, block)[:] = _block(image, good, block)
            heals.setdefault(slot, []).append(block)
    await _heal(work, image, chunks, heals)
    return image


def _block(image: Image, slot: int, block: int) -> Bytes:
    start = block * BLOCK_BYTES
    return numbers(image.views[slot][start : start + BLOCK_BYTES])


async def _read(work: Work, chunks: Mapping[int, int]) -> tuple[Image, Bad]:
    """The chunk of each slot, and what could not be read of them."""
    chunk_bytes = work.geometry.chunk_bytes
    place = work.devices.place
    views = {slot: buffer(chunk_bytes) for slot in chunks}
    failures = await work.devices.read(
        {slot: [Request(place(chunks[slot]), view)] for slot, view in views.items()}
    )
    bad: Bad = {}
    for slot in failures:
        views[slot] = buffer(chunk_bytes)  # a member that hangs may still write to the old one
        for block in range(chunk_bytes // BLOCK_BYTES):
            start = block * BLOCK_BYTES
            part = buffer(BLOCK_BYTES)
            failed = await work.devices.read({slot: [Request(place(chunks[slot], start), part)]})
            if not failed:
                views[slot][start : start + BLOCK_BYTES] = part
            elif failed[slot].errno in SECTOR_ERRORS:
                bad.setdefault(block, {})[slot] = failed[slot]
            else:  # it is gone, with all its blocks
                for one in range(chunk_bytes // BLOCK_BYTES):
                    bad.setdefault(one, {})[slot] = failed[slot]
                break
    return Image(views, set(bad), set()), bad


def _lose(
    work: Work,
    image: Image,
    block: int,
    chunks: Mapping[int, int],
    errors: Mapping[int, OSError],
) -> None:
    """A block that nobody can read or make. A member that is gone may come back: no loss yet."""
    for error in errors.values():
        if error.errno not in SECTOR_ERRORS:
            raise error
    image.lost.add(block)
    work.findings.lost += len(errors)
    where = work.devices.place
    names = [work.name(slot, where(chunks[slot], block * BLOCK_BYTES)) for slot in errors]
    work.findings.note(f"{BLOCK_BYTES} bytes lost: {', '.join(names)}")


async def _heal(
    work: Work, image: Image, chunks: Mapping[int, int], heals: Mapping[int, Sequence[int]]
) -> None:
    batch: dict[int, list[Request]] = {}
    for slot, blocks in heals.items():
        work.findings.healed += len(blocks)
        for first, last in spans(blocks):
            start, end = first * BLOCK_BYTES, last * BLOCK_BYTES
            place = work.devices.place(chunks[slot], start)
            work.findings.note(f"{end - start} bytes made up for: {work.name(slot, place)}")
            batch.setdefault(slot, []).append(Request(place, image.views[slot][start:end]))
    if batch:
        await work.write(batch)
