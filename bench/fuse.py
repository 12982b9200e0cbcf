"""pmblk's files beside tmpfs itself, qemu-storage-daemon's FUSE export and nbdfuse.

Every contender serves a file of its own in memory to fio, which is pinned to one CPU, and the
servers to another. The loads and targets are in fuse_rows.py, the servers in fuse_contenders.py,
and how it is run in benchmark.py. It mounts and attaches, which takes root.

    python -m bench.fuse --seconds 1 --rounds 1 --rows mmap --output /tmp/quick.md
"""

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from bench import benchmark, fuse_contenders, fuse_report
from bench.benchmark import FIO_EXTRA_SECONDS, Benchmark
from bench.fuse_contenders import Contender
from bench.fuse_report import Cpus
from bench.fuse_rows import FAST, FIRST_IO, IO_URING, NBDFUSE, QEMU, RAW, ROWS, Results, Row
from bench.samples import Sample
from bench.servers import FILE_BYTES
from pmblk import PmblkError
from pmblkd.compare import fio
from tests.harness import file_systems

FIRST_IO_STARTS = 5
QUICK_SECONDS = 60
GUARD_SECONDS = FIO_EXTRA_SECONDS + 15  # fio had its time, and cannot be killed
PROGRAMS = ("fio", "qemu-storage-daemon", "nbdfuse", "nbdkit")


def section(arguments: argparse.Namespace, rows: Sequence[Row]) -> str:
    refusal = _io_uring_refusal() if any(row.engine == IO_URING for row in rows) else ""
    if refusal:
        rows = [row for row in rows if row.engine != IO_URING]
    servers = _server_lines()
    origin = benchmark.origin("fuse", arguments, programs=PROGRAMS, servers=servers)
    cpus = _cpus()
    with _all_up(rows, cpus) as up:
        first_io = {name: list(_first_io(up[name])) for name in FIRST_IO}
        results = _measure(rows, up, arguments, cpus)
        commands = _commands(up[FAST])
    return fuse_report.section(
        fuse_report.Run(
            origin=origin,
            cpus=cpus,
            io_uring_refusal=refusal,
            results=results,
            first_io=first_io,
            fast_commands=commands,
        )
    )


def _cpus() -> Cpus:
    """The first that we may use for fio, the last for the servers."""
    usable = sorted(os.sched_getaffinity(0))
    return Cpus(client=usable[0], server=usable[-1])


def _io_uring_refusal() -> str:
    """Why fio cannot use it here; or nothing."""
    with tempfile.TemporaryDirectory(prefix="pmblk-bench-") as directory:
        target = [f"--ioengine={IO_URING}", "--size=4k", f"--filename={directory}/file"]
        try:
            fio.run([*target, "--rw=write"], seconds=QUICK_SECONDS)
        except fio.FioError as error:
            return str(error)
    return ""


def _server_lines() -> list[str]:
    places = {"file": "FILE", "mount": "MOUNT", "socket": "SOCKET"}
    ours = ", ".join(
        f"*{name}* is engine {engine}" + (f", dax {dax}" if engine == "kernel" else "")
        for name, (engine, dax) in fuse_contenders.OURS.items()
    )
    nbdfuse = (fuse_contenders.NBDKIT_COMMAND, fuse_contenders.NBDFUSE_COMMAND)
    return [
        f"`pmblk serve`: {ours}; all else default",
        f"*{QEMU}*: `{fuse_contenders.QEMU_COMMAND.format(**places)}`",
        f"*{NBDFUSE}*: " + " and ".join(f"`{words.format(**places)}`" for words in nbdfuse),
    ]


# ---- the run


