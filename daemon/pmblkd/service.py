"""The daemon's life: start everything or nothing, serve, and stop in order.

Namespaces open first and close last; exports live inside. A start that fails takes back whatever
it had made. A stop (SIGTERM, SIGINT) lets the front ends finish what has arrived, flushes every
namespace and unmounts; what is not done by the deadline is cut off.

The tree of tasks: one nursery with the signal watcher and the control socket, and in it one for
the front ends. When a front end fails, everything stops and the error surfaces.
"""

import contextlib
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import structlog
import trio

from pmblk import Namespace
from pmblk.media import create, open_media
from pmblk.representations import make
from pmblkd import loop, mounts, preflight, systemd
from pmblkd.answers import Answers, represented
from pmblkd.config import RUNTIME_DIRECTORY, Config, NamespaceConfig
from pmblkd.config import representation_options as configured_options
from pmblkd.control import ControlServer, Handler
from pmblkd.errors import WorkFailed
from pmblkd.fuse.files import Files
from pmblkd.fuse.pyfuse3_engine import Pyfuse3Engine
from pmblkd.listen import Address, UnixAddress
from pmblkd.nbd.server import NbdServer
from pmblkd.questions import Question
from pmblkd.reports import FuseReport, NamespaceReport
from pmblkd.spin import Spinner

FLUSH_SECONDS = 60

_log = structlog.get_logger(__name__)


