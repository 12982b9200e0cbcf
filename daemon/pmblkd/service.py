"""The daemon's life: start everything or nothing, serve, change while serving, and stop in order.

Namespaces open first and close last; exports live inside. A start that fails takes back whatever
it had made. A stop (SIGTERM, SIGINT) lets the front ends finish what has arrived, flushes every
namespace and unmounts; what is not done by the deadline is cut off. SIGHUP reads the config again.

The tree of tasks: one nursery with the signal watcher, the control socket, the watch over the
media, reloads and namespaces that drain, and in it one for the front ends. When a front end fails,
everything stops and the error surfaces.
"""

import contextlib
import signal
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import structlog
import trio

from pmblk import PmblkError
from pmblk.volume import running_of
from pmblkd import (
    io_flusher,
    leftovers,
    media_watch,
    mounts,
    preflight,
    raid_answers,
    report_of,
    systemd,
)
from pmblkd.answers import Answers
from pmblkd.arrays import open_namespace
from pmblkd.config import RUNTIME_DIRECTORY, Config
from pmblkd.control import ControlServer, Handler
from pmblkd.errors import WorkFailed
from pmblkd.fuse import engine
from pmblkd.fuse.engine import Engine
from pmblkd.fuse.files import Files, inode_of
from pmblkd.nbd.server import NbdServer
from pmblkd.questions import AssembleQuestion, NamespaceQuestion, Question
from pmblkd.raid_answers import RaidAnswers
from pmblkd.raid_reports import RaidReport, StoppedReport
from pmblkd.registry import Registry, Served
from pmblkd.reloader import FLUSH_SECONDS, Reloader
from pmblkd.reports import NamespaceReport, ReloadReport
from pmblkd.rights import rights_of
from pmblkd.spin import Spinner

STOPS = (signal.SIGTERM, signal.SIGINT)

_log = structlog.get_logger(__name__)


