"""What the benchmarks do alike: their command line, turns, runs of fio, and where figures go.

One interleaved run: for each load, in each round, every server in turn, so that whatever else the
machine does meets all of them.
"""

import argparse
import datetime
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from bench.report import Load, Origin, rate_text, splice, three_digits
from bench.samples import Sample, rotated
from bench.servers import Server, ServerError
from pmblkd.compare import cpu, fio, machine

FIO_EXTRA_SECONDS = 30  # on top of its run time, before it is killed
FIO_START_SECONDS = 0.4  # what a run costs beside its run time, for the estimate
OUTPUT = Path("docs/performance.md")
FAILURES = (OSError, ValueError, subprocess.SubprocessError, ServerError, fio.FioError)

Row = TypeVar("Row", bound=Load)


@dataclass(frozen=True, kw_only=True)
class Benchmark(Generic[Row]):
    """`python -m bench.NAME`. `section` measures these rows, and is the report of it.

    `failures` are those of its servers; what is wrong with one is for the user, and no traceback.
    """

    name: str
    about: str | None
    rows: Sequence[Row]
    section: Callable[[argparse.Namespace, Sequence[Row]], str]
    failures: tuple[type[Exception], ...] = ()

    def main(self) -> int:
        """The exit status."""
        arguments = self._arguments()
        rows = [row for row in self.rows if re.search(arguments.rows, row.name)]
        if not rows:
            known = " ".join(row.name for row in self.rows)
            print(f"no row matches {arguments.rows}; there are: {known}", file=sys.stderr)
            return 2
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: sys.exit(1))  # cleans up on the way
        expected: tuple[type[Exception], ...] = (*FAILURES, *self.failures)
        try:
            self._run(arguments, rows)
        except expected as error:
            print(f"bench: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 130
        return 0

    def _arguments(self) -> argparse.Namespace:
        parser = argparse.ArgumentParser(
            prog=f"python -m bench.{self.name}", description=self.about
        )
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

    def _run(self, arguments: argparse.Namespace, rows: Sequence[Row]) -> None:
        if arguments.output is None:
            print(self.section(arguments, rows))
        else:
            self._write(arguments.output, "", dry=True)
            self._write(arguments.output, self.section(arguments, rows))

    def _write(self, file: Path, section: str, *, dry: bool = False) -> None:
        """The file with this section. `dry` finds out beforehand whether that will work."""
        text = splice(file.read_text() if file.exists() else "", section, name=self.name)
        target = file if file.exists() else file.parent
        if not os.access(target, os.W_OK):
            raise PermissionError(f"cannot write {target}")
        if not dry:
            file.write_text(text)
            print(f"wrote {file}")


# ---- the interleaved run


def estimate(arguments: argparse.Namespace, runs_of_a_round: int) -> None:
    steps = arguments.rounds * runs_of_a_round
    minutes = steps * (arguments.seconds + FIO_START_SECONDS) / 60
    print(f"{steps} runs of {arguments.seconds:g} s, about {minutes:.1f} minutes", flush=True)


def interleaved(
    row: Load, names: Sequence[str], rounds: int, run: Callable[[str], Sample]
) -> dict[str, list[Sample]]:
    """Every name in turn in each round, their order rotated."""
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    for index in range(rounds):
        for name in rotated(names, index):
            samples[name].append(run(name))
            _progress(row, index + 1, name, samples[name][-1])
    return samples


def _progress(row: Load, number: int, name: str, sample: Sample) -> None:
    cost = three_digits(sample.cpu_us)
    others = f"others {sample.others_share:.0%}"
    rate = rate_text(row, sample.iops)
    line = f"{row.name:29} round {number}  {name:19} {rate:>11}  {cost:>5} us CPU/IO  {others}"
    print(line, flush=True)


def sampled(server: Server, rw: str, run: Callable[[], fio.Result]) -> Sample:
    """A run of fio, with what it took of the server's CPU time. Raises ServerError, FioError."""
    server.check()
    before = cpu.clock(*server.pids)
    result = run()
    spent = cpu.clock(*server.pids).since(before)
    side = result.read if "read" in rw else result.write
    return Sample(
        ios=side.ios,
        io_seconds=side.seconds,
        server_user_seconds=spent.server_user,
        server_system_seconds=spent.server_system,
        client_seconds=spent.client,
        others_share=spent.others_share,
    )


def timed_load(*, rw: str, block_kib: int, queue_depth: int, seconds: float) -> list[str]:
    """For fio."""
    return [
        f"--rw={rw}",
        f"--bs={block_kib}k",
        f"--iodepth={queue_depth}",
        "--norandommap",  # no bookkeeping in the client, which has enough to do
        "--time_based",
        f"--runtime={round(seconds * 1000)}ms",
    ]


# ---- where it was


def origin(
    name: str, arguments: argparse.Namespace, *, programs: Sequence[str], servers: Sequence[str]
) -> Origin:
    """Here and now; `programs` are those whose versions count."""
    commit = machine.output("git", "describe", "--always", "--dirty") or "of no commit"
    tools = [machine.program_version(program) for program in programs]
    return Origin(
        machine=machine.machine(),
        versions=", ".join([f"pmblk {commit}", *tools, f"Python {platform.python_version()}"]),
        date=datetime.datetime.now().astimezone().isoformat(" ", "minutes"),
        command=shlex.join(["python", "-m", f"bench.{name}", *sys.argv[1:]]),
        servers=servers,
        seconds=arguments.seconds,
        rounds=arguments.rounds,
    )
