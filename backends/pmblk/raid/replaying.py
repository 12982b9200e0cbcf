"""What a start does with the journal: finds what was recorded, and puts it in place.

Each log is read once from its start, and every byte of it checked, before anything is written. Then
each block that a whole transaction speaks of gets the newest bytes that its member's log has of it.
Of full stripes there are only checksums: a block row (the blocks at one place of all members) where
some do not fit is made whole from the others, if those are enough, or else its parity is made anew
from whatever data there are. If data are missing then too, nobody can say any more what they were.

All of it may be done again, after a crash in it too: the log stays as it is meanwhile. What was
written is not flushed here; the log is what is durable until its session ends.
"""

import errno
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

import msgspec
import trio

from pmblk.checksum import crc32c
from pmblk.raid.buffers import buffer, numbers
from pmblk.raid.devices import Devices, Failures
from pmblk.raid.journal import (
    BLOCK_BYTES,
    LOG_OFFSET,
    MARK_SLOTS,
    Decision,
    Mark,
    Record,
    Settled,
    decide,
    decode,
    decode_mark,
    header_bytes_of,
    settle,
)
from pmblk.raid.layout import NONE, Stripe, Stripes
from pmblk.raid.member import Request
from pmblk.raid.parity import combine
from pmblk.raid.recovery import TooManyLost, recipe

WINDOW_BYTES = 1 << 20
NOTHING = Mark(0, b"")


class Lost(NamedTuple):
    """Bytes of a member's device, parity, that must not be used: what they would make up for a
    missing member is wrong. Once they are made unreadable, it reads as EIO until it is rewritten.
    """

    slot: int
    offset: int
    length: int


class JournalReplay(msgspec.Struct, frozen=True):
    """What became of the transactions that were found, and how many blocks were written.

    `mended` counts block rows of torn full stripes that are whole again.
    """

    replayed: int
    ignored: int
    blocks: int
    mended: int
    lost: tuple[Lost, ...]