class Service:
    """One daemon. `serve` is its whole life."""

    def __init__(self, file: Path, config: Config) -> None:
        self._file = file
        self._config = config
        self._namespaces: dict[str, Namespace] = {}
        self._nbd: NbdServer | None = None
        self._fuse: Pyfuse3Engine | None = None
        self._files: Files | None = None
        self._born = time.monotonic()
        self._serving = trio.CancelScope()
        self._stopping = False

    async def serve(self) -> None:
        """Until SIGTERM or SIGINT. Raises PmblkError when it cannot start or stop cleanly."""
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            preflight.check(self._file, self._config)
            with self._started() as control:
                milliseconds = round((time.monotonic() - self._born) * 1000)
                _log.info("ready", namespaces=list(self._namespaces), start_ms=milliseconds)
                systemd.notify("READY=1")
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(control.run)
                    nursery.start_soon(self._stop_on, signals)
                    try:
                        with self._serving:
                            await self._run_front_ends()
                    finally:
                        await self._flush_namespaces()
                    nursery.cancel_scope.cancel()
        if self._serving.cancelled_caught:
            raise WorkFailed("clients did not let go in time and were cut off")
        _log.info("stopped")

    # ---- start

    @contextlib.contextmanager
    def _started(self) -> Iterator[ControlServer]:
        """Everything made, bound and mounted; all of it undone at the end or on failure."""
        config = self._config
        with contextlib.ExitStack() as undo:
            if config.needs_runtime_directory:
                self._make_runtime_directory(undo)
            answers = Answers(self._namespaces).handlers()
            handlers = {"list": Handler(Question, self._list), **answers}
            control = ControlServer(Path(config.control.socket), handlers)
            control.bind()
            undo.callback(control.close)
            with contextlib.ExitStack() as undo_on_failure:
                for namespace in config.namespace:
                    self._open_namespace(namespace, undo, undo_on_failure)
                spinner = Spinner(config.daemon.busy_poll_us)
                if config.nbd is not None:
                    self._nbd = NbdServer(
                        self._namespaces,
                        default=config.default_export,
                        max_connections=config.nbd.max_connections,
                        spinner=spinner,
                    )
                    self._nbd.bind(config.nbd.addresses)
                    undo.callback(self._nbd.close)
                if config.fuse is not None:
                    self._mount(Path(config.fuse.mountpoint), undo)
                undo_on_failure.pop_all()
            yield control

    @staticmethod
    def _make_runtime_directory(undo: contextlib.ExitStack) -> None:
        """/run/pmblk, where the default paths point; somebody else's stays."""
        try:
            RUNTIME_DIRECTORY.mkdir(mode=0o755)
        except OSError:
            return  # there already, or not ours to make: then a path in it will say so
        undo.callback(_remove_empty, RUNTIME_DIRECTORY)

    def _open_namespace(
        self,
        config: NamespaceConfig,
        undo: contextlib.ExitStack,
        undo_on_failure: contextlib.ExitStack,
    ) -> None:
        if not config.file.exists():
            size = config.size_bytes
            assert size is not None, "preflight saw to it"
            create(config.file, size)
            undo_on_failure.callback(config.file.unlink)
        media = open_media(
            config.file,
            size=config.size_bytes,
            lba_bytes=config.lba_size,
            read_only=config.read_only,
        )
        undo.callback(media.close)
        options = configured_options(config)
        representation = make(config.representation_kind, media, options)
        self._namespaces[config.name] = Namespace(
            config.name, media, representation, lba_bytes=config.lba_size
        )
        _log.info(
            "namespace open",
            name=config.name,
            size=media.size,
            durability=media.durability.level,
            because=media.durability.reason,
        )

    def _mount(self, mountpoint: Path, undo: contextlib.ExitStack) -> None:
        fuse = self._config.fuse
        assert fuse is not None
        if mounts.check_mountpoint(mountpoint):
            _log.warning("a killed daemon's mount is in the way: unmounting", path=str(mountpoint))
            for device in loop.devices_on(lambda backing: backing.is_relative_to(mountpoint)):
                user = mounts.find_source(str(device))
                if user is not None:
                    _log.warning("dead, but mounted", device=str(device), on=str(user.path))
                    continue  # after the umount, pmblk detach finds it
                _log.warning("detaching what was attached to it", device=str(device))
                loop.abandon(device)
            mounts.unmount(mountpoint)
        if not mountpoint.exists():
            mountpoint.mkdir()
            undo.callback(_remove_empty, mountpoint)
        self._files = Files(list(self._namespaces.values()))
        self._fuse = Pyfuse3Engine(self._files, mountpoint, allow_other=fuse.allow_other)
        self._fuse.mount()
        undo.callback(self._fuse.unmount)

    # ---- serve and stop

    async def _run_front_ends(self) -> None:
        async with trio.open_nursery() as nursery:
            if self._nbd is not None:
                nursery.start_soon(self._nbd.run)
            if self._fuse is not None:
                nursery.start_soon(self._run_fuse, self._fuse)

    async def _run_fuse(self, fuse: Pyfuse3Engine) -> None:
        await fuse.run()
        self._fuse = None
        if not self._stopping:
            _log.warning("unmounted from outside: no files any more")

    async def _stop_on(self, signals: AsyncIterator[int]) -> None:
        number = await anext(signals)
        self._stopping = True
        _log.info("stopping", signal=signal.Signals(number).name)
        systemd.notify("STOPPING=1")
        if self._nbd is not None:
            self._nbd.stop()
        if self._fuse is not None:
            if self._files is not None and self._files.users:
                _log.warning(
                    "files are open: what their users have not synced is lost to them",
                    opens=self._files.users,
                )
            self._fuse.stop()
        with trio.move_on_after(self._config.daemon.stop_seconds):
            await anext(signals)  # a second signal: somebody is in a hurry
        self._serving.cancel()

    async def _flush_namespaces(self) -> None:
        """All of them, whatever happens to one, and also when everything is being cut off."""
        failures: list[str] = []
        with trio.CancelScope(shield=True, deadline=trio.current_time() + FLUSH_SECONDS) as limit:
            for namespace in self._namespaces.values():
                try:
                    await namespace.flush()
                except OSError as error:
                    failures.append(error.strerror or str(error))
        if limit.cancelled_caught:
            failures.append(f"not flushed in {FLUSH_SECONDS} s")
        if failures:
            raise WorkFailed("; ".join(failures), hint="what was flushed before is safe")

    # ---- control

    async def _list(self, _question: Question) -> list[NamespaceReport]:
        return [self._report(namespace) for namespace in self._namespaces.values()]

    def _report(self, namespace: Namespace) -> NamespaceReport:
        media, nbd, fuse = namespace.media, self._config.nbd, None
        if self._config.fuse is not None and self._fuse is not None:
            path = Path(self._config.fuse.mountpoint) / namespace.name
            fuse = FuseReport(path=str(path), engine=self._fuse.name, discards=self._fuse.discards)
        return NamespaceReport(
            name=namespace.name,
            path=str(media.path),
            size=namespace.size,
            allocated=media.allocated_bytes(),
            lba_size=namespace.lba_bytes,
            read_only=namespace.read_only,
            reserve=media.reserve_bytes,
            representation=represented(namespace.representation),
            durability=media.durability.level,
            durability_reason=media.durability.reason,
            punches_holes=media.punches,
            nbd=[_uri(address, namespace.name) for address in nbd.addresses] if nbd else [],
            fuse=fuse,
            users=0,
            draining=False,
        )


def _uri(address: Address, name: str) -> str:
    """The NBD URI of an export (doc/uri.md of the NBD project)."""
    if isinstance(address, UnixAddress):
        return f"nbd+unix:///{name}?socket={address.path}"
    host = f"[{address.host}]" if ":" in address.host else address.host
    return f"nbd://{host}:{address.port}/{name}"


def _remove_empty(directory: Path) -> None:
    with contextlib.suppress(OSError):
        directory.rmdir()
