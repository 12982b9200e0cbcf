"""pmblk beside nbdkit and qemu-nbd: fio's NBD engine, a unix socket, a file in memory each.

The loads and targets are in nbd_rows.py, the servers in nbd_servers.py, and how it is run in
benchmark.py.

    python -m bench.nbd --seconds 1 --rounds 1 --rows 'qd1$' --output /tmp/quick.md
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

from bench import awake, benchmark, nbd_report, nbd_servers
from bench.benchmark import FIO_EXTRA_SECONDS, Benchmark
from bench.nbd_rows import ROWS, Results, Row
from bench.nbd_servers import Server
from bench.samples import Sample
from bench.servers import FILE_BYTES
from pmblkd.compare import fio

FIRST_IO_STARTS = 5
QUICK_SECONDS = 20
PROGRAMS = ("fio", "nbdkit", "qemu-nbd")


def section(arguments: argparse.Namespace, rows: Sequence[Row]) -> str:
    first_io = list(_first_io())
    run = nbd_report.Run(
        origin=benchmark.origin("nbd", arguments, programs=PROGRAMS, servers=_server_lines()),
        spinners=awake.spinners_text(),
        results=_measure(rows, arguments),
        first_io=first_io,
    )
    return nbd_report.section(run)


def _first_io() -> Iterator[float]:
    for start in range(1, FIRST_IO_STARTS + 1):
        seconds = nbd_servers.first_io_seconds()
        print(f"first I/O, start {start}: {seconds:.2f} s", flush=True)
        yield seconds


def _server_lines() -> list[str]:
    ours = f"`pmblk serve`, representation {nbd_servers.REPRESENTATION}, all else default"
    peers = nbd_servers.PEER_COMMANDS.values()
    return [ours, *(f"`{peer.format(socket='SOCKET', file='FILE')}`" for peer in peers)]


# ---- the run


def _measure(rows: Sequence[Row], arguments: argparse.Namespace) -> Results:
    names = dict.fromkeys(name for row in rows for name in row.servers)
    benchmark.estimate(arguments, sum(len(row.servers) for row in rows))
    with contextlib.ExitStack() as stack:
        up = {name: stack.enter_context(nbd_servers.running(name)) for name in names}
        for server in up.values():
            _fill(server)
        return {row: _measure_row(row, up, arguments) for row in rows}


def _measure_row(
    row: Row, up: Mapping[str, Server], arguments: argparse.Namespace
) -> dict[str, list[Sample]]:
    def run(name: str) -> Sample:
        return _sample(row, up[name], arguments.seconds)

    with awake.awake() if row.awake else contextlib.nullcontext():
        return benchmark.interleaved(row, row.servers, arguments.rounds, run)


def _sample(row: Row, server: Server, seconds: float) -> Sample:
    load = benchmark.timed_load(
        rw=row.rw, block_kib=row.block_kib, queue_depth=row.queue_depth, seconds=seconds
    )
    return benchmark.sampled(server, row.rw, lambda: _fio(server, load, seconds))


def _fill(server: Server) -> None:
    """Write all of the file through the server: the warm-up, and no page is a hole."""
    begun = time.monotonic()
    _fio(server, ["--rw=write", "--bs=1m", "--iodepth=8"], QUICK_SECONDS)
    print(f"warm-up: {server.name} written, {time.monotonic() - begun:.1f} s", flush=True)


def _fio(server: Server, load: Sequence[str], seconds: float) -> fio.Result:
    target = ["--ioengine=nbd", f"--uri={server.uri}", f"--size={FILE_BYTES}"]
    return fio.run([*target, *load], seconds=seconds + FIO_EXTRA_SECONDS)


BENCHMARK = Benchmark(
    name="nbd",
    about=__doc__,
    rows=ROWS,
    section=section,
    failures=nbd_servers.FAILURES,
)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