class Service:
    """One daemon. `serve` is its whole life."""

    def __init__(self, file: Path, config: Config, overrides: Sequence[str] = ()) -> None:
        self._file = file
        self._overrides = overrides
        self._config = config
        self._registry = Registry()
        self._spinner = Spinner(config.daemon.busy_poll_us)
        self._nbd: NbdServer | None = None
        self._fuse: Engine | None = None
        self._files: Files | None = None
        self._reloader: Reloader | None = None
        self._born = time.monotonic()
        self._serving = trio.CancelScope()
        self._reloads: set[trio.CancelScope] = set()
        self._signalled_reloads = 0
        self._nursery: trio.Nursery | None = None
        self._stopping = False

    async def serve(self) -> None:
        """Until SIGTERM or SIGINT. Raises PmblkError when it cannot start or stop cleanly."""
        with trio.open_signal_receiver(*STOPS, signal.SIGHUP) as signals:
            preflight.check(self._file, self._config)
            async with self._started() as control:
                milliseconds = round((time.monotonic() - self._born) * 1000)
                names = [served.name for served in self._registry]
                _log.info("ready", namespaces=names, start_ms=milliseconds)
                systemd.notify("READY=1")
                async with trio.open_nursery() as nursery:
                    self._nursery = nursery
                    nursery.start_soon(control.run)
                    nursery.start_soon(self._heed, signals)
                    nursery.start_soon(media_watch.run, self._registry)
                    for served in self._registry:
                        nursery.start_soon(served.run)
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

    @contextlib.asynccontextmanager
    async def _started(self) -> AsyncIterator[ControlServer]:
        """Everything made, bound and mounted; all of it undone at the end or on failure."""
        config = self._config
        async with contextlib.AsyncExitStack() as undo:
            if config.needs_runtime_directory:
                self._make_runtime_directory(undo)
            control = self._open_control(undo)
            async with contextlib.AsyncExitStack() as undo_on_failure:
                undo.callback(self._registry.close_all)
                undo.push_async_callback(self._registry.stop_all)
                undo_on_failure.callback(self._registry.abandon)
                undo_on_failure.push_async_callback(self._registry.stop_all)
                for namespace in config.namespace:
                    self._registry.add(await open_namespace(namespace))
                if config.nbd is not None:
                    self._nbd = NbdServer(
                        self._registry,
                        default=config.default_export,
                        max_connections=config.nbd.max_connections,
                        spinner=self._spinner,
                    )
                    undo.callback(self._nbd.close)
                    self._nbd.bind(config.nbd.addresses)
                if config.fuse is not None:
                    self._mount(Path(config.fuse.mountpoint), undo)
                undo_on_failure.pop_all()
            self._reloader = Reloader(
                self._file,
                self._overrides,
                config,
                registry=self._registry,
                spinner=self._spinner,
                nbd=self._nbd,
                fuse=self._fuse,
            )
            yield control

    def _open_control(self, undo: contextlib.AsyncExitStack) -> ControlServer:
        fuse = self._config.fuse
        mountpoint = None if fuse is None else Path(fuse.mountpoint)
        handlers = {
            "list": Handler(Question, self._list),
            "reload": Handler(Question, self._reload_asked),
            "raid-stop": Handler(NamespaceQuestion, self._stop_array),
            "raid-assemble": Handler(AssembleQuestion, self._assemble_array),
            **Answers(self._registry, mountpoint=mountpoint).handlers(),
            **RaidAnswers(
                self._registry, resized=self._forget_size, mountpoint=mountpoint
            ).handlers(),
        }
        control = ControlServer(Path(self._config.control.socket), handlers)
        control.bind()
        undo.callback(control.close)
        return control

    @staticmethod
    def _make_runtime_directory(undo: contextlib.AsyncExitStack) -> None:
        """/run/pmblk, where the default paths point; somebody else's stays."""
        try:
            RUNTIME_DIRECTORY.mkdir(mode=0o755)
        except OSError:
            return  # there already, or not ours to make: then a path in it will say so
        undo.callback(_remove_empty, RUNTIME_DIRECTORY)

    def _mount(self, mountpoint: Path, undo: contextlib.AsyncExitStack) -> None:
        fuse = self._config.fuse
        assert fuse is not None
        if refusal := io_flusher.become():
            _log.info("no IO flusher: when memory is short, waits may be long", reason=refusal)
        mounts.check_mountpoint(mountpoint)
        sizes = {served.name: served.namespace.size for served in self._registry}
        leftovers.take_away(mountpoint, sizes)
        mounts.check_mountpoint(mountpoint)  # a living one may have lain below a dead one
        if not mountpoint.exists():
            mountpoint.mkdir()
            undo.callback(_remove_empty, mountpoint)
        self._files = Files(self._registry, rights=rights_of(fuse), punch=fuse.punch)
        self._fuse = engine.mounted(fuse, self._files, self._spinner)
        undo.callback(self._fuse.unmount)

    # ---- serve and stop

    async def _run_front_ends(self) -> None:
        async with trio.open_nursery() as nursery:
            if self._nbd is not None:
                nursery.start_soon(self._nbd.run)
            if self._fuse is not None:
                nursery.start_soon(self._run_fuse, self._fuse)

    async def _run_fuse(self, fuse: Engine) -> None:
        assert self._files is not None
        await fuse.run()
        self._fuse = None
        self._files.disconnected()
        if not self._stopping:
            self._mount_ended()

    def _mount_ended(self) -> None:
        """Exports live on without files; with nothing left to serve, a supervisor has to know."""
        assert self._config.fuse is not None
        if mounts.find(Path(self._config.fuse.mountpoint)) is None:
            _log.warning("unmounted from outside: no files any more")
            return
        reason = "the kernel has ended the mount: aborted, or a request was not answered in time"
        if self._nbd is None:
            raise WorkFailed(reason, hint="see fuse.request_timeout_seconds; start again")
        _log.error("no files any more", reason=reason)

    async def _heed(self, signals: AsyncIterator[int]) -> None:
        """SIGHUP reloads; the first of the others stops, the second stops at once."""
        assert self._nursery is not None
        async for number in signals:
            if number in STOPS:
                break
            if self._signalled_reloads < 2:  # one that runs, one that will see what is new
                self._signalled_reloads += 1
                self._nursery.start_soon(self._reload_signalled)
        self._stop(number)
        with trio.move_on_after(self.config.daemon.stop_seconds):
            async for again in signals:
                if again in STOPS:
                    break  # somebody is in a hurry
        self._serving.cancel()

    def _stop(self, number: int) -> None:
        self._stopping = True
        _log.info("stopping", signal=signal.Signals(number).name)
        systemd.notify("STOPPING=1")
        for reload in self._reloads:
            reload.cancel()
        if self._nbd is not None:
            self._nbd.stop()
        if self._fuse is not None:
            if self._files is not None and self._files.users:
                _log.warning(
                    "files are open: what their users have not synced is lost to them",
                    opens=self._files.users,
                )
            self._fuse.stop()

    async def _flush_namespaces(self) -> None:
        """All of them, whatever happens to one, and also when everything is being cut off."""
        failures: list[str] = []
        with trio.CancelScope(shield=True, deadline=trio.current_time() + FLUSH_SECONDS) as limit:
            for served in self._registry:
                try:
                    await served.flush()
                except OSError as error:
                    failures.append(error.strerror or str(error))
        if limit.cancelled_caught:
            failures.append(f"not flushed in {FLUSH_SECONDS} s")
        if failures:
            broken = any(served.namespace.health.fault for served in self._registry)
            hint = "what was flushed before is safe"
            if broken:
                hint = "restore the file, and check what is on it, before the next start"
            raise WorkFailed("; ".join(failures), hint=hint)

    # ---- reload

    @property
    def config(self) -> Config:
        """What is in force."""
        return self._config if self._reloader is None else self._reloader.config

    async def _reload_signalled(self) -> None:
        try:
            await self._reload()
        except PmblkError as error:
            _log.error("the config was not reloaded", reason=str(error))
        except Exception:
            # A defect of ours in a reload must not take the namespaces away.
            _log.exception("the config was not reloaded")
        finally:
            self._signalled_reloads -= 1

    async def _reload_asked(self, _question: Question) -> ReloadReport:
        return await self._reload()

    async def _reload(self) -> ReloadReport:
        """Raises PmblkError, having changed nothing, for a file that cannot be served."""
        assert self._reloader is not None
        assert self._nursery is not None
        with trio.CancelScope() as scope:
            if self._stopping:
                scope.cancel()
            self._reloads.add(scope)
            systemd.notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
            try:
                report = await self._reloader.reload(self._nursery)
                _log_report(report)
                return report
            finally:
                self._reloads.discard(scope)
                if not self._stopping:
                    systemd.notify("READY=1")
        raise WorkFailed("the daemon stops", hint="the config is read at its next start")

    # ---- control

    async def _list(self, _question: Question) -> list[NamespaceReport]:
        """Those that drain too."""
        return [report_of.namespace(served, self.config, self._fuse) for served in self._registry]

    # ---- arrays

    async def _stop_array(self, question: NamespaceQuestion) -> StoppedReport:
        assert self._reloader is not None
        assert self._nursery is not None
        served = self._registry.named(question.name)
        running_of(served.namespace)  # others leave with the config
        if served.draining:
            raise PmblkError(f"{served.name} is draining already", hint="see pmblk list")
        await self._reloader.take_away(served, self._nursery)
        _log.info("array stopped", name=served.name, users=served.users)
        return StoppedReport(name=served.name, users=served.users)

    async def _assemble_array(self, question: AssembleQuestion) -> RaidReport:
        assert self._reloader is not None
        assert self._nursery is not None
        if self._stopping:
            raise WorkFailed("the daemon stops")
        served = await self._reloader.bring_back(
            question.name, self._nursery, degraded=question.degraded, force=question.force
        )
        return raid_answers.report_of(served)

    def _forget_size(self, served: Served) -> None:
        if self._fuse is not None:
            self._fuse.forget_size(inode_of(served))


def _log_report(report: ReloadReport) -> None:
    _log.info(
        "config reloaded",
        added=report.added,
        removed=report.removed,
        draining=report.draining,
        switched=[switched.name for switched in report.switched],
        grown=report.grown,
        changed=report.changed,
    )
    for refusal in report.refused:
        _log.warning("not reloaded", key=refusal.key, reason=refusal.reason)


def _remove_empty(directory: Path) -> None:
    with contextlib.suppress(OSError):
        directory.rmdir()
