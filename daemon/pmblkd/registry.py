"""The namespaces in service: opened, used, drained and closed. Every front end shares one registry.

A `Served` is a namespace with the config that it is served by and the count of its users: NBD
connections, open files, changes under way. Rules that live here:

1. Who uses a namespace has entered it, and nobody enters one that drains.
2. It is closed when it has no users, or when the daemon ends: flushed, unmapped, unlocked.
3. A number is given once: it names a namespace also when another one has taken its name.
4. A name belongs to one namespace until that is closed.

Not here: when a namespace has to drain (`pmblkd.service`), and what its users see of that.
"""

import contextlib
import itertools
from collections.abc import Iterator

import structlog
import trio

from pmblk import BlockDevice, Namespace, PmblkError
from pmblk.media import create, open_media
from pmblk.representations import make
from pmblkd.config import NamespaceConfig, representation_options
from pmblkd.errors import did_you_mean
from pmblkd.mappers import MappedAs

STOP_SECONDS = 60  # more than the patience with a member

_log = structlog.get_logger(__name__)


class Served:
    """A namespace in service. `config` says how it is served now; live changes replace it."""

    def __init__(self, config: NamespaceConfig, namespace: BlockDevice, *, created: bool) -> None:
        self.config = config
        self.namespace = namespace
        self.created = created  # its file, by us
        self.number = 0  # the registry's
        self.users = 0
        self.dax_opens = 0  # of its users, those whose mappings are the media themselves
        self.mapped_as: MappedAs | None = None  # such mappings may have outlived their opens
        self.dax_kept_out = 0  # by so many, for now: `pmblkd.fuse.mappings`
        self.draining = False
        self.closed = False
        self._unused = trio.Event()
        self._working = trio.CancelScope()  # what an array does behind its I/O
        self._worked: trio.Event | None = None  # when that has ended

    @property
    def name(self) -> str:
        return self.namespace.name

    def enter(self) -> None:
        """One more user, until `leave`. Raises PmblkError for one that drains."""
        if self.draining:
            raise PmblkError(
                f"{self.name} is draining: it takes no new users",
                hint="it left the config; add it again when it is gone",
            )
        self.users += 1

    def leave(self) -> None:
        self.users -= 1
        assert self.users >= 0
        if not self.users:
            self._unused.set()
            self._unused = trio.Event()

    @contextlib.contextmanager
    def used(self) -> Iterator[BlockDevice]:
        self.enter()
        try:
            yield self.namespace
        finally:
            self.leave()

    async def unused(self) -> None:
        """Wait until nobody uses it. It stays so only if it drains."""
        while self.users:
            await self._unused.wait()

    async def flush(self) -> None:
        """All that was completed is durable. Raises OSError."""
        async with self.namespace.changing:
            if not self.closed:
                await self.namespace.flush()

    async def run(self) -> None:
        """The work behind the I/O, until `stop`. A defect in it ends nothing else."""
        if self._working.cancel_called:
            return
        self._worked = trio.Event()
        try:
            with self._working:
                await self.namespace.run()
        except Exception:
            _log.exception("the work behind a namespace has failed", name=self.name)
        finally:
            self._worked.set()

    async def stop(self) -> None:
        """The work behind it ends, and then all that takes waiting. Raises OSError."""
        self._working.cancel()
        if self._worked is not None:
            await self._worked.wait()
        await self.namespace.stop()

    def close(self) -> None:
        """Let everything go; `stop` came first."""
        if self.closed:
            return
        self.closed = True
        self.namespace.close()


def open_served(config: NamespaceConfig) -> Served:
    """Create the file if it is missing, lock it, map it, describe it. May take seconds.

    Raises PmblkError, and then nothing is left behind. Touches no event loop: it may run in a
    thread.
    """
    created = not config.file.exists()
    with contextlib.ExitStack() as undo:
        if created:
            size = config.size_bytes
            if size is None:  # preflight looks too, but a file may vanish after it
                raise PmblkError(f"there is no {config.file}", hint="give a size to create it")
            create(config.file, size)
            undo.callback(config.file.unlink)
        media = open_media(
            config.file,
            size=config.size_bytes,
            lba_bytes=config.lba_size,
            read_only=config.read_only,
            with_reserve=config.with_reserve,
        )
        undo.callback(media.close)
        options = representation_options(config)
        representation = make(config.representation_kind, media, options)
        undo.pop_all()
    namespace = Namespace(config.name, media, representation, lba_bytes=config.lba_size)
    return Served(config, namespace, created=created)


class Registry:
    """Every namespace that is not closed yet, in the order of their numbers."""

    def __init__(self) -> None:
        self._all: dict[int, Served] = {}
        self._numbers = itertools.count(1)

    def __iter__(self) -> Iterator[Served]:
        """All of them, also those that drain; closing one meanwhile does no harm."""
        return iter(list(self._all.values()))

    def live(self) -> Iterator[Served]:
        """Those that take users."""
        return (served for served in self if not served.draining)

    def add(self, served: Served) -> None:
        """From now on it can be found; its name is free."""
        assert all(served.name != other.name for other in self)
        served.number = next(self._numbers)
        self._all[served.number] = served
        level, reason = served.namespace.durability
        _log.info(
            "namespace open",
            name=served.name,
            size=served.namespace.size,
            durability=level,
            because=reason,
        )

    # ---- finding

    def numbered(self, number: int) -> Served | None:
        """Also one that drains."""
        return self._all.get(number)

    def named(self, name: str) -> Served:
        """Also one that drains. Raises PmblkError with what was meant."""
        for served in self:
            if served.name == name:
                return served
        names = [served.name for served in self]
        raise PmblkError(f"no namespace {name}", hint=did_you_mean(name, names))

    # ---- the end of a namespace

    async def close(self, served: Served) -> None:
        """Flush and close one that has no users any more. Raises OSError when it cannot flush;
        it is closed all the same.
        """
        assert served.draining
        assert not served.users
        try:
            try:
                await served.flush()
            finally:
                await served.stop()
        finally:
            self._close(served)

    async def stop_all(self) -> None:
        """Before `close_all` and `abandon`, with a deadline: what takes waiting, whatever fails."""
        for served in self:
            with trio.CancelScope(
                shield=True, deadline=trio.current_time() + STOP_SECONDS
            ) as limit:
                try:
                    await served.stop()
                except OSError as error:
                    _log.error("not stopped cleanly", name=served.name, reason=error.strerror)
            if limit.cancelled_caught:
                _log.error("not stopped in time", name=served.name)

    def close_all(self) -> None:
        """The daemon ends; what can be flushed has been."""
        for served in self:
            self._close(served)

    def abandon(self) -> None:
        """The start failed: close everything, and take back the files that it made."""
        for served in self:
            self._close(served)
            if served.created:
                served.config.file.unlink()

    def _close(self, served: Served) -> None:
        served.close()
        self._all.pop(served.number, None)
