"""The words of a mount and the descriptor of the helper; real mounts are tested end to end."""

import ctypes
import errno
import os
import socket
import stat
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pmblk import PmblkError
from pmblkd.config import MOUNT_OPTIONS
from pmblkd.fuse import mounting

MOUNTPOINT = Path("/mnt/x")
RDONLY, NOSUID, NODEV, NOEXEC, NOATIME = 1, 2, 4, 8, 1024  # include/uapi/linux/mount.h


class Mounts:
    """Stands in for libc: what mount(2) was asked; `error` is what it says."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.error = 0

    def mount(self, *arguments: Any) -> int:
        self.asked.append(arguments)
        ctypes.set_errno(self.error)
        return -1 if self.error else 0


@pytest.fixture
def libc(monkeypatch: pytest.MonkeyPatch) -> Mounts:
    one = Mounts()
    monkeypatch.setattr(mounting, "_libc", one)
    monkeypatch.setattr(mounting, "DEVICE", Path("/dev/null"))
    return one


def open_descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def mount(*, allow_other: bool = False, options: Sequence[str] = ()) -> int:
    return mounting.mount(MOUNTPOINT, allow_other=allow_other, options=options)


def test_every_option_of_the_config_is_known_here() -> None:
    assert sorted(mounting.OPTIONS) == sorted(MOUNT_OPTIONS)


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ([], NOSUID | NODEV),
        (["ro"], NOSUID | NODEV | RDONLY),
        (["noexec", "noatime"], NOSUID | NODEV | NOEXEC | NOATIME),
        (["ro", "ro"], NOSUID | NODEV | RDONLY),
    ],
    ids=str,
)
def test_options_are_flags_and_no_file_is_a_device_or_set_user_id(
    libc: Mounts, options: list[str], flags: int
) -> None:
    os.close(mount(options=options))
    ((source, target, file_system, asked, _),) = libc.asked
    assert (source, target, file_system) == (b"pmblk", b"/mnt/x", b"fuse.pmblk")
    assert asked == flags


@pytest.mark.parametrize("allow_other", [True, False])
def test_the_kernel_is_told_who_mounts_and_to_look_at_owner_and_mode(
    libc: Mounts, allow_other: bool
) -> None:
    fd = mount(allow_other=allow_other)
    words = libc.asked[0][4].decode().split(",")
    expected = [f"fd={fd}", f"user_id={os.getuid()}", f"group_id={os.getgid()}"]
    assert sorted(words) == sorted(
        [*expected, "rootmode=40555", "default_permissions", *["allow_other"][: int(allow_other)]]
    )
    assert stat.S_ISDIR(int("40555", 8))
    assert not os.get_blocking(fd)
    assert not os.get_inheritable(fd)
    os.close(fd)


def test_a_refusal_of_the_kernel_is_said_and_leaves_no_descriptor(libc: Mounts) -> None:
    before = open_descriptors()
    libc.error = errno.ENOTDIR
    with pytest.raises(PmblkError, match="cannot mount on /mnt/x: Not a directory"):
        mount()
    assert open_descriptors() == before


def test_without_the_device_it_is_said_what_to_do(
    libc: Mounts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mounting, "DEVICE", Path("/dev/no-fuse"))
    with pytest.raises(PmblkError, match="cannot open /dev/no-fuse") as refused:
        mount()
    assert "fuse module" in refused.value.hint
    assert libc.asked == []


# ---- by the helper


class Helper:
    """Stands in for fusermount3: sends `descriptors` over the socket that it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, descriptors: Sequence[int]) -> None:
        self.command: list[str] = []
        self.error: Exception | None = None
        self.status, self.words = 0, ""
        self._descriptors = descriptors
        monkeypatch.setattr(subprocess, "run", self._run)

    def _run(self, command: list[str], **options: Any) -> "subprocess.CompletedProcess[str]":
        self.command = command
        if self.error is not None:
            raise self.error
        number = int(options["env"]["_FUSE_COMMFD"])
        assert options["pass_fds"] == [number]
        if self._descriptors:
            with socket.socket(fileno=os.dup(number)) as ours:
                socket.send_fds(ours, [b"\0"], list(self._descriptors))
        return subprocess.CompletedProcess(command, self.status, "", self.words)


@pytest.mark.parametrize("code", [errno.EPERM, errno.EACCES])
def test_who_may_not_mount_has_the_helper_do_it(
    libc: Mounts, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    libc.error = code
    with open("/dev/zero", "rb") as device:
        helper = Helper(monkeypatch, descriptors=[device.fileno()])
        before = open_descriptors()
        fd = mount(allow_other=True, options=["ro", "noatime"])
        assert os.path.samestat(os.fstat(fd), os.fstat(device.fileno()))
        assert not os.get_blocking(fd)
        assert not os.get_inheritable(fd)
        os.close(fd)
        assert open_descriptors() == before
    program, dash_o, words, *rest = helper.command
    assert (program, dash_o, rest) == ("fusermount3", "-o", ["--", "/mnt/x"])
    assert set(words.split(",")) == {
        *("fsname=pmblk", "subtype=pmblk", "default_permissions", "nosuid", "nodev"),
        *("ro", "noatime", "allow_other"),
    }


@pytest.mark.parametrize(
    ("error", "status", "words", "message"),
    [
        (FileNotFoundError(), 0, "", "it takes root, or fusermount3"),
        (subprocess.TimeoutExpired("fusermount3", 10), 0, "", "did not end in 10 s"),
        (None, 1, "fusermount3: it is not empty\n", "x: fusermount3: it is not empty$"),
        (None, 0, "", "gave no descriptor"),
    ],
)
def test_a_helper_that_fails_is_said_and_leaves_no_descriptor(
    libc: Mounts,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception | None,
    status: int,
    words: str,
    message: str,
) -> None:
    libc.error = errno.EPERM
    helper = Helper(monkeypatch, descriptors=[])
    helper.error, helper.status, helper.words = error, status, words
    before = open_descriptors()
    with pytest.raises(PmblkError, match=message):
        mount()
    assert open_descriptors() == before
