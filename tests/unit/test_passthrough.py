"""Backing files and their ids, with a kernel that is played."""

import errno
import fcntl
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pmblkd.config import Dax
from pmblkd.fuse import passthrough
from pmblkd.fuse.dax import Way
from pmblkd.fuse.passthrough import Passthrough
from pmblkd.registry import Served
from tests.unit.conftest import LogRecord, MakeNamespace, memory, registered
from tests.unit.fuse_kernel import BackingFiles

SIZE = 1 << 20
DEVICE, MINOR = 77, 0xFFFFF  # no mount of this machine is likely to have that one


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> BackingFiles:
    return BackingFiles(monkeypatch)


@pytest.fixture
def backings(kernel: BackingFiles) -> Passthrough:
    one = Passthrough()
    one.attach(DEVICE, minor=MINOR, refusal="")
    return one


@pytest.fixture
def serve(make_namespace: MakeNamespace) -> Callable[..., Served]:
    """A namespace in service, number 1; `dax` as the config has it."""

    def serve_one(dax: Dax = "auto", **options: Any) -> Served:
        (served,) = registered(make_namespace(**options))
        set_dax(served, dax)
        return served

    return serve_one


def set_dax(served: Served, dax: Dax) -> None:
    served.config = msgspec.structs.replace(served.config, dax=dax)


# ---- what the kernel is asked


def test_the_kernel_is_given_the_descriptor_and_asked_for_its_id(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[int, int, bytes]] = []

    def ioctl(device: int, request: int, argument: "bytes | bytearray") -> Any:
        asked.append((device, request, bytes(argument)))
        return 9 if isinstance(argument, bytearray) else bytes(argument)

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    assert passthrough.register(DEVICE, 5) == 9
    passthrough.unregister(DEVICE, 9)
    opening, closing = 1 << 30 | 16 << 16 | 229 << 8 | 1, 1 << 30 | 4 << 16 | 229 << 8 | 2
    assert asked == [
        (DEVICE, opening, struct.pack("<iIQ", 5, 0, 0)),
        (DEVICE, closing, struct.pack("<I", 9)),
    ]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.EPERM, "passthrough takes CAP_SYS_ADMIN"),
        (errno.ELOOP, "stacked file system (overlay, FUSE); move it"),
        (errno.EOPNOTSUPP, "Linux 6.9 has, for regular files"),
        (errno.ENOTTY, "this kernel has no passthrough"),
        (errno.EINVAL, "this kernel has no passthrough"),
        (errno.EMFILE, "passthrough: Too many open files"),
    ],
)
def test_a_refusal_of_the_kernel_is_said_in_words_and_the_daemon_serves(
    serve: Callable[..., Served], backings: Passthrough, kernel: BackingFiles, code: int, words: str
) -> None:
    served = serve()
    kernel.error = code
    way, reason = backings.describe(served)
    assert way is Way.DAEMON
    assert words in reason
    assert backings.open(served) == (Way.DAEMON, 0)
    backings.close(served)
    assert served.dax_opens == 0


@pytest.mark.parametrize("code", [errno.EPERM, errno.ELOOP, errno.EOPNOTSUPP])
def test_what_the_kernel_will_never_take_it_is_asked_once(
    serve: Callable[..., Served], backings: Passthrough, kernel: BackingFiles, code: int
) -> None:
    served = serve()
    kernel.error = code
    first = backings.describe(served)
    kernel.error = 0
    assert backings.describe(served) == first
    assert kernel.given == 0


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC])
def test_a_shortage_passes(
    serve: Callable[..., Served], backings: Passthrough, kernel: BackingFiles, code: int
) -> None:
    served = serve()
    kernel.error = code
    assert backings.open(served) == (Way.DAEMON, 0)
    kernel.error = 0
    assert backings.open(served) == (Way.DAEMON, 0), "as the one before it, which is still open"
    backings.close(served)
    backings.close(served)
    assert backings.open(served)[0] is Way.DAX


