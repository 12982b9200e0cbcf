"""`pmblk compare`, from the config to the report. Exit status: see `pmblkd.cli`; 128 and the
signal's number when it was interrupted. In every case nothing but the report is left.
"""

import contextlib
import datetime
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from pmblk import PmblkError
from pmblk.media.syscalls import file_system
from pmblk.units import format_size, parse_size
from pmblkd import __version__
from pmblkd.compare import large_files, markdown, measure, page, stage
from pmblkd.compare.contenders import Contender, contenders
from pmblkd.compare.interrupts import Interrupted, Interrupts
from pmblkd.compare.machine import machine, program_version
from pmblkd.compare.matrix import Row, rows
from pmblkd.compare.progress import Progress, duration
from pmblkd.compare.results import LargeFileFacts, Results, Setup, encode, load
from pmblkd.compare.summary import summary
from pmblkd.config import Config, NamespaceConfig
from pmblkd.errors import WorkFailed, did_you_mean
from pmblkd.reports import NamespaceReport

SIZE_MAX = 1 << 30
SIZE_UNIT = 64 << 20  # so that the reserve, and what is left, are whole MiB
FREE_EXTRA_BYTES = 96 << 20  # the sparse files take some memory too
SECONDS_MIN = 0.1


class Wishes(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line says."""

    namespace: str | None = None
    size: str | None = None
    seconds: float = 1.0
    rounds: int = 3
    rows: str = ""
    only: Sequence[str] = ()
    variants: bool = False
    output: Path = Path("pmblk-compare")


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What will be done. `directory` is where the namespace's file lies."""

    directory: Path
    file_bytes: int
    lba_bytes: int
    busy_poll_us: int
    contenders: list[Contender]
    rows: list[Row]
    large_file_contenders: list[Contender]
    loop_refusal: str
    wishes: Wishes

    @property
    def with_loop(self) -> bool:
        return any(row.path == "loop" for row in self.rows)

    @property
    def steps(self) -> int:
        return self.runs + self.openings

    @property
    def expected_seconds(self) -> float:
        a_run = self.wishes.seconds + measure.OVERHEAD_SECONDS
        return self.runs * a_run + sum(
            large_files.expected_seconds(one, size)
            for size in large_files.FILES_BYTES
            for one in self.large_file_contenders
        )

    @property
    def runs(self) -> int:
        return len(self.rows) * self.wishes.rounds * len(self.contenders)

    @property
    def openings(self) -> int:
        return len(self.large_file_contenders) * len(large_files.FILES_BYTES)


def compare(config: Config, wishes: Wishes) -> int:
    """Do it all; the exit status. Raises PmblkError."""
    plan = _plan(config, wishes)
    interrupts = Interrupts()
    with interrupts.installed():
        try:
            with _output_directory(wishes.output) as output:
                results = _measured(plan, interrupts)
                _write(output, results)
        except (Interrupted, PmblkError):
            if not interrupts.number:
                raise
            print("interrupted: stopped half way, and tidied up", file=sys.stderr)
            return 128 + interrupts.number
    _tell(results, f"{wishes.output}/report.html, report.md, results.json")
    return 0


def redraw(file: Path, output: Path) -> int:
    """The report of an earlier comparison, from its results; the exit status. Raises PmblkError."""
    results = load(file)
    with _output_directory(output) as directory:
        _draw(directory, results)
    _tell(results, f"{output}/report.html, report.md")
    return 0


def _tell(results: Results, files: str) -> None:
    for sentence in summary(results):
        print(f"- {sentence}")
    print(f"\n{files}")


# ---- before it begins


def _plan(config: Config, wishes: Wishes) -> Plan:
    """Everything that can be wrong is found here. Raises PmblkError."""
    if wishes.seconds < SECONDS_MIN or wishes.rounds < 1:
        raise PmblkError(f"at least {SECONDS_MIN} --seconds and 1 of --rounds")
    if shutil.which("fio") is None:
        raise PmblkError("fio is not installed", hint="install fio, with its nbd engine")
    namespace = _chosen(config, wishes.namespace)
    file_bytes = _file_bytes(namespace, wishes.size)
    refusal = stage.loop_refusal()
    plan = Plan(
        directory=namespace.file.parent,
        file_bytes=file_bytes,
        lba_bytes=namespace.lba_size,
        busy_poll_us=config.daemon.busy_poll_us,
        contenders=contenders(file_bytes, variants=wishes.variants, only=wishes.only),
        rows=rows(wishes.rows, with_loop=not refusal),
        large_file_contenders=large_files.large_file_contenders(
            wishes.only, variants=wishes.variants
        ),
        loop_refusal=refusal,
        wishes=wishes,
    )
    _check_space(plan.directory, file_bytes)
    return plan


def _chosen(config: Config, name: str | None) -> NamespaceConfig:
    in_memory = [namespace for namespace in config.namespace if namespace.raid is None]
    if name is None and in_memory:
        return in_memory[0]
    for namespace in in_memory:
        if namespace.name == name:
            return namespace
    if name is None or any(namespace.name == name for namespace in config.namespace):
        raise PmblkError(
            f"{name or 'every namespace'} is an array",
            hint="an array has no representation to compare; name a namespace with a path",
        )
    names = [namespace.name for namespace in in_memory]
    raise PmblkError(f"--namespace: there is no {name}", hint=did_you_mean(name, names))


def _file_bytes(namespace: NamespaceConfig, wished: str | None) -> int:
    """As large as the namespace, within bounds; whole units, so that the reserve is even."""
    size = namespace.size_bytes or _existing_bytes(namespace.file)
    if wished is None:
        size = min(size, SIZE_MAX)
    else:
        try:
            size = min(size, parse_size(wished))
        except ValueError as error:
            raise PmblkError(f"--size: {error}") from None
    if size < SIZE_UNIT:
        raise PmblkError(
            f"{format_size(size)} are too little for a comparison",
            hint=f"at least {format_size(SIZE_UNIT)}, in the config and in --size",
        )
    return size // SIZE_UNIT * SIZE_UNIT


def _existing_bytes(file: Path) -> int:
    """Its size; the file itself is not opened."""
    try:
        return file.stat().st_size
    except OSError as error:
        raise PmblkError(
            f"cannot see {file}: {error.strerror}", hint="give the namespace a size"
        ) from error


def _check_space(directory: Path, file_bytes: int) -> None:
    try:
        room = os.statvfs(directory)
    except OSError as error:
        raise PmblkError(
            f"cannot see {directory}: {error.strerror}", hint="mend the namespace's path"
        ) from error
    free, needed = room.f_bavail * room.f_frsize, file_bytes + FREE_EXTRA_BYTES
    if free < needed:
        raise PmblkError(
            f"{directory} has {format_size(free)} free, {format_size(needed)} are needed",
            hint="choose a smaller --size",
        )


@contextlib.contextmanager
def _output_directory(directory: Path) -> Iterator[Path]:
    """Made at once, so that a run is not lost for want of it; a new one that stays empty goes."""
    is_new = not directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not os.access(directory, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise PmblkError(
            f"cannot write to {directory}: {error.strerror}", hint="name another --output"
        ) from error
    try:
        yield directory
    finally:
        if is_new:
            with contextlib.suppress(OSError):
                directory.rmdir()


# ---- the work


def _measured(plan: Plan, interrupts: Interrupts) -> Results:
    """All that is known at the end. Raises PmblkError, and Interrupted."""
    wishes = plan.wishes
    _announce(plan)
    with (
        stage.scratch(plan.directory, ".pmblk-compare-") as scratch,
        stage.serving(
            scratch,
            file_bytes=plan.file_bytes,
            lba_bytes=plan.lba_bytes,
            busy_poll_us=plan.busy_poll_us,
            with_loop=plan.with_loop,
            interrupts=interrupts,
        ) as served,
    ):
        measure.fill(served, interrupts.check)
        possible, left_out = measure.available(served, plan.contenders, interrupts.check)
        if not possible:
            raise PmblkError(f"nothing to compare: {'; '.join(left_out)}")
        plan = msgspec.structs.replace(plan, contenders=possible)
        setup = _setup(plan, served.namespace, scratch, left_out)
        with Progress(steps=plan.steps, expected_seconds=plan.expected_seconds) as progress:
            found_files = list(_large_files(plan, scratch, progress, interrupts))
            samples = list(
                measure.samples(
                    served,
                    plan.rows,
                    possible,
                    seconds=wishes.seconds,
                    rounds=wishes.rounds,
                    progress=progress,
                    check=interrupts.check,
                )
            )
    return Results(
        setup=setup, contenders=possible, rows=plan.rows, samples=samples, large_files=found_files
    )


def _announce(plan: Plan) -> None:
    wishes = plan.wishes
    names = ", ".join(one.name for one in plan.contenders)
    runs = f"loads: {len(plan.rows)}, rounds: {wishes.rounds}, runs: {plan.runs}"
    print(f"{names}\non a scratch file of {format_size(plan.file_bytes)} in {plan.directory}")
    print(f"{runs} of {wishes.seconds:g} s; about {duration(plan.expected_seconds)}", flush=True)
    if plan.loop_refusal:
        print(f"without loads of a loop device: {plan.loop_refusal}", flush=True)


def _large_files(
    plan: Plan, scratch: Path, progress: Progress, interrupts: Interrupts
) -> Iterator[LargeFileFacts]:
    for size in large_files.FILES_BYTES:
        for one in plan.large_file_contenders:
            what = f"{format_size(size)}: {one.name}"
            expected = large_files.expected_seconds(one, size)
            with progress.step(what, expected_seconds=expected) as step:
                interrupts.check()
                facts = large_files.facts(scratch, one, size, check=interrupts.check)
                step.said = facts.skipped or f"{format_size(facts.metadata_bytes)} of metadata"
            yield facts


def _setup(plan: Plan, served: NamespaceReport, scratch: Path, left_out: list[str]) -> Setup:
    wishes = plan.wishes
    return Setup(
        command=shlex.join(["pmblk", *sys.argv[1:]]),
        date=datetime.datetime.now().astimezone().isoformat(" ", "minutes"),
        machine=machine(),
        versions=[
            f"pmblk {__version__}",
            program_version("fio"),
            f"Python {platform.python_version()}",
        ],
        file_system=_file_system(scratch),
        durability=served.durability,
        durability_reason=served.durability_reason,
        file_bytes=plan.file_bytes,
        size_bytes=served.size_bytes,
        lba_bytes=plan.lba_bytes,
        busy_poll_us=plan.busy_poll_us,
        seconds=wishes.seconds,
        rounds=wishes.rounds,
        loop_refusal=plan.loop_refusal,
        left_out=left_out,
    )


def _file_system(directory: Path) -> str:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return file_system(descriptor)
    finally:
        os.close(descriptor)


def _write(directory: Path, results: Results) -> None:
    """The results first: from them the report can be drawn again."""
    try:
        (directory / "results.json").write_bytes(encode(results))
    except OSError as error:
        raise _cannot_write(directory, error) from error
    _draw(directory, results)


def _draw(directory: Path, results: Results) -> None:
    try:
        (directory / "report.md").write_text(markdown.report(results))
        (directory / "report.html").write_text(page.report(results))
    except OSError as error:
        raise _cannot_write(directory, error) from error


def _cannot_write(directory: Path, error: OSError) -> WorkFailed:
    return WorkFailed(f"cannot write to {directory}: {error.strerror}")
