"""Members that are not what they should be: refused in words that help, or lived without."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import nbd
import pytest

from tests.harness.arrays import (
    MIB,
    NAME,
    Server,
    ask,
    await_whole,
    config_of,
    create,
    scrub,
    served,
    server,
    status,
)
from tests.harness.block_writer import connected
from tests.harness.command_line import complaint, pmblk
from tests.harness.daemon import Daemon, scratch

pytestmark = pytest.mark.e2e

MEMBER_BYTES = 16 * MIB
SUPERBLOCKS = (4096, 8192)
CONTENT = bytes(range(256)) * 4096  # 1 MiB


@contextlib.contextmanager
def array(level: str, count: int, *options: str) -> Iterator[list[Path]]:
    """The members of one that is not served."""
    with scratch() as directory:
        files = [directory / f"m{number}" for number in range(count)]
        words = ["--level", level, "--chunk", "16KiB", "--size", str(MEMBER_BYTES), *options]
        create([str(file) for file in files], *words)
        yield files


def places_of(files: list[Path]) -> list[str]:
    return [str(file) for file in files]


def refused(files: list[Path], **raid: object) -> str:
    """What a daemon says that does not start."""
    daemon = Daemon(files[0].parent, config_of(files[0].parent, places_of(files), **raid))
    try:
        daemon.start()
    except AssertionError:
        return daemon.log
    daemon.stop()
    raise AssertionError(f"it has started:\n{daemon.log}")


def flip(file: Path, offset: int, length: int = 1) -> None:
    with file.open("r+b") as stream:
        stream.seek(offset)
        found = stream.read(length)
        stream.seek(offset)
        stream.write(bytes(byte ^ 0xFF for byte in found))


def write(daemon: Daemon, content: bytes = CONTENT, offset: int = 0) -> None:
    with connected(daemon, NAME) as handle:
        handle.pwrite(content, offset)
        handle.flush()


def read(daemon: Daemon, length: int = len(CONTENT), offset: int = 0) -> bytes:
    with connected(daemon, NAME) as handle:
        return bytes(handle.pread(length, offset))


# ---- a start


def missing(files: list[Path]) -> None:
    files[1].unlink()


def empty(files: list[Path]) -> None:
    os.truncate(files[1], 0)


def too_small(files: list[Path]) -> None:
    os.truncate(files[1], 64 << 10)


def cut_short(files: list[Path]) -> None:
    os.truncate(files[1], MEMBER_BYTES // 2)


def blank(files: list[Path]) -> None:
    files[1].write_bytes(bytes(MEMBER_BYTES))


def both_superblocks_damaged(files: list[Path]) -> None:
    for offset in SUPERBLOCKS:
        flip(files[1], offset + 100)


def of_another_array(files: list[Path]) -> None:
    files[1].unlink()
    create([str(files[1]), f"{files[1]}.other"], "--level", "1", "--size", str(MEMBER_BYTES))


SPOILT = [
    (missing, "No such file or directory"),
    (empty, "m1 is empty"),
    (too_small, "too small for a member"),
    (cut_short, "it was cut short: 8388608 bytes of"),
    (blank, "m1: left out: it has no superblock: it was never a member, or is erased"),
    (both_superblocks_damaged, "m1: left out: its superblock cannot be used"),
]


@pytest.mark.parametrize(("spoil", "words"), SPOILT, ids=lambda one: getattr(one, "__name__", ""))
def test_a_member_that_cannot_be_used_is_named_with_the_reason_and_can_be_done_without(
    spoil: Callable[[list[Path]], None], words: str
) -> None:
    with array("5", 3) as files:
        spoil(files)
        said = refused(files)
        assert words in said
        assert "1 of 3 members are missing" in said
        assert "allow it to start degraded (--degraded)" in said
        with served(files[0].parent, places_of(files), degraded=True) as daemon:
            assert status(daemon).state == "degraded"
            write(daemon)
            assert read(daemon) == CONTENT


def test_a_member_of_another_array_is_refused_by_the_name_of_that() -> None:
    with array("5", 3) as files:
        of_another_array(files)
        assert "these devices are of several arrays: data (" in refused(files)


def test_a_superblock_that_is_damaged_has_another_one_beside_it() -> None:
    for offset in SUPERBLOCKS:
        with array("5", 3) as files:
            flip(files[1], offset + 100)
            # The older one may know less than the others do; then it is left out, never believed.
            with served(files[0].parent, places_of(files), degraded=True) as daemon:
                write(daemon)
                assert read(daemon) == CONTENT


def test_a_copy_of_a_member_is_no_second_one() -> None:
    with array("5", 3) as files:
        copy = files[1].with_name("copy")
        shutil.copy(files[1], copy)
        said = refused([*files, copy])
        assert "m1 and " in said
        assert "one is a copy; leave it away" in said


def test_a_member_belongs_to_one_array_in_service() -> None:
    with array("5", 3) as files, served(files[0].parent, places_of(files)):
        taken = pmblk("raid", "create", "other", str(files[0]), "--level", "0", "--force")
        assert "is in use" in complaint(taken)


# ---- in service


def test_a_file_that_is_cut_short_in_service_is_lived_without_and_never_read_as_zeroes() -> None:
    with array("5", 3) as files, served(files[0].parent, places_of(files)) as daemon:
        size = daemon.report(NAME).size_bytes
        for offset in range(0, size, MIB):
            write(daemon, CONTENT[: size - offset], offset)
        os.truncate(files[1], MEMBER_BYTES // 2)
        write(daemon, CONTENT, size // MIB * MIB - MIB)
        for offset in range(0, size, MIB):
            expected = CONTENT[: size - offset]
            assert read(daemon, len(expected), offset) == expected
        (failed,) = (one for one in status(daemon).members if one.state == "faulty")
        assert failed.place == str(files[1])
        assert "cut short" in failed.reason
        assert 'event="array member failed"' in daemon.log


@contextlib.contextmanager
def with_a_server() -> Iterator[tuple[Daemon, Server, Path]]:
    """An array of level 5 in service, its last member an export of this server."""
    with scratch() as directory, server(directory / "remote", size=MEMBER_BYTES) as remote:
        places = [f"{directory}/m0", f"{directory}/m1", remote.uri]
        create(places, "--level", "5", "--chunk", "16KiB", "--size", str(MEMBER_BYTES))
        with served(directory, places, member_timeout_seconds=1, sweep_min="0") as daemon:
            write(daemon)
            yield daemon, remote, directory


def test_a_member_that_hangs_is_out_in_time_and_comes_back_with_what_it_lacks() -> None:
    with with_a_server() as (daemon, remote, _):
        remote.hang()
        try:
            assert read(daemon) == CONTENT
            write(daemon, CONTENT[::-1])
            assert status(daemon).state == "degraded"
            assert read(daemon) == CONTENT[::-1]
        finally:
            remote.go_on()
        ask(daemon, "add", member=remote.uri)
        await_whole(daemon)
        assert scrub(daemon) == ()
        assert 'event="array member is back"' in daemon.log


def test_a_member_that_is_stale_is_left_out_until_it_is_added() -> None:
    with with_a_server() as (daemon, remote, directory):
        remote.kill()
        write(daemon, CONTENT[::-1])
        assert daemon.stop() == 0
        remote.start()
        daemon.start()
        assert status(daemon).state == "degraded", "nobody takes it for what it was"
        assert read(daemon) == CONTENT[::-1]
        ask(daemon, "add", member=remote.uri)
        await_whole(daemon)
        assert scrub(daemon) == ()
        ask(daemon, "fail", member=f"{directory}/m0")
        assert read(daemon) == CONTENT[::-1], "it has what was written without it"


def test_one_loss_too_many_is_an_error_for_what_is_lost_and_for_nothing_else() -> None:
    with with_a_server() as (daemon, remote, directory):
        ask(daemon, "fail", member=f"{directory}/m0")
        remote.kill()
        found, errors = [], set()
        for offset in range(0, len(CONTENT), 4096):
            try:
                found.append((offset, read(daemon, 4096, offset)))
            except nbd.Error as error:
                errors.add(error.errno)
        assert errors == {"EIO"}, "two members of three are gone"
        assert found, "a third of all chunks is on the one that is left"
        for offset, data in found:
            assert data == CONTENT[offset : offset + 4096]
        with pytest.raises(nbd.Error):
            write(daemon)
        assert daemon.log.count("array cannot be without a member that fails") == 1
        daemon.kill()  # it cannot be stopped cleanly


def test_a_member_that_lies_is_named_by_a_scrub_of_level_6() -> None:
    with array("6", 4) as files, served(files[0].parent, places_of(files)) as daemon:
        write(daemon)
        liar = files[2]
        at = liar.read_bytes().find(CONTENT[:4096])
        assert at > 0
        flip(liar, at, 4096)
        assert f"{liar} at byte {at}" in "\n".join(scrub(daemon))
        scrub(daemon, repair=True)
        assert scrub(daemon) == ()
        assert read(daemon) == CONTENT


def test_a_member_that_lies_is_found_out_by_checksums_and_healed_by_reading() -> None:
    with (
        array("5", 3, "--integrity") as files,
        served(files[0].parent, places_of(files)) as daemon,
    ):
        write(daemon)
        at = files[1].read_bytes().find(CONTENT[:4096])
        assert at > 0
        flip(files[1], at, 4096)
        assert read(daemon) == CONTENT
        assert files[1].read_bytes()[at : at + 4096] == CONTENT[:4096], "it is healed"
        assert scrub(daemon) == ()
