"""The mounted directory: a file a namespace, and what the kernel may and may not do with it.

All of it holds for both engines and for each way that bytes can go, but for what says otherwise by
its name: past the daemon go reads and writes of files that are opened with dax = "fast".
"""

import contextlib
import errno
import mmap
import os
import select
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pmblkd.compare import fio
from tests.e2e.fuse_files import WAYS, Way, client, counters_of, opened, refused
from tests.harness.daemon import Daemon, scratch
from tests.harness.file_systems import guarded, run
from tests.harness.programs import assert_no_complaints, wait_for

pytestmark = pytest.mark.e2e

MIB = 1 << 20
SIZE = 32 * MIB
HANG_SECONDS = 60
CONFIG = """
[[namespace]]
name = "data"
path = "{dir}/data.img"
size = "32MiB"
dax = "DAX"

[[namespace]]
name = "fixed"
path = "{dir}/fixed.img"
read_only = true
dax = "DAX"

[nbd]
listen = ["unix:{dir}/nbd.sock"]

[fuse]
mountpoint = "{dir}/mnt"
engine = "ENGINE"
"""


@contextlib.contextmanager
def served(way: Way) -> Iterator[Daemon]:
    """A daemon that is killed rather than let anybody wait for its mount for ever."""
    with scratch() as directory:
        (directory / "fixed.img").write_bytes(bytes(range(256)) * 4096)
        text = CONFIG.replace("ENGINE", way.engine).replace("DAX", way.dax)
        daemon = Daemon(directory, text.replace("{dir}", str(directory))).start()
        try:
            with guarded(daemon, seconds=HANG_SECONDS):
                yield daemon
        finally:
            if daemon.running:
                daemon.stop()


@pytest.fixture(scope="module", params=WAYS)
def way(request: pytest.FixtureRequest) -> Way:
    return WAYS[request.param]


@pytest.fixture(scope="module")
def daemon(way: Way) -> Iterator[Daemon]:
    with served(way) as one:
        yield one


@pytest.fixture(scope="module")
def mnt(daemon: Daemon) -> Path:
    return daemon.directory / "mnt"


def only(*names: str) -> pytest.MarkDecorator:
    """For a test of those ways alone."""
    return pytest.mark.parametrize("way", names, indirect=True)


# ---- what stat, ls and df show


def test_every_namespace_is_a_file_of_its_size_and_rights(mnt: Path) -> None:
    assert sorted(os.listdir(mnt)) == ["data", "fixed"]
    data, fixed = (mnt / "data").stat(), (mnt / "fixed").stat()
    assert (data.st_size, stat.filemode(data.st_mode)) == (SIZE, "-rw-------")
    assert (fixed.st_size, stat.filemode(fixed.st_mode)) == (MIB, "-r--------")
    assert stat.filemode(mnt.stat().st_mode) == "dr-xr-xr-x"
    assert (data.st_uid, data.st_nlink) == (os.getuid(), 1)


def test_directory_entries_carry_the_inode_that_stat_shows(mnt: Path) -> None:
    with os.scandir(mnt) as entries:
        listed = {entry.name: entry.inode() for entry in entries}
    assert listed == {name: (mnt / name).stat().st_ino for name in listed}


def test_a_file_has_the_blocks_that_were_written(way: Way) -> None:
    with served(way) as fresh:
        path = fresh.directory / "mnt" / "data"
        with opened(path) as fd:
            before = os.fstat(fd).st_blocks
            os.pwrite(fd, b"x" * MIB, 8 * MIB)
        # Another view of the same number: nothing is cached there.
        allocated = fresh.report("data").allocated_bytes
        assert before * 512 < MIB
        assert MIB <= allocated <= MIB + before * 512
        assert (fresh.directory / "data.img").stat().st_blocks * 512 == allocated


def test_df_shows_the_namespaces_together(mnt: Path) -> None:
    shown = os.statvfs(mnt)
    assert shown.f_frsize * shown.f_blocks == SIZE + MIB
    assert 0 < shown.f_bavail <= shown.f_blocks
    assert shown.f_files == 3
    assert "pmblk" in run("df", "--output=source", str(mnt))


# ---- the data


def test_what_is_written_is_read_back(mnt: Path) -> None:
    pattern = os.urandom(3 * MIB + 123)
    with opened(mnt / "data") as fd:
        assert os.pwrite(fd, pattern, 4097) == len(pattern)
        assert os.pread(fd, len(pattern), 4097) == pattern
        os.fsync(fd)
        os.fdatasync(fd)


def test_a_read_is_short_at_the_end_and_empty_past_it(mnt: Path) -> None:
    with opened(mnt / "data") as fd:
        assert len(os.pread(fd, 8192, SIZE - 100)) == 100
        assert os.pread(fd, 8192, SIZE) == b""
        assert os.pread(fd, 8192, SIZE + MIB) == b""


