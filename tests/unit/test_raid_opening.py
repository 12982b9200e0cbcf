"""From a place to a member: what is refused, and whether a person is told what to do."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import trio

from pmblk.errors import PmblkError
from pmblk.media import open_media
from pmblk.raid import opening
from pmblk.raid.buffers import buffer
from pmblk.raid.member import Request
from pmblk.raid.opening import open_member

SIZE = 4 << 20


@pytest.fixture
def path(directory: Path) -> Path:
    path = directory / "member"
    path.write_bytes(bytes(SIZE))
    return path


async def refusal(place: "str | Path", **options: Any) -> str:
    with pytest.raises(PmblkError) as caught:
        await open_member(str(place), **options)
    assert caught.value.hint, "and what to do about it"
    return str(caught.value)


async def test_a_file_is_opened_and_used(path: Path) -> None:
    member = await open_member(str(path))
    assert (member.place, member.size, member.block_bytes) == (str(path), SIZE, 512)
    view = buffer(4096)
    view[:4] = b"here"
    await member.write([Request(4096, view)])
    await member.flush()
    member.close()
    assert path.read_bytes()[4096:4100] == b"here"


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("member", "no place for a member; name an absolute path, or a URI: nbd://"),
        ("", "no place for a member"),
        ("ssh://host/member", "nobody here speaks ssh"),
        ("nbd://[::1/x", "is no URI"),
        ("/dev/null", "neither a regular file nor a block device"),
        ("/dev/shm", "is a directory; name a file"),
        ("/dev/shm/none/at/all", "No such file or directory; mend the path, or make the file"),
        ("/dev/shm/\0", "mend the path"),
        ("nbd://", "cannot connect to nbd://"),
    ],
)
async def test_what_is_no_member_is_refused_with_what_to_do(place: str, words: str) -> None:
    assert words in await refusal(place, timeout_seconds=5)


async def test_files_that_have_no_room_are_refused(path: Path) -> None:
    os.truncate(path, 0)
    assert f"is empty; make it larger: truncate -s 1G {path}" in await refusal(path)
    os.truncate(path, 1 << 20)
    assert "has 1 MiB: too small for a member; it needs more than 1" in await refusal(path)
    os.truncate(path, SIZE)
    (await open_member(str(path))).close()


async def test_a_fifo_is_refused_and_nobody_waits_for_its_other_end(directory: Path) -> None:
    os.mkfifo(directory / "fifo")
    with trio.fail_after(5):
        assert "neither a regular file" in await refusal(directory / "fifo")


async def test_a_file_of_another_array_or_of_a_namespace_is_refused(path: Path) -> None:
    first = await open_member(str(path))
    assert f"in use by process {os.getpid()}" in await refusal(path)
    alias = path.with_name("alias")
    alias.hardlink_to(path)
    assert "in use by process" in await refusal(alias), "by whatever name"
    first.close()
    media = open_media(path)
    assert "in use by process" in await refusal(path)
    media.close()
    (await open_member(str(path))).close()


async def test_a_file_that_another_process_has_is_refused(path: Path) -> None:
    script = f"""
import trio
from pmblk.raid.opening import open_member
member = trio.run(open_member, {str(path)!r})
print(flush=True)
input()
"""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", script], stdin=pipe, stdout=pipe) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        assert f"in use by process {process.pid}" in await refusal(path)
        process.communicate(b"\n", timeout=10)
    (await open_member(str(path))).close()


async def test_who_only_reads_may_look_at_a_member_in_service(path: Path) -> None:
    member = await open_member(str(path))
    watcher = await open_member(str(path), read_only=True)
    await watcher.read([Request(0, buffer(4096))])
    with pytest.raises(OSError, match="Bad file descriptor"):
        await watcher.write([Request(0, buffer(4096))])
    watcher.close()
    member.close()


async def test_rights_that_are_missing_are_said(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    assert "Permission denied; mend its rights" in await refusal(path)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("cancelled", [False, True])
async def test_a_device_that_does_not_answer_is_given_up_and_closed_when_it_does(
    path: Path, monkeypatch: pytest.MonkeyPatch, cancelled: bool
) -> None:
    begun, go_on, closed = threading.Event(), threading.Event(), threading.Event()
    real = opening._open_file

    def slow(*words: Any, **options: Any) -> Any:
        begun.set()
        assert go_on.wait(30)
        member = real(*words, **options)
        close = member.close
        member.close = lambda: (close(), closed.set())  # type: ignore[assignment, func-returns-value]
        return member

    monkeypatch.setattr(opening, "_open_file", slow)
    if cancelled:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(open_member, str(path))
            await trio.to_thread.run_sync(begun.wait)
            nursery.cancel_scope.cancel()
    else:
        assert "does not answer in 0.05 s" in await refusal(path, timeout_seconds=0.05)
    go_on.set()
    assert await trio.to_thread.run_sync(closed.wait, 10)
    monkeypatch.undo()
    (await open_member(str(path))).close()


async def test_a_refusal_leaves_no_file_open(path: Path) -> None:
    async def refuse_all() -> None:
        held = await open_member(str(path))
        await refusal(path)
        held.close()
        os.truncate(path, 4096)
        await refusal(path)
        os.truncate(path, 0)
        await refusal(path)
        os.truncate(path, SIZE)

    await refuse_all()  # with the threads that it starts
    before = open_files()
    await refuse_all()
    assert open_files() == before
