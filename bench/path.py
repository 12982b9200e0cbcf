"""What Python costs on the path of an I/O, step by step, and what the path does without.

`python -m bench.path`: microseconds a command for each step of a 4 KiB read, by batch size; what
each representation takes to hold and release memory, and to write it, beside a path that has none;
and what a task, a thread and a turn of the event loop cost, which the path avoids. No socket is
involved, so this is the time between `recv` and `sendmsg`.
"""

import random
import struct
import time
from collections.abc import Awaitable, Callable

import trio

from bench.bare import BareNamespace
from pmblk import Command, Namespace
from pmblk.media import Media, create, open_media
from pmblk.nvme.command import READ, WRITE
from pmblk.representations import Representation, make, parse_options
from pmblk.units import format_size
from pmblkd.nbd.replies import ReplyEncoder
from pmblkd.nbd.requests import RequestStream
from tests.harness.daemon import scratch

SIZE = 256 << 20
BLOCK = 4096
BATCHES = (1, 8, 32)
COMMANDS = 200_000
TURNS = 2000
STEPS = ("parse", "execute", "encode", "release")


def requests(count: int) -> bytes:
    """`count` NBD reads of 4 KiB at random offsets."""
    return b"".join(
        struct.pack(">IHHQQI", 0x25609513, 0, 0, n, random.randrange(SIZE // BLOCK) * BLOCK, BLOCK)
        for n in range(count)
    )


def steps_us(namespace: Namespace, batch_size: int) -> list[float]:
    """Microseconds a command for each of STEPS."""
    stream, replies = RequestStream(allocation_context=True), ReplyEncoder(structured=True)
    data = requests(batch_size)
    totals = [0.0] * len(STEPS)
    now = time.perf_counter
    for _ in range(COMMANDS // batch_size):
        stream.receive_buffer()[: len(data)] = data
        stream.received(len(data))
        times = [now()]
        batch = stream.next_batch()
        times.append(now())
        namespace.execute(batch)
        times.append(now())
        replies.encode(batch)
        times.append(now())
        namespace.release(batch)
        times.append(now())
        for step in range(len(STEPS)):
            totals[step] += times[step + 1] - times[step]
    return [total / COMMANDS * 1e6 for total in totals]


async def each_us(action: Callable[[], Awaitable[object]]) -> float:
    started = time.perf_counter()
    for _ in range(TURNS):
        await action()
    return (time.perf_counter() - started) / TURNS * 1e6


async def a_task() -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.lowlevel.checkpoint)


async def avoided() -> dict[str, float]:
    return {
        "a turn of the event loop": await each_us(trio.lowlevel.checkpoint),
        "a task in a nursery": await each_us(a_task),
        "a worker thread": await each_us(lambda: trio.to_thread.run_sync(int)),
    }


# ---- what describing memory costs

CONTENDERS: tuple[tuple[str, dict[str, object]], ...] = (
    ("page-cache", {"arena": "256MiB"}),
    ("struct-page", {}),
    ("struct-page", {"compound": "2MiB"}),
    ("transient-page", {}),
    ("pfn", {}),
    ("extent", {}),
    ("extent", {"fragments": 1024}),
)
BLOCKS = (4096, 128 << 10, 1 << 20)
BATCH = 8
BEST_OF = 15


def costs_us(namespace: Namespace, opcode: int, block: int) -> float:
    """Microseconds an I/O, the least of several runs: hold and release, or write."""
    payload = memoryview(bytes(block))
    offsets = [random.randrange(SIZE // block) * block for _ in range(BATCH)]
    best = float("inf")
    rounds = max(4, (8 << 20) // block // BATCH)
    for _ in range(BEST_OF):
        started = time.perf_counter()
        for _ in range(rounds):
            commands = [
                Command(opcode, 0, offset, block, payload=None if opcode == READ else payload)
                for offset in offsets
            ]
            assert not namespace.execute(commands)
            namespace.release(commands)
        best = min(best, time.perf_counter() - started)
    return best / rounds / BATCH * 1e6


def print_costs(media: Media) -> None:
    titles = [f"{name} {format_size(block)}" for name in ("read", "write") for block in BLOCKS]
    print("\nus an I/O" + " " * 25 + "".join(f"{title:>15}" for title in titles))
    bare = BareNamespace("a", media, _made(media, "extent", {}), lba_bytes=BLOCK)
    rows: list[tuple[str, Namespace]] = [("without a representation", bare)]
    for kind, options in CONTENDERS:
        name = " ".join([kind, *(f"{key}={value}" for key, value in options.items())])
        made = _made(media, kind, options)
        rows.append((name, Namespace("a", media, made, lba_bytes=BLOCK)))
    for name, namespace in rows:
        costs = [costs_us(namespace, opcode, block) for opcode in (READ, WRITE) for block in BLOCKS]
        print(f"{name:34}" + "".join(f"{cost:15.2f}" for cost in costs))


def _made(media: Media, kind: str, options: dict[str, object]) -> Representation:
    return make(kind, media, parse_options(kind, options))


def main() -> None:
    with scratch() as directory:
        create(directory / "a.img", SIZE)
        media = open_media(directory / "a.img")
        media.reserve(0, SIZE)
        namespace = Namespace("a", media, _made(media, "extent", {}), lba_bytes=BLOCK)
        print("us a command    " + "".join(f"{step:>10}" for step in (*STEPS, "all")))
        for batch_size in BATCHES:
            costs = steps_us(namespace, batch_size)
            row = "".join(f"{cost:10.2f}" for cost in (*costs, sum(costs)))
            print(f"batches of {batch_size:<4} {row}")
        print_costs(media)
        media.close()
    print()
    for name, cost in trio.run(avoided).items():
        print(f"{name:<30} {cost:6.1f} us")


if __name__ == "__main__":
    main()
