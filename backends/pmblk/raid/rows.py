"""Levels 4, 5 and 6: rows with parity, read and written through rounds of member I/O.

A read goes straight to where the data lie. What cannot be read is made from the rest of its row,
under the row's lock, and written back to a member that is there: that heals a bad sector. A batch
of writes takes the locks of all its rows, reads what `pmblk.raid.plan` asks for in one round,
computes, and writes data and parity in another, which the journal has recorded by then. A member
that does not take a write is failed, durably, before the write counts.
"""

import errno
from collections.abc import Iterable, Iterator, Mapping, Sequence

from pmblk.raid.buffers import aligned, buffer, numbers, scratch
from pmblk.raid.devices import Devices, Failures, Range, ranges_of
from pmblk.raid.doubts import Doubts
from pmblk.raid.geometry import Geometry
from pmblk.raid.journaling import Journaling
from pmblk.raid.layout import NONE, Stripes
from pmblk.raid.locks import RowLocks
from pmblk.raid.member import Hung, Request
from pmblk.raid.parity import combine
from pmblk.raid.plan import Piece, Segment, cut, plan
from pmblk.raid.recovery import TooManyLost, recipe
from pmblk.raid.row_parts import BLOCK_BYTES, Part, bytes_of, lay, within
from pmblk.ranges import slices

ZERO_RECORD_BYTES_MAX = 4 << 20
"""Of a member, made zero by one record: its checksums are computed while others wait."""

Batch = dict[int, list[Request]]