def test_a_shortage_at_an_opening_has_the_daemon_serve_the_file(
    serve: Callable[..., Served], backings: Passthrough, kernel: BackingFiles, logged: LogRecord
) -> None:
    served = serve()
    assert backings.describe(served) == (Way.DAX, "")
    kernel.error = errno.EMFILE
    assert backings.open(served) == (Way.DAEMON, 0)
    assert "Too many open files" in logged.expect("a file goes through the daemon")["reason"]
    assert served.dax_opens == 0
    backings.close(served)


def test_a_mount_without_passthrough_says_so(serve: Callable[..., Served]) -> None:
    backings, served = Passthrough(), serve()
    assert backings.describe(served) == (Way.DAEMON, "not mounted")
    backings.attach(DEVICE, minor=MINOR, refusal="this kernel has no passthrough")
    assert backings.describe(served) == (Way.DAEMON, "this kernel has no passthrough")
    assert backings.open(served) == (Way.DAEMON, 0)


def test_asking_how_a_file_goes_leaves_nothing_with_the_kernel(
    serve: Callable[..., Served], backings: Passthrough, kernel: BackingFiles
) -> None:
    served = serve()
    for _ in range(3):
        assert backings.describe(served) == (Way.DAX, "")
    assert (kernel.given, kernel.open) == (1, {})
    assert served.users == served.dax_opens == 0


# ---- opens


@pytest.mark.parametrize(
    ("dax", "options", "way"),
    [
        ("auto", {}, Way.DAX),
        ("fast", {}, Way.FAST),
        ("off", {}, Way.DAEMON),
        ("auto", {"kind": "page-cache"}, Way.DAEMON),
        ("fast", {"kind": "struct-page", "options": {"memmap": "device"}}, Way.DAEMON),
    ],
    ids=str,
)
def test_all_opens_of_a_file_share_one_id_that_is_closed_once(
    serve: Callable[..., Served],
    backings: Passthrough,
    kernel: BackingFiles,
    dax: Dax,
    options: dict[str, Any],
    way: Way,
) -> None:
    served = serve(dax, **options)
    answers = [backings.open(served) for _ in range(3)]
    assert {one for one, _ in answers} == {way}
    ids = {backing for _, backing in answers}
    passes = way is not Way.DAEMON
    assert set(kernel.open) == (ids if passes else set())
    assert ids != {0} if passes else ids == {0}
    assert served.dax_opens == (3 if passes else 0)
    for left in (2, 1):
        backings.close(served)
        assert len(kernel.open) == passes
        assert served.dax_opens == left * passes
    backings.close(served)
    assert not kernel.open
    assert served.dax_opens == 0


def test_the_kernel_gets_the_media_by_a_descriptor_of_its_own(
    serve: Callable[..., Served], backings: Passthrough, kernel: BackingFiles
) -> None:
    served = serve()
    before = set(os.listdir("/proc/self/fd"))
    _, backing = backings.open(served)
    assert os.path.samestat(kernel.open[backing], memory(served).media.path.stat())
    assert set(os.listdir("/proc/self/fd")) == before, "ours is closed at once"
    backings.close(served)


def test_files_of_two_namespaces_do_not_share_an_id(
    make_namespace: MakeNamespace, backings: Passthrough, kernel: BackingFiles
) -> None:
    first, second = make_namespace(name="a.img"), make_namespace(name="b.img")
    first.name, second.name = "a", "b"
    one, other = registered(first, second)
    assert backings.open(one)[1] != backings.open(other)[1]
    backings.close(one)
    assert len(kernel.open) == 1
    backings.close(other)
    assert not kernel.open


@pytest.mark.parametrize(
    ("before", "after"), [("auto", "off"), ("off", "auto"), ("auto", "fast"), ("fast", "off")]
)
def test_a_file_goes_the_way_that_it_was_opened_until_its_last_release(
    serve: Callable[..., Served],
    backings: Passthrough,
    kernel: BackingFiles,
    before: Dax,
    after: Dax,
) -> None:
    """The kernel refuses a mixture."""
    served = serve(before)
    began, _ = backings.open(served)
    set_dax(served, after)
    assert backings.open(served)[0] is began
    assert backings.describe(served) == (began, "its open files began that way; close them all")
    backings.close(served)
    assert backings.open(served)[0] is began
    backings.close(served)
    backings.close(served)
    assert not kernel.open
    assert backings.open(served)[0] is not began
    backings.close(served)


