"""What a representation costs over NBD: each beside the same daemon without any, fio in turn.

`python -m bench.overhead --kinds extent,pfn`: IOPS and the server's CPU time an I/O as ratios to
`bench.bare`, medians of the rounds' own ratios, in Markdown. Every server has a file of its own.
"""

import argparse
import contextlib
import re
import sys
from collections.abc import Iterator, Sequence
from statistics import median

from bench import nbd_servers, servers
from pmblk.representations import KINDS
from pmblkd.compare import cpu, fio
from tests.harness.daemon import PMBLK, Daemon, scratch

BARE = "none"
SERVE_BARE = (sys.executable, "-m", "bench.bare")
LOADS = (
    ("randread", "4k", 32),
    ("randwrite", "4k", 32),
    ("randread", "4k", 1),
    ("read", "128k", 8),
    ("write", "128k", 8),
    ("read", "1m", 8),
    ("write", "1m", 8),
)
EXTRA_SECONDS = 30

Cost = tuple[float, float]  # IOPS, CPU microseconds an I/O


@contextlib.contextmanager
def served(kind: str) -> Iterator[Daemon]:
    """A daemon on preallocated media, which have been written through it."""
    with scratch() as directory:
        servers.allocate(directory / "media")
        config = nbd_servers.CONFIG.replace("{dir}", str(directory))
        if kind != BARE:
            config = config.replace(nbd_servers.REPRESENTATION, kind)
        program = SERVE_BARE if kind == BARE else (PMBLK, "serve")
        daemon = Daemon(directory, config, program=program).start()
        try:
            load(daemon, ["--rw=write", "--bs=1m", "--iodepth=8"])
            yield daemon
        finally:
            daemon.stop()


def load(daemon: Daemon, arguments: Sequence[str], *, seconds: float = 0) -> Cost:
    target = ["--ioengine=nbd", f"--uri={daemon.uri()}", f"--size={servers.FILE_BYTES}"]
    before = cpu.clock(daemon.pid)
    result = fio.run([*target, *arguments], seconds=seconds + EXTRA_SECONDS)
    spent = cpu.clock(daemon.pid).since(before).server
    side = result.read if result.read.ios else result.write
    return side.iops, spent / side.ios * 1e6


def compare(
    daemons: dict[str, Daemon], arguments: Sequence[str], seconds: float, rounds: int
) -> str:
    """A row: for each kind, the medians of IOPS and CPU over those of the bare daemon."""
    costs: dict[str, list[Cost]] = {kind: [] for kind in daemons}
    for index in range(rounds):
        for kind in (list(daemons), list(daemons)[::-1])[index % 2]:
            costs[kind].append(load(daemons[kind], arguments, seconds=seconds))
    cells = []
    for kind in daemons:
        pairs = list(zip(costs[kind], costs[BARE], strict=True))
        if kind == BARE:
            iops, cpu_us = (median(cost[i] for cost in costs[BARE]) for i in (0, 1))
            cells.append(f"{iops:,.0f} IOPS, {cpu_us:.1f} us")
        else:
            iops, cpu_us = (median(mine[i] / bare[i] for mine, bare in pairs) for i in (0, 1))
            cells.append(f"{iops:.3f}, {cpu_us:.2f}")
    return " | ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.overhead", description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each run (%(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="(%(default)s)")
    parser.add_argument("--loads", default="", metavar="PATTERN", help="only those that match it")
    parser.add_argument("--kinds", default=",".join(KINDS), help="(%(default)s)")
    chosen = parser.parse_args()
    names = [BARE, *chosen.kinds.split(",")]
    print(f"| load | without | {' | '.join(names[1:])} |")
    print("|---" * (len(names) + 1) + "|")
    with contextlib.ExitStack() as stack:
        daemons = {kind: stack.enter_context(served(kind)) for kind in names}
        for rw, block, depth in LOADS:
            name = f"{block} {rw} QD{depth}"
            if not re.search(chosen.loads, name):
                continue
            arguments = [f"--rw={rw}", f"--bs={block}", f"--iodepth={depth}", "--norandommap"]
            arguments += ["--time_based", f"--runtime={round(chosen.seconds * 1000)}ms"]
            row = compare(daemons, arguments, chosen.seconds, chosen.rounds)
            print(f"| {name} | {row} |", flush=True)


if __name__ == "__main__":
    main()