class Rows:
    """One for an array with parity. `journal`: closes its write hole; None: it stays open."""

    def __init__(self, devices: Devices, *, journal: Journaling | None = None) -> None:
        self._devices = devices
        self._journal = journal
        self._geometry = devices.geometry
        self._stripes = Stripes(devices.geometry)
        self.locks = self._locks = RowLocks()  # sweeps take them too
        self.doubts = Doubts(devices.geometry.stripe_bytes)

    def extend(self, geometry: Geometry) -> None:
        """Every chunk that there was stays where it was."""
        self._geometry = geometry

    # ---- reading

    async def read(self, offset: int, target: memoryview) -> None:
        """Whole blocks into aligned memory. Raises OSError (EIO) for what is lost."""
        rows: dict[int, list[Part]] = {}
        for row, part in self._cut(offset, target, 0):
            rows.setdefault(row, []).append(part)
        lacking = {row: parts for row, parts in rows.items() if self._lacks(row, parts)}
        await self._read_direct({row: parts for row, parts in rows.items() if row not in lacking})
        if lacking:
            async with self._locks.hold(lacking):
                await self._read_lacking(lacking)

    def _slot(self, row: int, part: Part) -> int:
        return self._stripes[row].data[part.piece.index]

    def _lacks(self, row: int, parts: Iterable[Part]) -> bool:
        unreadable = self._devices.unreadable(row)
        return any(self._slot(row, part) in unreadable for part in parts)

    async def _read_direct(self, rows: Mapping[int, Sequence[Part]]) -> None:
        """From where they lie; what fails is made from the rest of its row."""
        batch: Batch = {}
        for row, parts in rows.items():
            for part in parts:
                self._ask(batch, row, self._slot(row, part), part.piece.start, part.view)
        failures = await self._devices.read(batch)
        for row, parts in rows.items() if failures else ():
            for part in parts:
                if self._slot(row, part) in failures:
                    async with self._locks.hold((row,)):
                        await self._read_locked(row, part.piece, part.view)

    async def _read_lacking(self, rows: Mapping[int, Sequence[Part]]) -> None:
        """Rows of which a wanted chunk is with nobody, in one round; their locks are held.

        What is wanted anyway is read once, and serves to make the rest too.
        """
        batch: Batch = {}
        sums = [made for row, parts in rows.items() for made in self._plan_row(batch, row, parts)]
        if await self._devices.read(batch):
            for row, parts in rows.items():
                for part in parts:
                    await self._read_locked(row, part.piece, part.view)
            return
        for factors, sources, view in sums:
            combine([factors], [numbers(source) for source in sources], [numbers(view)])

    def _plan_row(
        self, batch: Batch, row: int, parts: Sequence[Part]
    ) -> Iterator[tuple[Sequence[int], Sequence[memoryview], memoryview]]:
        """Adds what is to be read of a row; yields the sum that makes each part nobody has.

        Raises OSError (EIO).
        """
        lost = self._devices.unreadable(row)
        there = {self._slot(row, part): part for part in parts}
        for slot, part in there.items():
            if slot not in lost:
                self._ask(batch, row, slot, part.piece.start, part.view)
        extra: dict[tuple[int, int, int], memoryview] = {}
        for slot, part in there.items():
            if slot not in lost:
                continue
            try:
                made = recipe(self._stripes[row], lost=lost, wanted=[slot])
            except TooManyLost as error:
                raise OSError(errno.EIO, f"row {row}: {error}") from error
            start, end = part.piece.start, part.piece.end
            sources = []
            for source in made.sources:
                view = within(there.get(source), start, end) or extra.get((source, start, end))
                if view is None:
                    view = extra[source, start, end] = scratch(end - start)
                    self._ask(batch, row, source, start, view)
                sources.append(view)
            yield made.rows[slot], sources, part.view

    def _ask(self, batch: Batch, row: int, slot: int, start: int, view: memoryview) -> None:
        batch.setdefault(slot, []).append(Request(self._devices.place(row, start), view))

    def _cut(self, offset: int, view: memoryview, write: int) -> Iterable[tuple[int, Part]]:
        position = 0
        geometry = self._geometry
        pieces = cut(
            offset,
            len(view),
            chunk_bytes=geometry.chunk_bytes,
            data_members=geometry.data_members,
        )
        for row, piece in pieces:
            length = piece.end - piece.start
            yield row, Part(piece, view[position : position + length], write)
            position += length

    async def _read_locked(self, row: int, piece: Piece, view: memoryview) -> None:
        """One piece, from its member or made from the rest of its row, whose lock is held."""
        slot = self._stripes[row].data[piece.index]
        place = self._devices.place(row, piece.start)
        readable = slot not in self._devices.unreadable(row)
        if readable and not await self._devices.read({slot: [Request(place, view)]}):
            return
        if readable and piece.end - piece.start > BLOCK_BYTES:  # a bad sector: the rest is good
            await self._read_blocks(row, piece, view)
            return
        try:
            found = await self._recover(row, piece.start, piece.end, slot)
        except Hung:
            raise
        except OSError:
            if piece.end - piece.start <= BLOCK_BYTES:
                raise
            await self._read_blocks(row, piece, view)  # bad sectors in other blocks each
            return
        view[:] = found
        if slot not in self._devices.unreadable(row):  # it is there, and may have a bad sector
            await self._devices.heal({slot: [Request(place, found)]})

    async def _read_blocks(self, row: int, piece: Piece, view: memoryview) -> None:
        for start, length in slices(piece.start, piece.end - piece.start, slice_bytes=BLOCK_BYTES):
            position = start - piece.start
            block = Piece(piece.index, start, start + length)
            await self._read_locked(row, block, view[position : position + length])

    async def _recover(self, row: int, start: int, end: int, wanted: int) -> memoryview:
        """Bytes `start` to `end` of the chunk in the slot `wanted`. Raises OSError (EIO)."""
        place = self._devices.place(row, start)
        blind = {wanted}
        while True:
            lost = blind | self._devices.unreadable(row)
            try:
                made = recipe(self._stripes[row], lost=lost, wanted=[wanted])
            except TooManyLost as error:
                raise OSError(errno.EIO, f"row {row}: {error}") from error
            sources = {slot: scratch(end - start) for slot in made.sources}
            failures = await self._devices.read(
                {slot: [Request(place, view)] for slot, view in sources.items()}
            )
            if not failures:
                break
            blind |= set(failures)
        output = scratch(end - start)
        combine(
            [made.rows[wanted]], [numbers(view) for view in sources.values()], [numbers(output)]
        )
        return output

    # ---- writing

    async def write(self, writes: Sequence[tuple[int, memoryview]]) -> list[OSError | None]:
        """Any bytes, in the order given where they overlap; what became of each of them."""
        errors: list[OSError | None] = [None] * len(writes)
        layers: list[dict[int, list[Part]]] = []
        rows: set[int] = set()
        for number, (offset, view) in enumerate(writes):
            for row, part in self._cut(offset, view, number):
                rows.add(row)
                lay(layers, row, part)
        async with self._locks.hold(rows):
            for layer in layers:
                for row, error in (await self._write_layer(layer)).items():
                    for part in layer[row]:
                        errors[part.write] = error
        return errors

    async def _write_layer(self, layer: Mapping[int, Sequence[Part]]) -> dict[int, OSError]:
        """Parts that do not share a block; errors by row."""
        errors: dict[int, OSError] = {}
        ready: dict[int, list[Part]] = {}
        for row, parts in layer.items():
            try:
                ready[row] = [await self._filled_up(row, part) for part in parts]
            except Hung:
                raise
            except OSError as error:
                errors[row] = error
        for some in self._batches(ready):
            errors.update(await self._update(some))
        return errors

    def _batches(
        self, parts: Mapping[int, Sequence[Part]]
    ) -> Iterable[Mapping[int, Sequence[Part]]]:
        """Rows that the journal can record together."""
        count = len(parts) or 1
        if self._journal is not None:
            count = self._journal.payload_bytes_max // self._geometry.chunk_bytes
        rows = list(parts)
        for first in range(0, len(rows), count):
            yield {row: parts[row] for row in rows[first : first + count]}

    async def _filled_up(self, row: int, part: Part) -> Part:
        """The part in whole blocks: what it lacks of them is read."""
        piece = part.piece
        start, end = piece.start & -BLOCK_BYTES, -(-piece.end // BLOCK_BYTES) * BLOCK_BYTES
        if (start, end) == (piece.start, piece.end):
            return Part(piece, aligned(part.view), part.write)
        view = scratch(end - start)
        whole = Piece(piece.index, start, end)
        await self._read_locked(row, whole, view)
        view[piece.start - start : piece.end - start] = part.view
        return Part(whole, view, part.write)

    async def _update(self, parts: Mapping[int, Sequence[Part]]) -> dict[int, OSError]:
        """Plan, read, compute and write some rows, all of them together; errors by row.

        What could not be read is planned around; what was not written is the end of its member.
        """
        errors: dict[int, OSError] = {}
        blind: set[int] = set()
        while True:
            planned: dict[int, list[Segment]] = {}
            for row in parts:
                try:
                    planned[row] = plan(
                        self._stripes[row],
                        [part.piece for part in parts[row]],
                        missing=self._devices.missing,
                        unreadable=blind | self._devices.unreadable(row),
                        trust_parity=row not in self.doubts,
                    )
                except TooManyLost as error:
                    errors[row] = OSError(errno.EIO, f"row {row}: {error}")
            olds, batch = self._old_chunks(planned)
            failures = await self._devices.read(batch)
            if not failures:
                break
            if len(parts) > 1:  # nobody says which row it was: each for itself
                for row in parts:
                    errors.update(await self._update({row: parts[row]}))
                return errors
            blind |= set(failures)
        batch = {}
        for row, segments in planned.items():
            for number, segment in enumerate(segments):
                self._add_stores(batch, row, segment, parts[row], olds.get((row, number), []))
        for failure in (await self._carry_out(batch, planned)).values():
            errors.update(dict.fromkeys(planned, failure))
        return errors

    async def _carry_out(self, batch: Batch, planned: Mapping[int, Sequence[Segment]]) -> Failures:
        """The round of writes; what failed of slots that stay in."""
        if self._journal is None or not batch:
            return await self._write_all(batch)
        full = {
            self._devices.place(row, segment.start)
            for row, segments in planned.items()
            for segment in segments
            if segment.way == "full"
        }
        try:
            ticket = await self._journal.record(batch, full)
        except OSError as error:
            return dict.fromkeys(batch, error)
        try:
            return await self._write_all(batch)
        finally:
            self._journal.written(ticket)

    async def _write_all(self, batch: Batch) -> Failures:
        failures = await self._devices.write(batch)
        stay = await self._devices.fail_and_lose(failures, lambda slot: self._summed(batch[slot]))
        return {slot: failures[slot] for slot in stay}

    def _summed(self, requests: Sequence[Request]) -> list[Range]:
        """Where they lie, in rows that have parity left: nothing is made of the others."""
        return [
            (offset, length)
            for offset, length in ranges_of(requests)
            if self._has_parity(self._devices.row_at(offset))
        ]

    def _has_parity(self, row: int) -> bool:
        stripe = self._stripes[row]
        return not {stripe.p, stripe.q} - {NONE} <= self._devices.unreadable(row)

    # ---- zeroes

    async def zero(self, first: int, end: int) -> None:
        """Rows `first` to `end`, on all members that are in: the parity of zeroes is zero.

        In the journal they are full stripes. Raises OSError.
        """
        step = end - first
        if self._journal is not None:
            bytes_max = min(self._journal.payload_bytes_max, ZERO_RECORD_BYTES_MAX)
            step = min(step, max(1, bytes_max // self._geometry.chunk_bytes))
        async with self._locks.hold(range(first, end)):
            for row in range(first, end, step):
                length = min(step, end - row) * self._geometry.chunk_bytes
                await self._zero_locked(self._devices.place(row), length)

    async def _zero_locked(self, offset: int, length: int) -> None:
        missing = self._devices.missing
        if len(missing) > self._geometry.parities:
            raise OSError(errno.EIO, f"{len(missing)} members are missing")
        present = set(range(self._geometry.members)) - missing
        if self._journal is None:
            await self._zero_all(present, offset, length)
            return
        zeroes = Request(offset, buffer(length))
        ticket = await self._journal.record({slot: [zeroes] for slot in present}, {offset})
        try:
            await self._zero_all(present, offset, length)
        finally:
            self._journal.written(ticket)

    async def _zero_all(self, slots: Iterable[int], offset: int, length: int) -> None:
        failures = await self._devices.zero({slot: [(offset, length)] for slot in slots})
        for slot in await self._devices.fail_and_lose(failures, lambda _: [(offset, length)]):
            raise failures[slot]

    # ---- parts of a write

    def _old_chunks(
        self, planned: Mapping[int, Sequence[Segment]]
    ) -> tuple[dict[tuple[int, int], list[memoryview]], Batch]:
        """Memory for what the segments read, and the round that fills it."""
        olds: dict[tuple[int, int], list[memoryview]] = {}
        batch: Batch = {}
        for row, segments in planned.items():
            for number, segment in enumerate(segments):
                olds[row, number] = views = [scratch(segment.length) for _ in segment.reads]
                place = self._devices.place(row, segment.start)
                for slot, view in zip(segment.reads, views, strict=True):
                    batch.setdefault(slot, []).append(Request(place, view))
        return olds, batch

    def _add_stores(
        self,
        batch: Batch,
        row: int,
        segment: Segment,
        parts: Sequence[Part],
        olds: Sequence[memoryview],
    ) -> None:
        """The new data and parity of a segment, as writes of its members."""
        place = self._devices.place(row, segment.start)
        new = [bytes_of(parts, index, segment) for index in segment.written]
        stripe = self._stripes[row]
        for index, view in zip(segment.written, new, strict=True):
            if stripe.data[index] in segment.stores:
                batch.setdefault(stripe.data[index], []).append(Request(place, view))
        if segment.parity:
            outputs = [scratch(segment.length) for _ in segment.parity]
            combine(
                list(segment.parity.values()),
                [numbers(view) for view in (*olds, *new)],
                [numbers(view) for view in outputs],
            )
            for slot, view in zip(segment.parity, outputs, strict=True):
                batch.setdefault(slot, []).append(Request(place, view))