@only("pyfuse3", "off", "auto")
def test_a_write_is_short_at_the_end_and_finds_no_space_past_it(mnt: Path) -> None:
    with opened(mnt / "data") as fd:
        assert os.pwrite(fd, b"y" * 8192, SIZE - 100) == 100
        assert os.pread(fd, 8192, SIZE - 100) == b"y" * 100
        for offset in (SIZE, SIZE + 1, SIZE + 10 * MIB):
            with refused(errno.ENOSPC):
                os.pwrite(fd, b"z", offset)
        assert os.fstat(fd).st_size == SIZE


def test_what_a_fast_client_writes_past_the_end_is_cut_off_with_a_warning() -> None:
    """At its fsync, and at its close(2). Nobody else ever sees another size."""
    with served(WAYS["fast"]) as daemon, opened(daemon.directory / "mnt" / "data") as other:
        media = daemon.directory / "data.img"
        with opened(daemon.directory / "mnt" / "data") as fd:
            assert os.pwrite(fd, b"y" * 8192, SIZE - 100) == 8192
            assert media.stat().st_size == SIZE + 8092, "it goes past the daemon"
            assert os.fstat(fd).st_size == os.fstat(other).st_size == SIZE
            os.fsync(fd)
            assert media.stat().st_size == SIZE
            assert os.pread(fd, 8192, SIZE - 100) == b"y" * 100
            os.pwrite(fd, b"z", SIZE + MIB)
        wait_for(lambda: media.stat().st_size == SIZE)  # close(2) does not wait for the daemon
        assert daemon.log.count("wrote past the end") == 2
        assert f"bytes={MIB + 1}" in daemon.log
        assert os.fstat(other).st_size == SIZE
        assert int(run("nbdinfo", "--size", daemon.uri("data"))) == SIZE


def direct_io(daemon: Daemon, mnt: Path) -> dict[str, int]:
    """Write a mebibyte and read it back, past all caches; what the daemon counted of it."""
    source, target = mmap.mmap(-1, MIB), mmap.mmap(-1, MIB)
    source[:] = os.urandom(MIB)
    before = counters(daemon)
    with opened(mnt / "data", os.O_RDWR | os.O_DIRECT) as fd:
        assert os.pwrite(fd, source, MIB) == MIB
        assert os.preadv(fd, [target], MIB) == MIB
    assert target[:] == source[:]
    return {key: count - before[key] for key, count in counters(daemon).items()}


@only("fast")
def test_direct_io_of_a_fast_client_is_not_counted(daemon: Daemon, mnt: Path) -> None:
    assert not any(direct_io(daemon, mnt).values())


@only("pyfuse3", "off", "auto")
def test_direct_io_moves_a_mebibyte_at_once(daemon: Daemon, mnt: Path) -> None:
    counted = direct_io(daemon, mnt)
    assert counted == {
        **dict.fromkeys(counted, 0),
        "writes": 1,
        "write_bytes": MIB,
        "reads": 1,
        "read_bytes": MIB,
        "prp_entries": 2 * MIB // 4096,
        "prp_list_pages": 2,
    }


def test_an_fsync_is_a_flush(daemon: Daemon, mnt: Path) -> None:
    before = counters(daemon)["flushes"]
    with opened(mnt / "data") as fd:
        os.fsync(fd)
    assert counters(daemon)["flushes"] == before + 1


def counters(daemon: Daemon) -> dict[str, int]:
    return counters_of(daemon, "data")


def test_a_write_here_is_seen_over_nbd_at_once_and_the_other_way_round(
    daemon: Daemon, mnt: Path
) -> None:
    with opened(mnt / "data") as fd, client(daemon, "data") as handle:
        for turn in range(50):
            offset = turn * 4096
            here, there = os.urandom(4096), os.urandom(4096)
            os.pwrite(fd, here, offset)
            assert bytes(handle.pread(4096, offset)) == here
            handle.pwrite(there, offset)
            assert os.pread(fd, 4096, offset) == there


def test_fio_with_many_requests_in_flight_finds_what_it_wrote(mnt: Path) -> None:
    result = fio.run(
        [
            f"--filename={mnt}/data",
            f"--size={SIZE}",
            *("--rw=randwrite", "--bsrange=4k-64k", "--direct=1"),
            *("--ioengine=libaio", "--iodepth=16", "--verify=crc32c", "--verify_fatal=1"),
            "--verify_state_save=0",
        ],
        seconds=HANG_SECONDS,
    )
    assert result.read.ios == result.write.ios > 500


# ---- what is refused


def _truncate(mnt: Path) -> None:
    os.truncate(mnt / "data", MIB)


