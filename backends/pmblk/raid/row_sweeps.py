"""Sweeps of levels 4, 5 and 6: a batch of rows is read in one round, and computed as a whole.

The fast way takes whole chunks of all members at once. Rows of a batch that fail to be read, or do
not fit, are looked at one by one. What is compared is what the redundancy says twice: with nobody
missing P and Q against the data; with one missing at level 6, the parity that making up for it does
not use. So after an unclean stop the rest of a row defines what is missing of it, by the same sums
as for a client, and any other parity is made to fit that.
"""

import errno
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from pmblk.raid.batches import Work, same
from pmblk.raid.buffers import buffer, numbers
from pmblk.raid.careful import Image, read_row
from pmblk.raid.devices import Failures
from pmblk.raid.findings import BLOCK_BYTES, spans
from pmblk.raid.layout import NONE, Stripe, Stripes
from pmblk.raid.locating import liar
from pmblk.raid.locks import RowLocks
from pmblk.raid.member import Request
from pmblk.raid.parity import Bytes, combine
from pmblk.raid.recovery import Recipe, TooManyLost, recipe


class RowSweeps(Work):
    def __init__(self, *arguments: object, locks: RowLocks, **options: object) -> None:
        super().__init__(*arguments, **options)  # type: ignore[arg-type]
        self._locks = locks
        self._stripes = Stripes(self.geometry)
        self._recipes: dict[tuple[int, frozenset[int]], Recipe] = {}
        self.units = self.geometry.member_chunks
        fills = self.kind in ("rebuild", "replace")
        self.unit_bytes = self.geometry.chunk_bytes if fills else self.geometry.stripe_bytes

    def units_of(self, offset: int, length: int) -> Iterable[tuple[int, int]]:
        stripe_bytes = self.geometry.stripe_bytes
        yield offset // stripe_bytes, -(-(offset + length) // stripe_bytes)

    async def step(self, first: int, last: int) -> None:
        async with self._locks.hold(range(first, last)):
            if self.kind == "rebuild":
                await self._rebuild(first, last)
            elif self.kind == "replace":
                await self._replace(first, last)
            else:
                await self._verify(first, last)

    # ---- batches

    def _recipe(self, row: int, gone: frozenset[int]) -> Recipe:
        """What is to be made of a row: the slot, or else what the redundancy says twice."""
        key = row % self.geometry.members, gone
        found = self._recipes.get(key)
        if found is None:
            stripe = self._stripes[row]
            if self.kind == "rebuild":
                found = _in_order(recipe(stripe, lost=gone, wanted=[self.slot]))
            else:
                surplus = _surplus(stripe, gone)
                found = recipe(stripe, lost={*gone, *surplus}, wanted=surplus)
            if len(self._recipes) > 4096:  # many slots came and went
                self._recipes.clear()
            self._recipes[key] = found
        return found

    def _gone(self, first: int, last: int) -> frozenset[int] | None:
        """Who cannot be read in these rows; None when it is not the same in all of them."""
        gone = self.devices.unreadable(first)
        return frozenset(gone) if gone == self.devices.unreadable(last - 1) else None

    async def _read_rows(self, first: int, rows: Mapping[int, Sequence[int]]) -> Failures:
        """Into the space of each slot, which starts with row `first`."""
        chunk_bytes = self.geometry.chunk_bytes
        batch = {
            slot: [
                Request(
                    self.devices.place(start),
                    self.space.view(slot)[
                        (start - first) * chunk_bytes : (end - first) * chunk_bytes
                    ],
                )
                for start, end in spans(numbers_of_rows)
            ]
            for slot, numbers_of_rows in rows.items()
        }
        return await self.read(batch)

    def _part(self, slot: int, start: int, end: int) -> Bytes:
        """Rows `start` to `end`, counted from the first of the batch."""
        chunk_bytes = self.geometry.chunk_bytes
        return self.space.numbers(slot)[start * chunk_bytes : end * chunk_bytes]

    # ---- one member is filled

    async def _rebuild(self, first: int, last: int) -> None:
        gone = self._gone(first, last)
        lost: list[tuple[int, int]] = []
        try:
            failed = gone is None or await self._make_batch(first, last, gone)
            if failed:
                for row in range(first, last):
                    lost += await self._make_row(row, first)
        except TooManyLost as error:
            raise OSError(errno.EIO, f"slot {self.slot} cannot be rebuilt: {error}") from error
        await self.fill([(first, last)], first=first, lost=lost)
        self.filled(last)

    async def _make_batch(self, first: int, last: int, gone: frozenset[int]) -> bool:
        """The slot's chunks, in its space. Whether it failed."""
        recipes = [self._recipe(row, gone) for row in range(first, last)]
        rows: dict[int, list[int]] = {}
        for row, made in enumerate(recipes, start=first):
            for slot in made.sources:
                rows.setdefault(slot, []).append(row)
        if await self._read_rows(first, rows):
            return True
        start = 0
        while start < len(recipes):
            made, end = recipes[start], start + 1
            while end < len(recipes) and recipes[end] == made:  # rows that are alike: as one
                end += 1
            combine(
                list(made.rows.values()),
                [self._part(slot, start, end) for slot in made.sources],
                [self._part(self.slot, start, end)],
            )
            start = end
        return False

    async def _make_row(self, row: int, first: int) -> list[tuple[int, int]]:
        """The same for one row, as well as it can be done; row and block of what is lost."""
        stripe = self._stripes[row]
        image = await read_row(self, row, stripe)
        made = recipe(stripe, lost=self.devices.unreadable(row), wanted=[self.slot])
        output = self._part(self.slot, row - first, row - first + 1)
        combine(
            list(made.rows.values()),
            [numbers(image.views[slot]) for slot in made.sources],
            [output],
        )
        return _without(output, image, row)

    async def _replace(self, first: int, last: int) -> None:
        lost: list[tuple[int, int]] = []
        if await self._read_rows(first, {self.slot: range(first, last)}):
            for row in range(first, last):
                image = await read_row(self, row, self._stripes[row])
                output = self._part(self.slot, row - first, row - first + 1)
                if self.slot not in image.views:
                    raise OSError(errno.ENODEV, f"the member in slot {self.slot} has left")
                output[:] = numbers(image.views[self.slot])
                lost += _without(output, image, row)
        await self.fill([(first, last)], first=first, lost=lost)

    # ---- all members are compared

    async def _verify(self, first: int, last: int) -> None:
        gone = self._gone(first, last)
        there = [slot for slot in range(self.geometry.members) if slot not in (gone or ())]
        try:
            if gone is None or await self._read_rows(
                first, {slot: range(first, last) for slot in there}
            ):
                for row in range(first, last):
                    await self._verify_row(row, await read_row(self, row, self._stripes[row]))
                return
            if self.geometry.parities == 1 and not gone and self._fits_as_a_whole(last - first):
                return
            await self._verify_batch(first, last, gone)
        except TooManyLost as error:
            raise OSError(errno.EIO, f"the array cannot be read: {error}") from error

    def _fits_as_a_whole(self, rows: int) -> bool:
        """The sum of all chunks is zero wherever the parity is, so one sum does for all rows."""
        members = self.geometry.members
        output = self.space.numbers(members)[: rows * self.geometry.chunk_bytes]
        others = [self._part(slot, 0, rows) for slot in range(1, members)]
        combine([[1] * (members - 1)], others, [output])
        return same(output, self._part(0, 0, rows))

    async def _verify_batch(self, first: int, last: int, gone: frozenset[int]) -> None:
        """Every row that was read: what its redundancy says twice, made and compared."""
        members, chunk_bytes = self.geometry.members, self.geometry.chunk_bytes
        batch: dict[int, list[Request]] = {}
        wrong = []
        for index, row in enumerate(range(first, last)):
            made = self._recipe(row, gone)
            if not made.rows:
                continue
            outputs = [
                self._part(members + number, index, index + 1) for number in range(len(made.rows))
            ]
            sources = [self._part(slot, index, index + 1) for slot in made.sources]
            combine(list(made.rows.values()), sources, outputs)
            for number, (slot, output) in enumerate(zip(made.rows, outputs, strict=True)):
                if same(output, self._part(slot, index, index + 1)):
                    continue
                if self.kind != "resync":
                    wrong.append((row, index))
                    break
                self.findings.mended += chunk_bytes // BLOCK_BYTES
                view = self.space.view(members + number)
                part = view[index * chunk_bytes : (index + 1) * chunk_bytes]
                batch.setdefault(slot, []).append(Request(self.devices.place(row), part))
        if batch:
            await self.write(batch)
        for row, index in wrong:
            own = slice(index * chunk_bytes, (index + 1) * chunk_bytes)
            views = {slot: self.space.view(slot)[own] for slot in range(members)}
            await self._verify_row(row, Image(views, set(), set()))

    async def _verify_row(self, row: int, image: Image) -> None:
        """One row, block by block: said, and mended if that is what the sweep is for."""
        gone = frozenset(self.devices.unreadable(row))
        made = self._recipe(row, gone)
        if not made.rows:
            return
        outputs = {slot: buffer(self.geometry.chunk_bytes) for slot in made.rows}
        combine(
            list(made.rows.values()),
            [numbers(image.views[slot]) for slot in made.sources],
            [numbers(view) for view in outputs.values()],
        )
        differences = {
            slot: numbers(view) ^ numbers(image.views[slot]) for slot, view in outputs.items()
        }
        wrong = _wrong_blocks(differences.values()) - image.lost
        verdicts: dict[int | None, list[int]] = {}
        for block in sorted(wrong):
            who = None if block in image.made else self._liar(row, gone, differences, block)
            verdicts.setdefault(who, []).append(block)
        for who, blocks in verdicts.items():
            await self._judge(row, who, blocks, image, outputs, differences)

    def _liar(
        self, row: int, gone: frozenset[int], differences: Mapping[int, Bytes], block: int
    ) -> int | None:
        stripe = self._stripes[row]
        if gone or stripe.q == NONE or self.kind == "resync":
            return None
        part = slice(block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES)
        return liar(stripe, differences[stripe.p][part], differences[stripe.q][part])

    async def _judge(
        self,
        row: int,
        who: int | None,
        blocks: Sequence[int],
        image: Image,
        outputs: Mapping[int, memoryview],
        differences: Mapping[int, Bytes],
    ) -> None:
        """Blocks of a row of which `who` is the liar; None: nobody can say, so parity is made."""
        stripe = self._stripes[row]
        right = dict(outputs)
        if who is not None and who in stripe.data:
            mended = buffer(self.geometry.chunk_bytes)
            np.bitwise_xor(numbers(image.views[who]), differences[stripe.p], out=numbers(mended))
            right = {who: mended}
        elif who is not None:
            right = {who: outputs[who]}
        batch: dict[int, list[Request]] = {}
        for first, last in spans(blocks):
            start, end = first * BLOCK_BYTES, last * BLOCK_BYTES
            place = self.devices.place(row, start)
            for slot, view in right.items():
                batch.setdefault(slot, []).append(Request(place, view[start:end]))
            if self.kind == "resync":  # that is how a crash leaves rows
                continue
            self.findings.mismatched += last - first
            if who is None:
                line = f"row {row}: {end - start} bytes do not fit at byte {place} of its members"
            else:
                line = f"{self.name(who, place)}: {end - start} bytes are wrong"
            self.findings.note(line)
        if self.kind != "check":
            self.findings.mended += len(blocks)
            await self.write(batch)


def _surplus(stripe: Stripe, gone: frozenset[int]) -> list[int]:
    """Slots of what the rest of the row says too."""
    order = (*stripe.data, *(slot for slot in (stripe.p, stripe.q) if slot != NONE))
    return [slot for slot in order if slot not in gone][len(stripe.data) :]


def _in_order(made: Recipe) -> Recipe:
    """The same sum of one slot, with its sources by slot: so rows of one sum are seen to be so."""
    ((slot, factors),) = made.rows.items()
    pairs = sorted(zip(made.sources, factors, strict=True))
    return Recipe(
        tuple(source for source, _ in pairs), {slot: tuple(factor for _, factor in pairs)}
    )


def _without(output: Bytes, image: Image, chunk: int) -> list[tuple[int, int]]:
    """No bytes for what is lost; chunk and block of it."""
    for block in image.lost:
        output[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES] = 0
    return [(chunk, block) for block in sorted(image.lost)]


def _wrong_blocks(differences: Iterable[Bytes]) -> set[int]:
    return {
        int(block)
        for one in differences
        for block in np.flatnonzero(one.reshape(-1, BLOCK_BYTES).any(axis=1))
    }