@pytest.mark.parametrize(("dax", "changes"), [("auto", 1), ("fast", 1), ("off", 0)])
def test_a_sync_covers_what_clients_stored(
    serve: Callable[..., Served],
    backings: Passthrough,
    monkeypatch: pytest.MonkeyPatch,
    dax: Dax,
    changes: int,
) -> None:
    served = serve(dax)
    told: list[str] = []
    monkeypatch.setattr(
        memory(served).media.durability, "layout_changed", lambda: told.append("changed")
    )
    backings.synced(served)
    assert told == [], "nobody has it open"
    backings.open(served)
    backings.synced(served)
    assert len(told) == changes
    backings.close(served)


# ---- past the end


def grow(served: Served, length: int) -> None:
    """A client writes past the end, which the daemon does not see."""
    with memory(served).media.path.open("ab") as file:
        file.write(b"x" * length)


@pytest.mark.parametrize("when", ["sync", "close"])
def test_what_a_fast_client_wrote_past_the_end_is_cut_off_with_a_warning(
    serve: Callable[..., Served], backings: Passthrough, logged: LogRecord, when: str
) -> None:
    served = serve("fast")
    backings.open(served)
    backings.open(served)
    grow(served, 5000)
    backings.synced(served) if when == "sync" else backings.close(served)
    record = logged.expect("a client wrote past the end: what it wrote there is cut off")
    assert (record["name"], record["bytes"]) == ("ns", 5000)
    assert memory(served).media.path.stat().st_size == SIZE
    backings.synced(served)
    backings.close(served)


@pytest.mark.parametrize("dax", ["auto", "off"])
def test_where_the_daemon_sees_every_write_nothing_is_cut(
    serve: Callable[..., Served], backings: Passthrough, dax: Dax
) -> None:
    served = serve(dax)
    backings.open(served)
    grow(served, 5000)
    backings.synced(served)
    backings.close(served)
    assert memory(served).media.path.stat().st_size == SIZE + 5000


def test_a_read_only_file_is_not_ours_to_cut(
    serve: Callable[..., Served], backings: Passthrough, directory: Path
) -> None:
    (directory / "media.img").write_bytes(bytes(SIZE))
    served = serve("fast", read_only=True)
    assert backings.open(served)[0] is Way.FAST
    grow(served, 5000)
    backings.close(served)
    assert memory(served).media.path.stat().st_size == SIZE + 5000


def test_an_end_that_cannot_be_cut_keeps_no_id(
    serve: Callable[..., Served],
    backings: Passthrough,
    kernel: BackingFiles,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    served = serve("fast")
    backings.open(served)

    def fail() -> int:
        raise OSError(errno.EIO, "disk")

    monkeypatch.setattr(memory(served).media, "cut_excess", fail)
    with pytest.raises(OSError, match="disk"):
        backings.close(served)
    assert (kernel.open, served.dax_opens) == ({}, 0)
    assert backings.open(served)[1] == kernel.given, "a new one"


# ---- the mount's end


@pytest.mark.parametrize("dax", ["auto", "fast", "off"])
def test_opens_end_with_their_mount_though_nobody_releases_them(
    serve: Callable[..., Served],
    backings: Passthrough,
    kernel: BackingFiles,
    logged: LogRecord,
    dax: Dax,
) -> None:
    served = serve(dax)
    for _ in range(2):
        backings.open(served)
    grow(served, 5000)
    backings.disconnected()
    assert (kernel.open, served.dax_opens) == ({}, 0)
    left = 0 if dax == "fast" else 5000
    if dax == "fast":
        logged.expect("a client wrote past the end: what it wrote there is cut off")
    assert memory(served).media.path.stat().st_size == SIZE + left


def test_a_kernel_that_forgot_the_id_with_the_mount_does_not_keep_the_opens(
    serve: Callable[..., Served], backings: Passthrough, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve()
    backings.open(served)

    def fail(_device: int, _backing: int) -> None:
        raise OSError(errno.ENOTCONN, "gone")

    monkeypatch.setattr(passthrough, "unregister", fail)
    backings.disconnected()
    assert served.dax_opens == 0
