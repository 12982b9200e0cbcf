"""NBD exports as members, served by nbdkit: what is moved, refused, lost and hung."""

import builtins
import errno
import os
import random
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from pmblk.errors import PmblkError
from pmblk.raid.buffers import buffer
from pmblk.raid.member import Hung, Request
from pmblk.raid.nbd_member import NbdMember, connect

SIZE = 16 << 20


class Server:
    """nbdkit on a unix socket."""

    def __init__(self, directory: Path, *words: str) -> None:
        self.uri = f"nbd+unix:///?socket={directory}/socket"
        started, told = os.pipe()
        command = ["nbdkit", "--foreground", "--unix", f"{directory}/socket", *words]
        # It closes its end of the pipe once it has written its process number there.
        self.process = subprocess.Popen(
            [*command[:2], "--pidfile", f"/dev/fd/{told}", *command[2:]],
            pass_fds=[told],
            stderr=subprocess.PIPE,
        )
        os.close(told)
        with open(started, "rb") as pipe:
            assert pipe.readline(), "nbdkit did not start"

    def stop(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.communicate(timeout=10)


Serve = Callable[..., Server]


@pytest.fixture
def serve(directory: Path) -> Iterator[Serve]:
    servers: list[Server] = []

    def one(*words: str) -> Server:
        servers.append(Server(directory, *words))
        return servers[-1]

    yield one
    for server in servers:
        server.stop()


async def opened(server: Server, *, read_only: bool = False, seconds: float = 30) -> NbdMember:
    return await connect(server.uri, read_only=read_only, timeout_seconds=seconds)


def filled(length: int, seed: int = 0) -> memoryview:
    view = buffer(length)
    view[:] = random.Random(seed).randbytes(length)
    return view


async def test_what_is_written_is_read_in_batches_that_are_in_flight_at_once(serve: Serve) -> None:
    member = await opened(serve("memory", str(SIZE)))
    assert (member.size, member.block_bytes) == (SIZE, 512)
    content = filled(SIZE)
    blocks = [(offset, content[offset : offset + 65536]) for offset in range(0, SIZE, 65536)]
    chosen = random.Random(1)
    chosen.shuffle(blocks)
    batches = [[Request(*one) for one in blocks[i::8]] for i in range(8)]
    found = [[Request(offset, buffer(len(view))) for offset, view in one] for one in batches]
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            for batch in batches:
                nursery.start_soon(member.write, batch)
        await member.flush()
        async with trio.open_nursery() as nursery:
            for batch in found:
                nursery.start_soon(member.read, batch)
    for batch, again in zip(batches, found, strict=True):
        assert [one.view for one in again] == [one.view for one in batch]
    member.close()


async def test_nothing_is_copied_on_the_way(serve: Serve) -> None:
    """What changes in the memory after the call is what is sent: libnbd has the view itself."""
    server = serve("memory", str(SIZE))
    member = await opened(server)
    view = filled(SIZE)
    server.process.send_signal(signal.SIGSTOP)  # the kernel's buffers are full before the end
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(member.write, [Request(0, view)])
            await trio.testing.wait_all_tasks_blocked()
            view[-4:] = b"late"
            server.process.send_signal(signal.SIGCONT)
    found = buffer(4096)
    await member.read([Request(SIZE - 4096, found)])
    assert bytes(found[-4:]) == b"late"
    member.close()


async def test_a_write_goes_on_while_others_only_wait_for_answers(serve: Serve) -> None:
    member = await opened(serve("--filter=delay", "memory", str(SIZE), "rdelay=30"))
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(member.read, [Request(0, buffer(4096))])
            await trio.testing.wait_all_tasks_blocked()
            await member.write([Request(0, filled(SIZE))])  # more than a socket takes
            nursery.cancel_scope.cancel()
    member.close()


async def test_requests_are_cut_to_what_the_server_takes(serve: Serve) -> None:
    policy = ("blocksize-minimum=4096", "blocksize-preferred=4096", "blocksize-maximum=65536")
    filters = ("--filter=blocksize-policy", "memory", str(SIZE), *policy)
    member = await opened(serve(*filters, "blocksize-error-policy=error"))
    assert member.block_bytes == 4096
    content = filled(3 << 20)
    with trio.fail_after(10):
        await member.write([Request(4096, content)])
        found = buffer(3 << 20)
        await member.read([Request(4096, found)])
    assert found == content
    member.close()


async def test_zeroes_are_zeroes_and_a_server_without_them_says_so(
    serve: Serve, directory: Path
) -> None:
    (directory / "other").mkdir()
    member = await opened(serve("memory", str(SIZE)))
    await member.write([Request(0, filled(1 << 20))])
    await member.zero(4096, 1 << 19)
    found = buffer(1 << 20)
    await member.read([Request(0, found)])
    assert bytes(found[4096 : 4096 + (1 << 19)]) == bytes(1 << 19)
    assert found[:4096] == filled(1 << 20)[:4096]
    member.close()
    plain = Server(directory / "other", "--filter=nozero", "memory", str(SIZE))
    try:
        other = await opened(plain)
        with pytest.raises(OSError, match="cannot write zeroes") as caught:
            await other.zero(0, 4096)
        assert caught.value.errno == errno.EOPNOTSUPP
        other.close()
    finally:
        plain.stop()


async def test_an_error_of_the_server_is_an_error_of_that_batch_alone(serve: Serve) -> None:
    errors = ("error-pwrite=ENOSPC", "error-pwrite-rate=100%")
    member = await opened(serve("--filter=error", "memory", str(SIZE), *errors))
    with pytest.raises(OSError, match="No space") as caught:
        await member.write([Request(0, filled(4096)), Request(8192, filled(4096))])
    assert caught.value.errno == errno.ENOSPC
    await member.read([Request(0, buffer(4096))])
    member.close()


# ---- servers that are not good enough


@pytest.mark.parametrize(
    ("words", "refusal"),
    [
        (["--readonly", "memory", str(SIZE)], "is read-only; let its server"),
        (["eval", "get_size=echo 16M", "pread=exit 1", "pwrite=exit 1"], "cannot be flushed"),
        (
            [
                *("--filter=blocksize-policy", "memory", str(SIZE)),
                *("blocksize-minimum=8192", "blocksize-preferred=8192"),
            ],
            "takes blocks of 8192 bytes and more",
        ),
    ],
)
async def test_a_server_that_cannot_be_a_member_is_refused(
    serve: Serve, words: list[str], refusal: str
) -> None:
    with pytest.raises(PmblkError, match=refusal):
        await opened(serve(*words))


async def test_who_only_reads_takes_a_read_only_server(serve: Serve) -> None:
    member = await opened(serve("--readonly", "pattern", str(SIZE)), read_only=True)
    view = buffer(4096)
    await member.read([Request(8, view[:512]), Request(4096, view[512:1024])])
    assert view[:8] == (8).to_bytes(8, "big")
    member.close()


async def test_nobody_there_is_said_so(directory: Path) -> None:
    uri = f"nbd+unix:///?socket={directory}/nobody"
    with pytest.raises(PmblkError, match=r"cannot connect to nbd\+unix.*No such file"):
        await connect(uri, read_only=False, timeout_seconds=5)


async def test_a_server_that_does_not_greet_is_given_up(serve: Serve) -> None:
    server = serve("memory", str(SIZE))
    server.process.send_signal(signal.SIGSTOP)
    with pytest.raises(PmblkError, match=r"does not answer in 0\.2 s"):
        await opened(server, seconds=0.2)


async def test_without_the_python_module_its_package_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = builtins.__import__

    def importing(name: str, *rest: Any) -> Any:
        if name == "nbd":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", importing)
    with pytest.raises(PmblkError, match="install the package python3-libnbd"):
        await connect("nbd://localhost", read_only=False, timeout_seconds=1)


# ---- connections that are lost, servers that hang


async def test_a_lost_connection_is_the_end_of_all_batches_and_of_all_that_come(
    serve: Serve,
) -> None:
    server = serve("--filter=delay", "memory", str(SIZE), "rdelay=30")
    member = await opened(server)
    codes: list[int | None] = []

    async def read() -> None:
        with pytest.raises(OSError, match="lost") as caught:
            await member.read([Request(0, buffer(4096))])
        codes.append(caught.value.errno)

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(read)
            await trio.testing.wait_all_tasks_blocked()
            server.process.kill()
        await read()
    assert codes == [errno.ENOTCONN] * 4
    member.close()


async def test_a_server_that_stands_still_has_hung_and_is_used_again_when_it_goes_on(
    serve: Serve,
) -> None:
    server = serve("memory", str(SIZE))
    member = await opened(server, seconds=0.2)
    await member.write([Request(0, content := filled(65536))])
    server.process.send_signal(signal.SIGSTOP)
    late = buffer(65536)
    with pytest.raises(Hung):
        await member.read([Request(0, late)])
    with pytest.raises(Hung):
        await member.flush()
    server.process.send_signal(signal.SIGCONT)
    fd = member._handle.aio_get_fd()
    with trio.fail_after(10):
        await trio.lowlevel.wait_readable(fd)
        while member._hung:  # its answer comes in pieces
            try:
                await member.flush()
            except Hung:
                await trio.lowlevel.checkpoint()
    assert late == content, "the memory was its until then"
    await member.flush()
    member.close()


async def test_closing_wakes_all_who_wait(serve: Serve) -> None:
    member = await opened(serve("--filter=delay", "memory", str(SIZE), "rdelay=30"))
    ended = 0

    async def read() -> None:
        nonlocal ended
        with pytest.raises(OSError, match="closed"):
            await member.read([Request(0, buffer(4096))])
        ended += 1

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(read)
            await trio.testing.wait_all_tasks_blocked()
            member.close()
    assert ended == 3


async def test_whoever_turns_the_connection_hands_it_on_when_cancelled(serve: Serve) -> None:
    member = await opened(serve("--filter=delay", "memory", str(SIZE), "rdelay=200ms"))
    found = buffer(4096)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            turner = trio.CancelScope()

            async def first() -> None:
                with turner:
                    await member.read([Request(0, buffer(4096))])

            nursery.start_soon(first)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(member.read, [Request(0, found)])
            await trio.testing.wait_all_tasks_blocked()
            turner.cancel()
    assert turner.cancelled_caught
    await member.flush()
    member.close()
