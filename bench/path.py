"""What Python costs on the path of a 4 KiB read, step by step, and what the path does without.

`python -m bench.path`: microseconds a command for each step, by batch size; then what a task, a
thread and a turn of the event loop cost, which the path avoids. No socket is involved, so this is
the time between `recv` and `sendmsg`.
"""

import random
import struct
import time
from collections.abc import Awaitable, Callable

import trio

from pmblk import Namespace
from pmblk.media import create, open_media
from pmblk.representations import make, parse_options
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


def main() -> None:
    with scratch() as directory:
        create(directory / "a.img", SIZE)
        media = open_media(directory / "a.img")
        media.reserve(0, SIZE)
        namespace = Namespace(
            "a", media, make("extent", media, parse_options("extent")), lba_bytes=BLOCK
        )
        print("us a command    " + "".join(f"{step:>10}" for step in (*STEPS, "all")))
        for batch_size in BATCHES:
            costs = steps_us(namespace, batch_size)
            row = "".join(f"{cost:10.2f}" for cost in (*costs, sum(costs)))
            print(f"batches of {batch_size:<4} {row}")
        media.close()
    print()
    for name, cost in trio.run(avoided).items():
        print(f"{name:<30} {cost:6.1f} us")


if __name__ == "__main__":
    main()