@contextlib.contextmanager
def _all_up(rows: Sequence[Row], cpus: Cpus) -> Iterator[Mapping[str, Contender]]:
    """Every contender of these rows, its file written through its mount once."""
    names = dict.fromkeys([*FIRST_IO, *(name for row in rows for name in row.contenders)])
    with contextlib.ExitStack() as stack:
        up = {
            name: stack.enter_context(fuse_contenders.running(name, cpu=cpus.server))
            for name in dict.fromkeys([FAST, *names])
            if name != RAW
        }
        up[RAW] = fuse_contenders.raw(up[FAST])
        for contender in up.values():
            _fill(contender, cpus)
        yield up


def _fill(contender: Contender, cpus: Cpus) -> None:
    """Write all of the file: the warm-up, and no page is a hole."""
    begun = time.monotonic()
    load = ["--ioengine=psync", "--direct=1", "--rw=write", "--bs=1m"]
    _fio(contender, contender.file, load, QUICK_SECONDS, cpus)
    print(f"warm-up: {contender.name} written, {time.monotonic() - begun:.1f} s", flush=True)


def _first_io(contender: Contender) -> Iterator[float]:
    for start in range(1, FIRST_IO_STARTS + 1):
        with contender.guarded(GUARD_SECONDS):
            seconds = fuse_contenders.first_io_seconds(contender)
        print(f"attach to first I/O, {contender.name}, {start}: {seconds:.2f} s", flush=True)
        yield seconds


def _measure(
    rows: Sequence[Row], up: Mapping[str, Contender], arguments: argparse.Namespace, cpus: Cpus
) -> Results:
    benchmark.estimate(arguments, sum(len(row.contenders) for row in rows))
    return {row: _measure_row(row, up, arguments, cpus) for row in rows}


def _measure_row(
    row: Row, up: Mapping[str, Contender], arguments: argparse.Namespace, cpus: Cpus
) -> dict[str, list[Sample]]:
    with contextlib.ExitStack() as stack:
        files = {
            name: stack.enter_context(up[name].attach()) if row.on_loop else up[name].file
            for name in row.contenders
        }

        def run(name: str) -> Sample:
            return _sample(row, up[name], files[name], arguments.seconds, cpus)

        return benchmark.interleaved(row, row.contenders, arguments.rounds, run)


def _sample(row: Row, contender: Contender, file: Path, seconds: float, cpus: Cpus) -> Sample:
    load = benchmark.timed_load(
        rw=row.rw, block_kib=row.block_kib, queue_depth=row.queue_depth, seconds=seconds
    )
    load += [f"--ioengine={row.engine}", f"--direct={int(not row.is_mapped)}"]
    return benchmark.sampled(contender, row.rw, lambda: _fio(contender, file, load, seconds, cpus))


def _fio(
    contender: Contender, file: Path, load: Sequence[str], seconds: float, cpus: Cpus
) -> fio.Result:
    """A file that has vanished must not come back as one that fio makes."""
    target = [f"--filename={file}", "--allow_file_create=0", f"--size={FILE_BYTES}"]
    with contender.guarded(seconds + GUARD_SECONDS):
        return fio.run(
            [*target, f"--cpus_allowed={cpus.client}", *load], seconds=seconds + FIO_EXTRA_SECONDS
        )


def _commands(contender: Contender) -> int:
    """Reads and writes that its namespace has seen, as `pmblk stats` counts them."""
    assert contender.daemon is not None
    counters = contender.daemon.stats(fuse_contenders.NAME).namespace_counters
    return counters.reads + counters.writes


def _lacking() -> str:
    if os.geteuid() != 0:
        return "it mounts and attaches loop devices, which takes root"
    for device in ("/dev/fuse", "/dev/loop-control"):
        if not Path(device).exists():
            return f"there is no {device}"
    return ""


BENCHMARK = Benchmark(
    name="fuse",
    about=__doc__,
    rows=ROWS,
    section=section,
    failures=(file_systems.ProgramError, PmblkError),
)


def main() -> int:
    if lacking := _lacking():
        print(f"bench: {lacking}", file=sys.stderr)
        return 2
    return BENCHMARK.main()


if __name__ == "__main__":
    sys.exit(main())
