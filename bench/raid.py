"""Arrays over members in memory: what planning, parity and member I/O reach, in one process.

Every contender is an array over the same five files on tmpfs, in an area of its own of them. The
loads and targets are in raid_rows.py, and how it is run in benchmark.py. Everything runs on one
CPU.

    python -m bench.raid --seconds 1 --rounds 1 --rows write --output /tmp/quick.md
"""

import argparse
import contextlib
import os
import random
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path

import trio

from bench import benchmark, raid_report
from bench.benchmark import Benchmark
from bench.raid_rows import DEGRADED, RAID0, RAID5, ROWS, Cost, Results, Row
from bench.samples import Sample
from pmblk import PmblkError
from pmblk.raid import parity
from pmblk.raid.array import Array
from pmblk.raid.buffers import buffer
from pmblk.raid.geometry import Geometry
from pmblk.raid.opening import open_member
from pmblk.raid.sweep import Pace, Sweep
from pmblkd.compare import cpu
from tests.harness.daemon import scratch

MIB = 1 << 20
MEMBERS = 5
MISSING = 1  # the slot of who is missing, or filled
AREA_BYTES = 64 * MIB  # of each member, for each array
GEOMETRIES = {
    RAID0: Geometry(level=0, members=MEMBERS, member_bytes=AREA_BYTES),
    RAID5: Geometry(level=5, members=MEMBERS, member_bytes=AREA_BYTES, layout="left-symmetric"),
}
DATA_OFFSETS = {RAID0: MIB, RAID5: MIB + AREA_BYTES}
MEMBER_BYTES = MIB + 2 * AREA_BYTES

Step = Callable[[], Awaitable[int]]  # does something, and returns how many I/Os that were


def section(arguments: argparse.Namespace, rows: Sequence[Row]) -> str:
    origin = benchmark.origin("raid", arguments, programs=(), servers=())
    with scratch() as directory, _one_cpu() as number:
        places = [str(directory / f"member{slot}") for slot in range(MEMBERS)]
        _fill(places)
        meter = _Meter(places, arguments.seconds)
        results = _measure(rows, arguments, meter)
    costs = {row: {name: meter.cost(row, name) for name in row.contenders} for row in rows}
    return raid_report.section(
        raid_report.Run(
            origin=origin,
            cpu=number,
            parity=parity.implementation(),
            results=results,
            costs=costs,
        )
    )


@contextlib.contextmanager
def _one_cpu() -> Iterator[int]:
    """The last that we may use."""
    usable = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(usable)})
    try:
        yield max(usable)
    finally:
        os.sched_setaffinity(0, usable)


