"""The kernel engine: `Files` over the FUSE protocol itself, on the daemon's own trio loop.

The way of an I/O: one wake-up; then the requests that are there are read, executed as one batch and
answered on the spot, until none is left. Each takes one read and one write on /dev/fuse. What a
read found is sent from memory itself; a write is stored from the buffer that it arrived in. No task
and no copy is made but for a command that has to wait: that gets a task, which answers it when it
is done.

It can do what libfuse's bindings cannot: holes, lseek, a time-out in the kernel, and clients that
map the media themselves (`pmblkd.fuse.passthrough`).
"""

import contextlib
import errno
import io
import os
import select
import time
from collections.abc import Sequence
from pathlib import Path

import structlog
import trio

from pmblk import BlockDevice, PmblkError
from pmblk.media.syscalls import anonymous
from pmblk.pages import PAGE_BYTES
from pmblkd import mounts
from pmblkd.fuse import mounting, passthrough
from pmblkd.fuse.dax import Way
from pmblkd.fuse.files import Files
from pmblkd.fuse.passthrough import Passthrough
from pmblkd.fuse.session import (
    MESSAGE_BYTES_MAX,
    Reply,
    Session,
    Work,
    error_reply,
)
from pmblkd.fuse.wire import IN_HEADER_START, Init
from pmblkd.registry import Served
from pmblkd.spin import Spinner

HELLO_SECONDS = 5
BATCH_REQUESTS = 64
BATCH_BYTES = 256 << 10  # more at once leave the processor's caches; one message may be longer
# Then the others on the event loop get their turn, which costs 30 us.
TURN_REQUESTS, TURN_BYTES = 256, 4 << 20
ALIGNMENT = 64  # of messages in the buffer
UNMOUNT_SECONDS = 5

_log = structlog.get_logger(__name__)