def _open_and_empty(mnt: Path) -> None:
    with opened(mnt / "data", os.O_RDWR | os.O_TRUNC):
        pass


def _create(mnt: Path) -> None:
    with opened(mnt / "new", os.O_RDWR | os.O_CREAT):
        pass


CHANGES: dict[str, Callable[[Path], None]] = {
    "shrinking a file": _truncate,
    "growing a file": lambda mnt: os.truncate(mnt / "data", 2 * SIZE),
    "emptying a file at its opening": _open_and_empty,
    "making a file": _create,
    "making a directory": lambda mnt: os.mkdir(mnt / "new"),
    "making a fifo": lambda mnt: os.mkfifo(mnt / "new"),
    "removing a file": lambda mnt: os.unlink(mnt / "data"),
    "renaming a file": lambda mnt: os.rename(mnt / "data", mnt / "new"),
    "renaming a file over another": lambda mnt: os.rename(mnt / "data", mnt / "fixed"),
    "linking a file": lambda mnt: os.link(mnt / "data", mnt / "new"),
    "making a symbolic link": lambda mnt: os.symlink("data", mnt / "new"),
    "changing a mode": lambda mnt: os.chmod(mnt / "data", 0o644),
    "changing an owner": lambda mnt: os.chown(mnt / "data", 1, 1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_tree_cannot_be_changed(mnt: Path, change: str) -> None:
    with refused(errno.EPERM):
        CHANGES[change](mnt)
    assert sorted(os.listdir(mnt)) == ["data", "fixed"]
    assert (mnt / "data").stat().st_size == SIZE


def test_a_file_may_be_truncated_to_the_size_that_it_has(mnt: Path) -> None:
    os.truncate(mnt / "data", SIZE)


def test_a_name_that_is_not_there_is_not_found(mnt: Path) -> None:
    with refused(errno.ENOENT):
        (mnt / "nowhere").stat()


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR, os.O_RDWR | os.O_TRUNC])
def test_a_read_only_namespace_cannot_be_opened_for_writing(mnt: Path, flags: int) -> None:
    with refused(errno.EROFS, errno.EACCES, errno.EPERM), opened(mnt / "fixed", flags):
        pass


def test_a_read_only_namespace_can_be_read(mnt: Path) -> None:
    assert (mnt / "fixed").read_bytes() == bytes(range(256)) * 4096


def test_a_read_only_namespace_can_be_mapped_but_not_to_store_there(way: Way, mnt: Path) -> None:
    """A private mapping may be stored to: its pages are its own."""
    with opened(mnt / "fixed", os.O_RDONLY) as fd:
        with refused(errno.EACCES if way.engine == "kernel" else errno.ENODEV, errno.EACCES):
            mmap.mmap(fd, MIB, flags=mmap.MAP_SHARED)
        with mmap.mmap(fd, MIB, flags=mmap.MAP_PRIVATE) as private:
            assert private[:256] == bytes(range(256))
            private[:4] = b"mine"
        if way.engine == "kernel":
            with mmap.mmap(fd, MIB, prot=mmap.PROT_READ) as shared:
                assert shared[:256] == bytes(range(256))


@only("pyfuse3")
def test_libfuse_has_no_shared_mapping(mnt: Path) -> None:
    with opened(mnt / "data") as fd, refused(errno.ENODEV):
        mmap.mmap(fd, MIB)


def test_the_kernel_asks_only_once_for_extended_attributes(daemon: Daemon, mnt: Path) -> None:
    """The daemon is stopped for the second question: only the kernel can answer it."""
    with opened(mnt / "data", os.O_RDONLY) as fd:
        with refused(errno.ENOTSUP):
            os.getxattr(fd, "security.capability")
        os.kill(daemon.pid, signal.SIGSTOP)
        try:
            answer = _ask_for_an_attribute(fd, go_on=lambda: os.kill(daemon.pid, signal.SIGCONT))
        finally:
            os.kill(daemon.pid, signal.SIGCONT)
    assert answer == f"{errno.ENOTSUP}\n"


def _ask_for_an_attribute(fd: int, *, go_on: Callable[[], None]) -> str:
    """In a child with a time limit. Its exit closes the file, which asks the daemon: `go_on`."""
    code = f"""if True:
        import os
        try:
            os.getxattr({fd}, "security.capability")
        except OSError as error:
            print(error.errno, flush=True)
    """
    with subprocess.Popen(
        [sys.executable, "-c", code], pass_fds=[fd], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        ready, _, _ = select.select([child.stdout], [], [], 10)
        answer = child.stdout.readline() if ready else "none in time"
        go_on()
        child.wait(10)
    return answer


# ---- after all of the above


def test_none_of_it_was_worth_a_complaint(daemon: Daemon) -> None:
    assert_no_complaints(daemon)