class Replaying:
    """One for one start. `mark`: the newest there is. `logged`: its log is not empty."""

    def __init__(self, devices: Devices, *, offset: int, log_bytes: int) -> None:
        self.mark = NOTHING
        self.logged = False
        self._devices = devices
        self._stripes = Stripes(devices.geometry)
        self._offset = offset
        self._log_bytes = log_bytes
        self._blocks = 0
        self._mended = 0
        self._lost: list[Lost] = []

    async def run(self) -> JournalReplay:
        """Raises OSError for what the array cannot be without."""
        self.mark = max([NOTHING, *await self._marks()])
        decision, settled = await self._decided()
        self.logged = bool(decision.whole or decision.ignored)
        await self._put_in_place(settled)
        await self._check_full_stripes(settled)
        return JournalReplay(
            replayed=len(decision.whole),
            ignored=len(decision.ignored),
            blocks=self._blocks,
            mended=self._mended,
            lost=tuple(_joined(self._lost)),
        )

    def _there(self) -> list[int]:
        return [slot for slot, one in enumerate(self._devices.members) if one is not None]

    async def _must(self, failures: Mapping[int, OSError]) -> None:
        for slot in await self._devices.fail(failures):
            raise failures[slot]

    # ---- finding

    async def _marks(self) -> list[Mark]:
        views = {slot: buffer(MARK_SLOTS * BLOCK_BYTES) for slot in self._there()}
        requests = {slot: [Request(self._offset, view)] for slot, view in views.items()}
        await self._must(await self._devices.read(requests))
        blocks = [
            bytes(view[start : start + BLOCK_BYTES])
            for view in views.values()
            for start in range(0, len(view), BLOCK_BYTES)
        ]
        return [mark for mark in map(decode_mark, blocks) if mark is not None]

    async def _decided(self) -> tuple[Decision, Settled]:
        """A member whose log is damaged is out, and it is decided again without it."""
        logs: dict[int, list[Record]] = {}
        failures: dict[int, OSError] = {}

        async def one(slot: int) -> None:
            try:
                logs[slot] = await self._log_of(slot)
            except OSError as error:
                failures[slot] = error

        async with trio.open_nursery() as nursery:
            for slot in self._there():
                nursery.start_soon(one, slot)
        await self._must(failures)
        while True:
            present = {slot: logs[slot] for slot in self._there()}
            decision = decide(present)
            if not decision.damaged:
                return decision, settle(present, set(decision.whole))
            error = OSError(errno.EIO, "its journal is damaged")
            await self._must(dict.fromkeys(decision.damaged, error))

    async def _log_of(self, slot: int) -> list[Record]:
        """The records of the session, up to where they end. Raises OSError."""
        window = _Window(self._devices, slot, self._offset + LOG_OFFSET, self._log_bytes)
        records: list[Record] = []
        while True:
            record = await self._next_record(window, records[-1] if records else None)
            if record is None or record.slot != slot:
                return records
            records.append(record)

    async def _next_record(self, window: "_Window", last: Record | None) -> Record | None:
        position = last.position + last.length if last else 0
        block = await window.read(position, BLOCK_BYTES)
        header_bytes = block and header_bytes_of(block, self.mark.nonce)
        header = header_bytes and await window.read(position, header_bytes)
        record = decode(header, position) if header else None
        if record is None or (last is not None and record.sequence <= last.sequence):
            return None
        for place, piece in record.payload():
            content = await window.read(place, piece.length)
            if content is None or not piece.fits(content):
                return None
        return record

    # ---- what is in the logs

    async def _put_in_place(self, settled: Settled) -> None:
        failures: dict[int, OSError] = {}

        async def one(slot: int, places: Mapping[int, int]) -> None:
            failures.update(await self._put(slot, places))

        async with trio.open_nursery() as nursery:
            for slot, blocks in settled.items():
                places = {
                    offset: source.position
                    for offset, source in blocks.items()
                    if source.position is not None
                }
                nursery.start_soon(one, slot, places)
        await self._must(failures)

    async def _put(self, slot: int, places: Mapping[int, int]) -> Failures:
        """Blocks by their offset on the device, from where they are in the log."""
        log = self._offset + LOG_OFFSET
        for offset, length in _runs(places, lambda one: places[one] - one):
            view = buffer(length)
            source, target = Request(log + places[offset], view), Request(offset, view)
            failures = await self._devices.read({slot: [source]})
            failures = failures or await self._devices.write({slot: [target]})
            if failures:
                return failures
            self._blocks += length // BLOCK_BYTES
        return {}

    # ---- full stripes, of which there are checksums

    async def _check_full_stripes(self, settled: Settled) -> None:
        torn: dict[int, set[int]] = {}  # slots that do not fit, by the offset of a block row
        for slot in self._there():
            sums = {
                offset: source.crc
                for offset, source in settled[slot].items()
                if source.position is None
            }
            for offset in await self._unfit(slot, sums):
                torn.setdefault(offset, set()).add(slot)
        for offset, unfit in sorted(torn.items()):
            spoken_of = {slot for slot, blocks in settled.items() if offset in blocks}
            await self._mend(offset, unfit, spoken_of)

    async def _unfit(self, slot: int, sums: Mapping[int, int]) -> list[int]:
        """Offsets of the blocks that cannot be read, or have another checksum."""
        unfit = []
        for offset, length in _runs(sums, lambda _: 0):
            view = buffer(length)
            if await self._devices.read({slot: [Request(offset, view)]}):
                unfit += await self._unfit_one_by_one(slot, offset, length, sums)
                continue
            for start in range(0, length, BLOCK_BYTES):
                if crc32c(bytes(view[start : start + BLOCK_BYTES])) != sums[offset + start]:
                    unfit.append(offset + start)
        return unfit

    async def _unfit_one_by_one(
        self, slot: int, offset: int, length: int, sums: Mapping[int, int]
    ) -> list[int]:
        unfit = []
        for place in range(offset, offset + length, BLOCK_BYTES):
            view = buffer(BLOCK_BYTES)
            failed = await self._devices.read({slot: [Request(place, view)]})
            if failed or crc32c(bytes(view)) != sums[place]:
                unfit.append(place)
        return unfit

    async def _mend(self, offset: int, unfit: set[int], spoken_of: set[int]) -> None:
        """One block row. Whoever fits has what was written last; the others follow from them."""
        row = self._devices.row_at(offset)
        stripe = self._stripes[row]
        away = self._devices.unreadable(row)
        blind = unfit | away | ({*stripe.data, *_parities(stripe)} - spoken_of)
        wanted = unfit - self._devices.missing
        if await self._made(stripe, offset, blind, wanted):
            self._mended += 1
            return
        if not away & {*stripe.data}:
            wanted = {*_parities(stripe)} - self._devices.missing
            if await self._made(stripe, offset, {*_parities(stripe)}, wanted):
                self._mended += 1
                return
        self._lost += [
            Lost(slot, offset, BLOCK_BYTES)
            for slot in _parities(stripe)
            if slot not in self._devices.missing
        ]

    async def _made(
        self, stripe: Stripe, offset: int, blind: Collection[int], wanted: Collection[int]
    ) -> bool:
        """The blocks of the slots `wanted` are made of those that are not in `blind`, and put
        there; False: those are not enough.
        """
        if not wanted:  # parity that nobody has
            return True
        try:
            made = recipe(stripe, lost=blind, wanted=wanted)
        except TooManyLost:
            return False
        sources = {slot: buffer(BLOCK_BYTES) for slot in made.sources}
        outputs = {slot: buffer(BLOCK_BYTES) for slot in made.rows}
        if await self._devices.read(
            {slot: [Request(offset, view)] for slot, view in sources.items()}
        ):
            return False
        combine(
            list(made.rows.values()),
            [numbers(view) for view in sources.values()],
            [numbers(view) for view in outputs.values()],
        )
        await self._must(
            await self._devices.write(
                {slot: [Request(offset, view)] for slot, view in outputs.items()}
            )
        )
        self._blocks += len(outputs)
        return True