def _fill(places: Sequence[str]) -> None:
    """Write all of both arrays: the warm-up, and no page is a hole."""
    begun = time.monotonic()
    for place in places:
        with Path(place).open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, MEMBER_BYTES)

    async def fill() -> None:
        for name in (RAID0, RAID5):
            async with _array(name, places) as array:
                step = _sequential_writes(array, MIB)
                for _ in range(array.size // MIB):
                    await step()

    trio.run(fill)
    print(f"warm-up: arrays written, {time.monotonic() - begun:.1f} s", flush=True)


@contextlib.asynccontextmanager
async def _array(name: str, places: Sequence[str]) -> AsyncIterator[Array]:
    async def announce(slot: int, error: OSError) -> None:
        raise OSError(error.errno, f"member {slot} failed: {error.strerror}")

    kind = RAID0 if name == RAID0 else RAID5
    missing = MISSING if name == DEGRADED else None
    members = [
        None if slot == missing else await open_member(place) for slot, place in enumerate(places)
    ]
    array = Array(GEOMETRIES[kind], members, data_offset=DATA_OFFSETS[kind], announce=announce)
    try:
        yield array
    finally:
        array.close()


def _measure(rows: Sequence[Row], arguments: argparse.Namespace, meter: "_Meter") -> Results:
    benchmark.estimate(arguments, sum(len(row.contenders) for row in rows))
    return {row: _measure_row(row, arguments.rounds, meter) for row in rows}


def _measure_row(row: Row, rounds: int, meter: "_Meter") -> dict[str, list[Sample]]:
    def run(name: str) -> Sample:
        return meter.sample(row, name)

    return benchmark.interleaved(row, row.contenders, rounds, run)


class _Meter:
    """Takes samples, and sums up what the members did in them."""

    def __init__(self, places: Sequence[str], seconds: float) -> None:
        self._places = places
        self._seconds = seconds
        self._bytes: dict[tuple[Row, str], tuple[int, int, int]] = {}

    def sample(self, row: Row, name: str) -> Sample:
        return trio.run(self._sample, row, name)

    def cost(self, row: Row, name: str) -> Cost:
        done, read, written = self._bytes[row, name]
        return Cost(read / done, written / done)

    async def _sample(self, row: Row, name: str) -> Sample:
        async with _array(name, self._places) as array:
            step = _step(row, array)
            await step()
            devices = array.devices
            read, written = devices.read_bytes, devices.write_bytes
            ios, before = 0, cpu.clock(os.getpid())
            started = time.perf_counter()
            while (passed := time.perf_counter() - started) < self._seconds:
                ios += await step()
            spent = cpu.clock(os.getpid()).since(before)
            moved = devices.read_bytes - read, devices.write_bytes - written
        self._count(row, name, ios * row.block_kib * 1024, *moved)
        return Sample(
            ios=ios,
            io_seconds=passed,
            server_user_seconds=spent.server_user,
            server_system_seconds=spent.server_system,
            client_seconds=0,
            others_share=spent.others_share,
        )

    def _count(self, row: Row, name: str, *amounts: int) -> None:
        before = self._bytes.get((row, name), (0, 0, 0))
        done, read, written = (one + other for one, other in zip(before, amounts, strict=True))
        self._bytes[row, name] = done, read, written


# ---- the loads


def _step(row: Row, array: Array) -> Step:
    block_bytes = row.block_kib * 1024
    if row.is_sweep:
        return _sweeps(row, array)
    if row.work == "write":
        return _sequential_writes(array, block_bytes)
    if row.work == "read":
        return _sequential_reads(array, block_bytes)
    if row.work == "randwrite":
        return _random_writes(array, block_bytes, row.batch)
    return _random_reads(array, block_bytes)


def _payload(length: int) -> memoryview:
    view = buffer(length)
    view[:] = random.Random(0).randbytes(length)
    return view


def _sequential_writes(array: Array, block_bytes: int) -> Step:
    payload, position = _payload(block_bytes), 0

    async def step() -> int:
        nonlocal position
        _must_work(await array.write([(position, payload)]))
        position = (position + block_bytes) % array.size
        return 1

    return step


def _sequential_reads(array: Array, block_bytes: int) -> Step:
    position = 0

    async def step() -> int:
        nonlocal position
        await array.read(position, block_bytes)
        position = (position + block_bytes) % array.size
        return 1

    return step


def _random_writes(array: Array, block_bytes: int, batch: int) -> Step:
    payload, chosen = _payload(block_bytes), random.Random(0)
    blocks = array.size // block_bytes

    async def step() -> int:
        offsets = (chosen.randrange(blocks) * block_bytes for _ in range(batch))
        _must_work(await array.write([(offset, payload) for offset in offsets]))
        return batch

    return step


def _random_reads(array: Array, block_bytes: int) -> Step:
    chosen, blocks = random.Random(0), array.size // block_bytes

    async def step() -> int:
        await array.read(chosen.randrange(blocks) * block_bytes, block_bytes)
        return 1

    return step


def _sweeps(row: Row, array: Array) -> Step:
    """One from the start to the end of everything."""
    fills = row.work == "rebuild"

    async def step() -> int:
        array.devices.rebuilt.clear()
        sweep = (
            Sweep("rebuild", array, pace=Pace(), slot=MISSING)
            if fills
            else Sweep("check", array, pace=Pace())
        )
        await sweep.run()
        if sweep.findings.lines():
            raise PmblkError(f"{row.work}: {'; '.join(sweep.findings.lines())}")
        return sweep.end // (row.block_kib * 1024)

    return step


def _must_work(errors: Sequence[OSError | None]) -> None:
    for error in errors:
        if error is not None:
            raise error


BENCHMARK = Benchmark(
    name="raid", about=__doc__, rows=ROWS, section=section, failures=(PmblkError,)
)


def main() -> int:
    return BENCHMARK.main()


if __name__ == "__main__":
    sys.exit(main())