class KernelEngine:
    """Mount with `mount`, serve with `run` until `stop`, and always `unmount`."""

    name = "kernel"
    discards = True

    def __init__(
        self,
        files: Files,
        mountpoint: Path,
        *,
        allow_other: bool,
        options: list[str],
        request_timeout_seconds: int,
        spinner: Spinner,
    ) -> None:
        self._files = files
        self._mountpoint = mountpoint
        self._allow_other = allow_other
        self._options = options
        self._backings = Passthrough()
        self._session = Session(
            files, self._backings, request_timeout_seconds=request_timeout_seconds
        )
        self._spinner = spinner
        self._fd = -1
        self._poll = select.poll()
        self._mount: mounts.Mount | None = None
        self._buffer = _resident_buffer()
        self._stop = trio.Event()
        self._serving = trio.CancelScope()
        self._waiting: trio.Nursery

    # ---- the mount

    def mount(self) -> None:
        """Mounted, and on terms with the kernel. Raises PmblkError; then nothing is mounted."""
        self._fd = mounting.mount(
            self._mountpoint, allow_other=self._allow_other, options=self._options
        )
        self._mount = mounts.find(self._mountpoint)
        self._poll.register(self._fd, select.POLLIN)
        try:
            self._shake_hands()
            refusal = self._passthrough_refusal()
        except BaseException:
            self.unmount()
            raise
        minor = 0 if self._mount is None else self._mount.minor
        self._backings.attach(self._fd, minor=minor, refusal=refusal)

    def _shake_hands(self) -> None:
        """INIT is the first message, and it is there as soon as mount(2) returns."""
        device = self._reader()
        while not self._session.minor:
            if not self._poll.poll(HELLO_SECONDS * 1000):
                raise PmblkError(f"the kernel's FUSE said nothing in {HELLO_SECONDS} s")
            messages = self._read_batch(device, 1)
            if messages is None:
                raise PmblkError("the mount ended at once")
            self._handle(messages)
            if self._session.refusal:
                raise PmblkError(self._session.refusal, hint='choose engine = "pyfuse3"')

    def _passthrough_refusal(self) -> str:
        if not self._session.agreed & Init.PASSTHROUGH:
            return "this kernel has no passthrough (Linux 6.9 has)"
        probe = os.memfd_create("pmblk-probe", os.MFD_CLOEXEC)
        try:
            passthrough.unregister(self._fd, passthrough.register(self._fd, probe))
        except OSError as error:
            return passthrough.explain(error)
        finally:
            os.close(probe)
        return ""

    def unmount(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)  # first: a client's page that is still dirty would wait for us for ever
            if self._mount is not None and mounts.find(self._mount.path) == self._mount:
                with contextlib.suppress(PmblkError):
                    mounts.unmount(self._mount.path)

    def dax(self, served: Served) -> tuple[Way, str]:
        """How the bytes of its file go, and why not another way."""
        return self._backings.describe(served)

    def forget_name(self, _name: str) -> None:
        """The kernel asks for every name anew."""

    def forget_size(self, inode: int) -> None:
        """A file has another size. Attributes only: this cannot block."""
        self._send(Session.resized(inode))

    # ---- serve and stop

    async def run(self) -> None:
        """Until `stop`, or until somebody unmounts."""
        async with trio.open_nursery() as waiting:
            self._waiting = waiting
            with self._serving:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._unmount_when_told)
                    await self._serve()
                    nursery.cancel_scope.cancel()
            self._backings.disconnected()  # whoever still waits gets no answer any more

    def stop(self) -> None:
        """No further requests; what has arrived is still answered."""
        self._stop.set()

    async def _unmount_when_told(self) -> None:
        """Off the tree while we still answer, so that dirty pages of clients can reach us.

        That ends the mount, and `run` with it, unless somebody has a file open: they are cut off.
        """
        await self._stop.wait()
        with trio.move_on_after(UNMOUNT_SECONDS):
            try:
                await trio.to_thread.run_sync(
                    mounts.unmount, self._mountpoint, abandon_on_cancel=True
                )
            except PmblkError as error:
                _log.warning("not unmounted", reason=str(error))
        self._serving.cancel()

    async def _serve(self) -> None:
        """Batch after batch until the mount is gone.

        A batch is at most what was there before, or twice that when there was more: a client at
        depth 1 has its reply before anybody looks for another request.
        """
        device = self._reader()
        most = 1
        answered = moved = 0
        while (messages := self._read_batch(device, most)) is not None:
            moved += self._handle(messages)
            most = min(2 * most, BATCH_REQUESTS) if len(messages) == most else len(messages) or 1
            answered += len(messages)
            if not messages:
                await self._wait(answered)
            elif answered >= TURN_REQUESTS or moved >= TURN_BYTES:
                await trio.lowlevel.checkpoint()
            else:
                continue
            answered = moved = 0

    async def _wait(self, requests: int) -> None:
        """For the next request; `requests` were answered since the last wait."""
        self._spinner.answered(requests)
        if requests and self._spinner.worth_it(self):
            end = time.perf_counter() + self._spinner.seconds
            while time.perf_counter() < end:
                if self._poll.poll(0):
                    return
            self._spinner.missed()
        started = time.perf_counter()
        await trio.lowlevel.wait_readable(self._fd)
        self._spinner.waited(time.perf_counter() - started)

    # ---- a batch of requests

    def _reader(self) -> io.FileIO:
        """Cheaper than readv, and raises nothing when no message is there."""
        return io.FileIO(self._fd, closefd=False)

    def _read_batch(self, device: io.FileIO, most: int) -> list[memoryview] | None:
        """Up to so many messages, those that are there; None: no mount. They stay in the buffer."""
        messages: list[memoryview] = []
        position = 0
        while len(messages) < most and position < BATCH_BYTES:
            try:
                count = device.readinto(self._buffer[position:])
            except OSError as error:
                if error.errno == errno.ENOENT:  # taken back
                    break
                if error.errno in (errno.ENODEV, errno.ECONNABORTED):
                    return None
                raise
            if count is None:  # there is no other
                break
            messages.append(self._buffer[position : position + count])
            position += count + -count % ALIGNMENT
        return messages

    def _handle(self, messages: Sequence[memoryview]) -> int:
        """How many bytes they were about."""
        works = []
        for message in messages:
            try:
                outcome = self._session.receive(message)
                if isinstance(outcome, Work):
                    works.append(outcome)
                elif outcome is not None:
                    self._send(outcome)
            except Exception:
                self._failed(IN_HEADER_START.unpack_from(message)[2])
        moved = sum([work.command.length for work in works])
        while works:  # in batches for one namespace each
            namespace = works[0].namespace
            self._execute(namespace, [work for work in works if work.namespace is namespace])
            works = [work for work in works if work.namespace is not namespace]
        return moved

    def _execute(self, namespace: BlockDevice, works: Sequence[Work]) -> None:
        """All of them, then all replies: a client that waits for several is woken once."""
        commands = [work.command for work in works]
        try:
            waiting = {id(command) for command in namespace.execute(commands)}
        except Exception:
            self._failed(*(work.unique for work in works))
        else:
            for work in works:
                if id(work.command) in waiting:
                    self._waiting.start_soon(self._complete, work)
                else:
                    self._answer(work)
        finally:
            namespace.release(commands)

    async def _complete(self, work: Work) -> None:
        try:
            rest = await work.namespace.complete((work.command,))
            assert not rest, "one command alone waits for nobody of its own batch"
        except Exception:
            self._failed(work.unique)
        else:
            self._answer(work)
        finally:
            work.namespace.release((work.command,))

    def _answer(self, work: Work) -> None:
        namespace, command = work.namespace, work.command
        try:
            if namespace.health.fault is not None and not command.status:  # under this batch
                self._send(error_reply(work.unique, errno.EIO))
            else:
                self._send(self._session.answer(work))
        except Exception as error:
            if self._media_failed(error, work):
                with contextlib.suppress(OSError):  # the kernel may have said so itself
                    self._send(error_reply(work.unique, errno.EIO))
            else:
                self._failed(work.unique)

    @staticmethod
    def _media_failed(error: Exception, work: Work) -> bool:
        """Whether the kernel cannot read what is sent (EFAULT), since the media have lost it."""
        if not isinstance(error, OSError) or error.errno != errno.EFAULT:
            return False
        segments = work.command.segments or ()
        return work.namespace.examine(one for one in segments if isinstance(one, memoryview))

    def _failed(self, *uniques: int) -> None:
        """A defect of ours is EIO, not the mount's end, even if nobody can be told."""
        _log.exception("file operation failed")
        for unique in uniques:
            with contextlib.suppress(OSError):
                self._send(error_reply(unique, errno.EIO))

    def _send(self, reply: Reply) -> None:
        """One write a reply. Whoever asked may be gone (ENOENT), and so may the mount (ENODEV)."""
        try:
            os.writev(self._fd, reply)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV, errno.ECONNABORTED):
                raise


def _resident_buffer() -> memoryview:
    """For a batch. It has its memory now: amid a write that the kernel needs done for want of
    memory there may be none, and the kernel would wait for us, and we for it.
    """
    buffer = memoryview(anonymous(BATCH_BYTES + MESSAGE_BYTES_MAX))
    buffer[::PAGE_BYTES] = bytes(len(buffer) // PAGE_BYTES)
    return buffer
