"""pmblk beside nbdkit and qemu-nbd: fio's NBD engine, a unix socket, a file in memory each.

One interleaved run: for each load, in each round, every server in turn, so that whatever else the
machine does meets all of them. The loads and targets are in rows.py, the servers in servers.py.

    python -m bench.nbd --seconds 1 --rounds 1 --rows 'qd1$' --output /tmp/quick.md
"""

import argparse
import contextlib
import datetime
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench import awake, report, servers
from bench.rows import OURS, ROWS, Results, Row, Sample
from bench.servers import Server
from pmblkd.compare import cpu, fio, machine

FIRST_IO_STARTS = 5
FIO_EXTRA_SECONDS = 30  # on top of its run time, before it is killed
FIO_START_SECONDS = 0.4  # what a run costs beside its run time, for the estimate
QUICK_SECONDS = 20
OUTPUT = Path("docs/performance.md")
FAILURES = (OSError, ValueError, subprocess.SubprocessError, *servers.FAILURES, fio.FioError)


def main() -> int:
    arguments = _arguments()
    rows = [row for row in ROWS if re.search(arguments.rows, row.name)]
    if not rows:
        known = " ".join(row.name for row in ROWS)
        print(f"no row matches {arguments.rows}; there are: {known}", file=sys.stderr)
        return 2
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))  # cleans up on the way
    try:
        if arguments.output is None:
            print(report.section(_run(arguments, rows)))
        else:
            _write(arguments.output, "", dry=True)
            _write(arguments.output, report.section(_run(arguments, rows)))
    except FAILURES as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.nbd", description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.8, help="of each run (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(%(default)s)")
    parser.add_argument("--rows", default="", metavar="PATTERN", help="only rows that match it")
    parser.add_argument(
        "--output", type=Path, help=f"default: {OUTPUT}, with --rows standard output"
    )
    arguments = parser.parse_args()
    if arguments.output is None and not arguments.rows:
        arguments.output = OUTPUT
    if arguments.seconds < 0.1 or arguments.rounds < 1:
        parser.error("at least 0.1 seconds and 1 round")
    return arguments


def _write(file: Path, section: str, *, dry: bool = False) -> None:
    """The file with this section. `dry` finds out beforehand whether that will work."""
    text = report.splice(file.read_text() if file.exists() else "", section)
    target = file if file.exists() else file.parent
    if not os.access(target, os.W_OK):
        raise PermissionError(f"cannot write {target}")
    if not dry:
        file.write_text(text)
        print(f"wrote {file}")


def _run(arguments: argparse.Namespace, rows: Sequence[Row]) -> report.Run:
    first_io = list(_first_io())
    return report.Run(
        machine=machine.machine(),
        versions=_versions(),
        date=datetime.datetime.now().astimezone().isoformat(" ", "minutes"),
        command=shlex.join(["python", "-m", "bench.nbd", *sys.argv[1:]]),
        servers=_server_lines(),
        spinners=awake.spinners_text(),
        seconds=arguments.seconds,
        rounds=arguments.rounds,
        results=_measure(rows, arguments.seconds, arguments.rounds),
        first_io=first_io,
    )


def _first_io() -> Iterator[float]:
    for start in range(1, FIRST_IO_STARTS + 1):
        seconds = servers.first_io_seconds()
        print(f"first I/O, start {start}: {seconds:.2f} s", flush=True)
        yield seconds


# ---- the interleaved run


def _measure(rows: Sequence[Row], seconds: float, rounds: int) -> Results:
    names = dict.fromkeys(name for row in rows for name in row.servers)
    steps = rounds * sum(len(row.servers) for row in rows)
    minutes = steps * (seconds + FIO_START_SECONDS) / 60
    print(f"{steps} runs of {seconds:g} s, about {minutes:.1f} minutes", flush=True)
    with contextlib.ExitStack() as stack:
        up = {name: stack.enter_context(servers.running(name)) for name in names}
        for server in up.values():
            _fill(server)
        return {row: _measure_row(row, up, seconds, rounds) for row in rows}


def _measure_row(
    row: Row, up: dict[str, Server], seconds: float, rounds: int
) -> dict[str, list[Sample]]:
    samples: dict[str, list[Sample]] = {name: [] for name in row.servers}
    with awake.awake() if row.awake else contextlib.nullcontext():
        for index in range(rounds):
            for name in _turn(list(row.servers), index):
                samples[name].append(_sample(row, up[name], seconds))
                _progress(row, index + 1, name, samples[name][-1])
    return samples


def _turn(names: list[str], index: int) -> list[str]:
    """Each server has its turn to be first."""
    first = index % len(names)
    return names[first:] + names[:first]


def _progress(row: Row, number: int, name: str, sample: Sample) -> None:
    rate = report.rate_text(row, sample.iops)
    cost = report.three_digits(sample.cpu_us)
    others = f"others {sample.others_share:.0%}"
    line = f"{row.name:22} round {number}  {name:8} {rate:>11}  {cost:>5} us CPU/IO  {others}"
    print(line, flush=True)


def _sample(row: Row, server: Server, seconds: float) -> Sample:
    server.check()
    before = cpu.clock(server.pid)
    result = _fio(server, _load(row, seconds), seconds)
    spent = cpu.clock(server.pid).since(before)
    side = result.read if "read" in row.rw else result.write
    return Sample(
        ios=side.ios,
        io_seconds=side.seconds,
        server_seconds=spent.server,
        client_seconds=spent.client,
        others_share=spent.others_share,
    )


def _fill(server: Server) -> None:
    """Write all of the file through the server: the warm-up, and no page is a hole."""
    begun = time.monotonic()
    _fio(server, ["--rw=write", "--bs=1m", "--iodepth=8"], QUICK_SECONDS)
    print(f"warm-up: {server.name} written, {time.monotonic() - begun:.1f} s", flush=True)


def _fio(server: Server, load: Sequence[str], seconds: float) -> fio.Result:
    target = ["--ioengine=nbd", f"--uri={server.uri}", f"--size={servers.FILE_BYTES}"]
    return fio.run([*target, *load], seconds=seconds + FIO_EXTRA_SECONDS)


def _load(row: Row, seconds: float) -> list[str]:
    return [
        f"--rw={row.rw}",
        f"--bs={row.block_kib}k",
        f"--iodepth={row.queue_depth}",
        "--norandommap",  # no bookkeeping in the client, which has enough to do
        "--time_based",
        f"--runtime={round(seconds * 1000)}ms",
    ]


# ---- where it was


def _versions() -> str:
    commit = machine.output("git", "describe", "--always", "--dirty") or "of no commit"
    tools = [machine.program_version(name) for name in ("fio", "nbdkit", "qemu-nbd")]
    return ", ".join([f"{OURS} {commit}", *tools, f"Python {platform.python_version()}"])


def _server_lines() -> list[str]:
    ours = f"`pmblk serve`, representation {servers.REPRESENTATION}, all else default"
    peers = servers.PEER_COMMANDS.values()
    return [ours, *(f"`{peer.format(socket='SOCKET', file='FILE')}`" for peer in peers)]


if __name__ == "__main__":
    sys.exit(main())
