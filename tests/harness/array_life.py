"""The life of a file system on an array whose members fail while it is written: host or guest.

Members fail by command and for real, spares take over, a rebuild and a scrub run under the load;
what was written is there afterwards, and also when the array starts without another member.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

from pmblkd.compare import fio
from tests.harness.arrays import (
    NAME,
    Breakable,
    await_whole,
    create,
    restart,
    scrub,
    served,
    status,
)
from tests.harness.command_line import answer
from tests.harness.daemon import Daemon, scratch
from tests.harness.file_systems import (
    TREE,
    check,
    checksums,
    copy_tree,
    forget_cached,
    guarded,
    make,
    mounted,
)
from tests.harness.programs import assert_no_complaints

Attach = Callable[[Daemon, str], AbstractContextManager[Path]]
Broken = Callable[..., AbstractContextManager[Breakable]]

MEMBERS = {5: 3, 6: 4}  # by level
SECONDS = 150  # after that the daemon is killed, and everybody gets an error
EXPECTED = ("array member failed", "array is degraded")
FIO = (
    *("--rw=randwrite", "--bsrange=4k-64k", "--blockalign=4k", "--size=8m", "--fsync=64"),
    *("--direct=1", "--ioengine=libaio", "--iodepth=8"),
    *("--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0"),
)


def live(kind: str, level: int, broken: Broken, attached: Attach, *, member_bytes: int) -> str:
    """What there was to compare. Raises whatever is wrong."""
    with scratch() as directory, broken(directory / "broken", size=member_bytes) as member:
        files = [f"{directory}/m{number}" for number in range(MEMBERS[level] - 1)]
        spares = [f"{directory}/s{number}" for number in range(2)]
        options = [word for spare in spares for word in ("--spare", spare)]
        options += ["--level", str(level), "--size", str(member_bytes)]
        create([*files, member.place], *options)
        places = [*files, member.place, *spares]
        with (
            served(directory, places, sweep_min="0") as daemon,
            guarded(daemon, seconds=SECONDS),
        ):
            before = _lose_members(daemon, kind, attached, member, files[0])
            assert_no_complaints(daemon, but=EXPECTED)
            # As many of those that are whole as it can be without.
            for gone in files[1:]:
                Path(gone).unlink()
            restart(daemon, places, degraded=True)
            assert status(daemon).state == "degraded"
            with attached(daemon, NAME) as device:
                _compare(device, directory / "fs", before)
                check(kind, device)
            assert_no_complaints(daemon, but=EXPECTED)
    return f"{len(before)} files are the same"


def _lose_members(
    daemon: Daemon, kind: str, attached: Attach, member: Breakable, other: str
) -> dict[str, str]:
    """The checksums of all files, on an array that is whole, with other members."""
    directory = daemon.directory / "fs"
    with attached(daemon, NAME) as device:
        make(kind, device)
        with mounted(device, directory):
            copy_tree(directory)
            with load(directory):
                member.break_it()
                await_whole(daemon, without=member.place)
                answer(daemon, "raid", "fail", NAME, other)
                await_whole(daemon, without=other)
                findings = scrub(daemon)
            assert findings == (), findings
            before = checksums(directory)
        check(kind, device)
        forget_cached(device)
        _compare(device, directory, before)
    return before


def _compare(device: Path, directory: Path, before: dict[str, str]) -> None:
    with mounted(device, directory):
        assert checksums(directory) == before
        assert checksums(directory / TREE.name) == checksums(TREE)


@contextlib.contextmanager
def load(directory: Path, arguments: Sequence[str] = FIO) -> Iterator[None]:
    """fio writes and reads back, again and again, to the end of the block. Raises FioError."""
    enough = threading.Event()

    def again_and_again() -> None:
        while not enough.is_set():
            fio.run([f"--directory={directory}", *arguments], seconds=60)

    with ThreadPoolExecutor() as executor:
        running = executor.submit(again_and_again)
        try:
            yield
        finally:
            enough.set()
        running.result()
