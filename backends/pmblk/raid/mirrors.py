"""Levels 0, 1 and 10: every chunk in one place or several, read from one of them, written to all.

A copy that cannot be read is made up for by another one, and written back from it. Writes to one
chunk take turns, so that its copies never end up different. A member that does not take a write is
failed, durably, before the write counts, as long as another copy did.
"""

import errno
from collections.abc import Iterator, Sequence

import msgspec

from pmblk.raid.buffers import aligned, scratch
from pmblk.raid.devices import Devices, Range
from pmblk.raid.geometry import Geometry
from pmblk.raid.layout import Place, copies
from pmblk.raid.locks import RowLocks
from pmblk.raid.member import Hung, Request

BLOCK_BYTES = 4096


class Part(msgspec.Struct, frozen=True):
    """Bytes of one chunk of the array, from `start` on; `write`: the number of their write."""

    chunk: int
    start: int
    view: memoryview
    write: int


class Mirrors:
    """One for an array without parity."""

    def __init__(self, devices: Devices) -> None:
        self._devices = devices
        self._geometry = devices.geometry
        self.locks = self._locks = RowLocks()  # sweeps take them too

    def extend(self, geometry: Geometry) -> None:
        """Every chunk that there was stays where it was."""
        self._geometry = geometry

    # ---- reading

    async def read(self, offset: int, target: memoryview) -> None:
        """Whole blocks into aligned memory. Raises OSError (EIO) for what is lost."""
        direct: dict[int, list[Request]] = {}
        parts: dict[int, list[Part]] = {}
        for part in self._cut(offset, target, 0):
            place = self._first_readable(part)
            request = Request(self._devices.place(place.chunk, part.start), part.view)
            direct.setdefault(place.slot, []).append(request)
            parts.setdefault(place.slot, []).append(part)
        failures = await self._devices.read(direct)
        for slot in failures:
            for part in parts[slot]:
                async with self._locks.hold((part.chunk,)):
                    await self._read_some_copy(part)

    def _cut(self, offset: int, view: memoryview, write: int) -> Iterator[Part]:
        chunk_bytes = self._geometry.chunk_bytes
        position, end = offset, offset + len(view)
        while position < end:
            chunk, start = divmod(position, chunk_bytes)
            length = min(chunk_bytes - start, end - position)
            yield Part(chunk, start, view[position - offset : position - offset + length], write)
            position += length

    def _first_readable(self, part: Part) -> Place:
        places = self._readable(part)
        if not places:
            raise OSError(errno.EIO, f"every copy of chunk {part.chunk} is lost")
        return places[0]

    def _readable(self, part: Part) -> list[Place]:
        return [
            place
            for place in copies(self._geometry, part.chunk)
            if place.slot not in self._devices.unreadable(place.chunk)
        ]

    async def _read_some_copy(self, part: Part) -> None:
        """One copy after the other, under the chunk's lock; what could not be read is healed."""
        bad: list[Place] = []
        for place in self._readable(part):
            request = Request(self._devices.place(place.chunk, part.start), part.view)
            if not await self._devices.read({place.slot: [request]}):
                break
            bad.append(place)
        else:
            if len(part.view) <= BLOCK_BYTES:
                raise OSError(errno.EIO, f"no copy of chunk {part.chunk} can be read")
            for at in range(0, len(part.view), BLOCK_BYTES):  # perhaps not in the same blocks
                view = part.view[at : at + BLOCK_BYTES]
                await self._read_some_copy(Part(part.chunk, part.start + at, view, part.write))
            return
        heals = {
            place.slot: [Request(self._devices.place(place.chunk, part.start), part.view)]
            for place in bad
        }
        await self._devices.heal(heals)

    # ---- writing

    async def write(self, writes: Sequence[tuple[int, memoryview]]) -> list[OSError | None]:
        """Any bytes, in the order given where they overlap; what became of each of them."""
        errors: list[OSError | None] = [None] * len(writes)
        parts = [
            part
            for number, (offset, view) in enumerate(writes)
            for part in self._cut(offset, view, number)
        ]
        async with self._locks.hold({part.chunk for part in parts}):
            for layer in _layers(parts):
                for number, error in (await self._write_layer(layer)).items():
                    errors[number] = error
        return errors

    async def _write_layer(self, layer: Sequence[Part]) -> dict[int, OSError]:
        """Parts that do not share a block, to all copies; errors by the number of the write."""
        errors: dict[int, OSError] = {}
        batch: dict[int, list[Request]] = {}
        homes: dict[int, list[int]] = {}  # slots, by write
        for part in layer:
            try:
                part = await self._filled_up(part)
            except Hung:
                raise
            except OSError as error:
                errors[part.write] = error
                continue
            places = copies(self._geometry, part.chunk)
            there = [place for place in places if place.slot not in self._devices.missing]
            if not there:
                errors[part.write] = OSError(errno.EIO, f"chunk {part.chunk} has no member left")
            for place in there:
                request = Request(self._devices.place(place.chunk, part.start), part.view)
                batch.setdefault(place.slot, []).append(request)
                homes.setdefault(part.write, []).append(place.slot)
        failures = await self._devices.write(batch)
        stay = await self._devices.fail(failures)
        for number, slots in homes.items():
            for slot in stay.intersection(slots):
                errors[number] = failures[slot]
        return errors

    async def _filled_up(self, part: Part) -> Part:
        """The part in whole blocks: what it lacks of them is read."""
        start, end = part.start, part.start + len(part.view)
        first, last = start & -BLOCK_BYTES, -(-end // BLOCK_BYTES) * BLOCK_BYTES
        if (first, last) == (start, end):
            return Part(part.chunk, start, aligned(part.view), part.write)
        whole = Part(part.chunk, first, scratch(last - first), part.write)
        await self._read_some_copy(whole)
        whole.view[start - first : end - first] = part.view
        return whole

    # ---- zeroes

    async def zero(self, first: int, end: int) -> None:
        """Chunks `first` to `end`, in every copy on a member that is in. Raises OSError."""
        async with self._locks.hold(range(first, end)):
            chunks: dict[int, list[int]] = {}  # of members, by slot
            for chunk in range(first, end):
                for place in self._there(chunk):
                    chunks.setdefault(place.slot, []).append(place.chunk)
            failures = await self._devices.zero(
                {slot: list(self._joined(found)) for slot, found in chunks.items()}
            )
            for slot in await self._devices.fail(failures):
                raise failures[slot]

    def _there(self, chunk: int) -> list[Place]:
        """Where a chunk is written. Raises OSError (EIO) if that is nowhere."""
        places = copies(self._geometry, chunk)
        there = [place for place in places if place.slot not in self._devices.missing]
        if not there:
            raise OSError(errno.EIO, f"chunk {chunk} has no member left")
        return there

    def _joined(self, chunks: Sequence[int]) -> Iterator[Range]:
        """Chunks of a member as ranges of its device, those in a row as one."""
        for start, count in merged(chunks):
            yield self._devices.place(start), count * self._geometry.chunk_bytes


def _layers(parts: Sequence[Part]) -> list[list[Part]]:
    """Layers in which no block is met twice; of two writes to a block the later comes later."""
    layers: list[list[Part]] = []
    depths: dict[tuple[int, int], int] = {}  # of the last write to a block
    for part in parts:
        end = part.start + len(part.view)
        blocks = range(part.start // BLOCK_BYTES, -(-end // BLOCK_BYTES))
        depth = max((depths.get((part.chunk, block), -1) for block in blocks), default=-1) + 1
        depths.update({(part.chunk, block): depth for block in blocks})
        if depth == len(layers):
            layers.append([])
        layers[depth].append(part)
    return layers


def merged(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First and count of each run of numbers that follow each other."""
    ordered = sorted(numbers)
    start = 0
    for position in range(1, len(ordered) + 1):
        if position == len(ordered) or ordered[position] != ordered[position - 1] + 1:
            yield ordered[start], position - start
            start = position
