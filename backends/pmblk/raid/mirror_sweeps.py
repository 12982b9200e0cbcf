"""Sweeps of levels 0, 1 and 10: a batch of chunks is read in one round, every copy of it.

Copies are compared as a whole; where they differ, block by block. Of three copies or more the
majority is right; of two nobody can say, and the first one is taken, as md does.
"""

import errno
from collections.abc import Iterable, Mapping, Sequence

from pmblk.raid.batches import Work, same
from pmblk.raid.buffers import numbers
from pmblk.raid.careful import Image, read_copies
from pmblk.raid.findings import BLOCK_BYTES, spans
from pmblk.raid.layout import Place, chunk_at, copies
from pmblk.raid.locks import RowLocks
from pmblk.raid.member import Request


class MirrorSweeps(Work):
    def __init__(self, *arguments: object, locks: RowLocks, **options: object) -> None:
        super().__init__(*arguments, **options)  # type: ignore[arg-type]
        self._locks = locks
        self.unit_bytes = self.geometry.chunk_bytes
        self._fills = self.kind in ("rebuild", "replace")
        self.units = self.geometry.member_chunks if self._fills else self.geometry.chunks

    def units_of(self, offset: int, length: int) -> Iterable[tuple[int, int]]:
        first, last = offset // self.unit_bytes, -(-(offset + length) // self.unit_bytes)
        if not self._fills:
            yield first, last
            return
        # Copy by copy, the chunks of the array lie in rows that only go up.
        ends = copies(self.geometry, first), copies(self.geometry, last - 1)
        for start, end in zip(*ends, strict=True):
            yield start.chunk, end.chunk + 1

    async def step(self, first: int, last: int) -> None:
        if self._fills:
            await self._fill_step(first, last)
        elif not (self.kind == "resync" and self.geometry.level == 0):
            async with self._locks.hold(range(first, last)):
                await self._verify(first, last)

    # ---- one member is filled

    async def _fill_step(self, first: int, last: int) -> None:
        chunks: dict[int, int] = {}  # of the array, by the member's
        for row in range(first, last):
            chunk = chunk_at(self.geometry, Place(self.slot, row))
            if chunk is not None:
                chunks[row] = chunk
        async with self._locks.hold(set(chunks.values())):
            lost: list[tuple[int, int]] = []
            if chunks and await self._make_batch(chunks, first):
                for row, chunk in chunks.items():
                    lost += await self._make_chunk(row, chunk, first)
            await self.fill(spans(list(chunks)), first=first, lost=lost)
            if self.kind == "rebuild":
                self.filled(last)

    async def _make_batch(self, chunks: Mapping[int, int], first: int) -> bool:
        """Every chunk from its first readable copy. Whether it failed."""
        view = self.space.view(self.slot)
        reads = _Reads(self)
        for row, chunk in chunks.items():
            reads.add(self._source(row, chunk), 0, row - first)
        return bool(await self.read(reads.batch({0: view})))

    def _source(self, row: int, chunk: int) -> Place:
        if self.kind == "replace":
            return Place(self.slot, row)
        places = self._readable(chunk)
        if not places:
            raise OSError(errno.EIO, f"slot {self.slot} cannot be rebuilt: chunk {chunk} is lost")
        return places[0]

    def _readable(self, chunk: int) -> list[Place]:
        return [
            place
            for place in copies(self.geometry, chunk)
            if place.slot not in self.devices.unreadable(place.chunk)
        ]

    async def _make_chunk(self, row: int, chunk: int, first: int) -> list[tuple[int, int]]:
        """The same for one, as well as it can be done; row and block of what is lost."""
        source = self._source(row, chunk)
        image = await read_copies(self, self._readable(chunk))
        start = (row - first) * self.unit_bytes
        output = self.space.view(self.slot)[start : start + self.unit_bytes]
        output[:] = image.views[source.slot]
        for block in image.lost:
            output[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES] = bytes(BLOCK_BYTES)
        return [(row, block) for block in sorted(image.lost)]

    # ---- all copies are compared

    async def _verify(self, first: int, last: int) -> None:
        found = {chunk: self._readable(chunk) for chunk in range(first, last)}
        reads = _Reads(self)
        for chunk, places in found.items():
            if not places:
                raise OSError(errno.EIO, f"every copy of chunk {chunk} is lost")
            for number, place in enumerate(places):
                reads.add(place, number, chunk - first)
        most = max(map(len, found.values()))
        views = {number: self.space.view(number) for number in range(most)}
        if await self.read(reads.batch(views)):
            for chunk in found:
                image = await read_copies(self, self._readable(chunk))
                await self._verify_chunk(chunk, image)
            return
        if all(len(places) == most for places in found.values()) and self._same(
            0, last - first, most
        ):
            return
        for chunk, places in found.items():
            index = chunk - first
            if not self._same(index, index + 1, len(places)):
                part = slice(index * self.unit_bytes, (index + 1) * self.unit_bytes)
                own = {place.slot: views[number][part] for number, place in enumerate(places)}
                await self._verify_chunk(chunk, Image(own, set(), set()))

    def _same(self, start: int, end: int, count: int) -> bool:
        """Whether these chunks of the batch are the same in all copies."""
        part = slice(start * self.unit_bytes, end * self.unit_bytes)
        one = self.space.numbers(0)[part]
        return all(same(one, self.space.numbers(number)[part]) for number in range(1, count))

    async def _verify_chunk(self, chunk: int, image: Image) -> None:
        """One chunk, block by block: said, and mended if that is what the sweep is for."""
        places = {
            place.slot: place
            for place in copies(self.geometry, chunk)
            if place.slot in image.views and self.devices.members[place.slot] is not None
        }
        batch: dict[int, list[Request]] = {}
        wrong: dict[tuple[int, ...], list[int]] = {}
        for block in range(self.unit_bytes // BLOCK_BYTES):
            part = slice(block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES)
            parts = {slot: image.views[slot][part] for slot in places}
            right, liars = self._judge(parts)
            if not liars or block in image.lost:
                continue
            wrong.setdefault(liars, []).append(block)
            for slot in liars:
                place = self.devices.place(places[slot].chunk, block * BLOCK_BYTES)
                batch.setdefault(slot, []).append(Request(place, parts[right]))
        if self.kind != "resync":
            for liars, blocks in wrong.items():
                self._tell(chunk, liars, blocks, places)
        if batch and self.kind != "check":
            self.findings.mended += sum(map(len, batch.values()))
            await self.write(batch)

    def _judge(self, parts: Mapping[int, memoryview]) -> tuple[int, tuple[int, ...]]:
        """Whose block is right, and whose are not."""
        groups: list[list[int]] = []
        for slot, part in parts.items():
            for group in groups:
                if same(numbers(parts[group[0]]), numbers(part)):
                    group.append(slot)
                    break
            else:
                groups.append([slot])
        best = groups[0] if self.kind == "resync" else max(groups, key=len)
        return best[0], tuple(slot for slot in parts if slot not in best)

    def _tell(
        self, chunk: int, liars: Sequence[int], blocks: Sequence[int], places: Mapping[int, Place]
    ) -> None:
        certain = len(liars) < len(places) - len(liars)
        self.findings.mismatched += len(blocks) * len(liars)
        for first, last in spans(blocks):
            names = [
                self.name(slot, self.devices.place(places[slot].chunk, first * BLOCK_BYTES))
                for slot in (liars if certain else places)
            ]
            what = "wrong, by most copies" if certain else "not the same"
            self.findings.note(f"{', '.join(names)}: {(last - first) * BLOCK_BYTES} bytes {what}")


class _Reads:
    """Chunks of members into buffers by number, joined where both go on."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._runs: dict[tuple[int, int], list[list[int]]] = {}

    def add(self, place: Place, number: int, index: int) -> None:
        """A chunk to that place, counted in chunks, of buffer `number`."""
        runs = self._runs.setdefault((place.slot, number), [])
        if runs:
            row, start, length = runs[-1]
            if (row + length, start + length) == (place.chunk, index):
                runs[-1][2] += 1
                return
        runs.append([place.chunk, index, 1])

    def batch(self, views: Mapping[int, memoryview]) -> dict[int, list[Request]]:
        chunk_bytes = self._work.geometry.chunk_bytes
        batch: dict[int, list[Request]] = {}
        for (slot, number), runs in self._runs.items():
            for row, start, length in runs:
                part = views[number][start * chunk_bytes : (start + length) * chunk_bytes]
                batch.setdefault(slot, []).append(Request(self._work.devices.place(row), part))
        return batch