class _Window:
    """A log read forward, a large piece at a time."""

    def __init__(self, devices: Devices, slot: int, offset: int, length: int) -> None:
        self._devices = devices
        self._slot = slot
        self._offset = offset
        self._length = length
        self._start = 0
        self._view = memoryview(b"")

    async def read(self, position: int, length: int) -> bytes | None:
        """None: it is not within the log. Raises OSError."""
        if position + length > self._length:
            return None
        if not self._start <= position <= position + length <= self._start + len(self._view):
            await self._move(position, length)
        start = position - self._start
        return bytes(self._view[start : start + length])

    async def _move(self, position: int, length: int) -> None:
        """Further than is asked for, if all of that can be read."""
        ahead = min(max(length, WINDOW_BYTES), self._length - position)
        failures = await self._fill(position, ahead) and await self._fill(position, length)
        if failures:
            raise failures[self._slot]

    async def _fill(self, position: int, length: int) -> Failures:
        view = buffer(length)
        request = Request(self._offset + position, view)
        failures = await self._devices.read({self._slot: [request]})
        if not failures:
            self._start, self._view = position, view
        return failures


def _parities(stripe: Stripe) -> Iterator[int]:
    yield from (slot for slot in (stripe.p, stripe.q) if slot != NONE)


def _runs(offsets: Iterable[int], key: Callable[[int], int]) -> Iterator[tuple[int, int]]:
    """Offset and length of blocks that follow each other and have the same key; none too long."""
    start = end = -1
    for offset in sorted(offsets):
        if offset == end and key(offset) == key(start) and end - start < WINDOW_BYTES:
            end += BLOCK_BYTES
            continue
        if end > start:
            yield start, end - start
        start, end = offset, offset + BLOCK_BYTES
    if end > start:
        yield start, end - start


def _joined(lost: Iterable[Lost]) -> Iterator[Lost]:
    """Neighbours are one."""
    places: dict[int, list[int]] = {}
    for slot, offset, _ in lost:
        places.setdefault(slot, []).append(offset)
    for slot, offsets in sorted(places.items()):
        for offset, length in _runs(offsets, lambda _: 0):
            yield Lost(slot, offset, length)
