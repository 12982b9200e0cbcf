"""Carrying a reload out: read, check, plan, then one step after the other.

Until everything is checked nothing is changed, so a file that is wrong changes nothing. After
that, a step that fails (no memory for a page table, a file that is gone meanwhile) is refused and
the others go on: each leaves either the old state or the new one.

Steps are taken in an order that frees before it takes: namespaces leave, addresses change, then
sizes and representations, and new namespaces last.
"""

from collections.abc import Sequence
from pathlib import Path

import msgspec
import structlog
import trio

from pmblk import PmblkError, switching
from pmblk.namespace import in_memory, memory_of
from pmblkd import config, log, preflight, report_of, switches
from pmblkd.arrays import open_namespace
from pmblkd.config import Config, NamespaceConfig
from pmblkd.errors import WorkFailed, did_you_mean
from pmblkd.fuse.engine import Engine
from pmblkd.fuse.files import inode_of
from pmblkd.fuse.passthrough import cut_excess
from pmblkd.nbd.server import NbdServer
from pmblkd.registry import Registry, Served
from pmblkd.reload_plan import Plan, plan
from pmblkd.reports import Refusal, ReloadReport, SwitchReport
from pmblkd.spin import Spinner

FLUSH_SECONDS = 60

_log = structlog.get_logger(__name__)


class Reloader:
    """`config` is what is in force; the rest are the parts of the daemon that it changes."""

    def __init__(
        self,
        file: Path,
        overrides: Sequence[str],
        config: Config,
        *,
        registry: Registry,
        spinner: Spinner,
        nbd: NbdServer | None,
        fuse: Engine | None,
    ) -> None:
        self.config = config
        self._file = file
        self._overrides = overrides
        self._registry = registry
        self._spinner = spinner
        self._nbd = nbd
        self._fuse = fuse
        self._one_at_a_time = trio.Lock()

    async def reload(self, nursery: trio.Nursery) -> ReloadReport:
        """Serve what the file says now; draining namespaces end in `nursery`.

        Raises PmblkError, having changed nothing, for a file that cannot be served.
        """
        async with self._one_at_a_time:
            leaving = [served.config for served in self._registry if served.draining]
            # In threads: a path may lie on a file system that asks this very event loop.
            new = await trio.to_thread.run_sync(
                config.load, self._file, self._overrides, abandon_on_cancel=True
            )
            places = {served.name: served.config.places for served in self._registry}
            listening = self._nbd.addresses if self._nbd is not None else []
            await trio.to_thread.run_sync(
                lambda: preflight.check_new(self._file, new, served=places, listening=listening)
            )
            steps = plan(self._served(), new, draining=leaving)
            return await self._carry_out(steps, new, nursery)

    def _served(self) -> Config:
        """The config in force, with the namespaces as they are after whatever was switched."""
        namespaces = [_as_served(served) for served in self._registry.live()]
        return msgspec.structs.replace(self.config, namespace=namespaces)

    async def _carry_out(self, steps: Plan, new: Config, nursery: trio.Nursery) -> ReloadReport:
        refused = list(steps.refused)
        removed, draining = await self._remove(steps.remove, nursery)
        changed = self._change(steps.changed, new, refused)
        grown = await self._grow(steps.grow, refused)
        switched = await self._switch(steps.switch, refused)
        added = await self._add(steps.add, nursery, refused)
        return ReloadReport(
            added=added,
            removed=removed,
            draining=draining,
            switched=switched,
            grown=grown,
            changed=changed,
            refused=refused,
        )

    # ---- namespaces that go

    async def _remove(
        self, names: Sequence[str], nursery: trio.Nursery
    ) -> tuple[list[str], list[str]]:
        """The names of those that are gone, and of those that drain."""
        leaving = [self._registry.named(name) for name in names]
        for served in leaving:
            served.draining = True
            if self._fuse is not None:
                self._fuse.forget_name(served.name)
        draining = [served for served in leaving if served.users]
        for served in draining:
            _log.info("namespace drains", name=served.name, users=served.users)
            nursery.start_soon(self._close_unused, served)
        gone = [served for served in leaving if served not in draining]
        for served in gone:
            await self._close_unused(served)
        return [served.name for served in gone], [served.name for served in draining]

    async def _close_unused(self, served: Served) -> None:
        await served.unused()
        try:
            with trio.CancelScope(
                shield=True, deadline=trio.current_time() + FLUSH_SECONDS
            ) as limit:
                await self._registry.close(served)
        except OSError as error:
            _log.error(
                "namespace closed, not all of it durable", name=served.name, reason=error.strerror
            )
            return
        if limit.cancelled_caught:
            _log.error("namespace closed, not flushed in time", name=served.name)
        else:
            _log.info("namespace closed", name=served.name)

    # ---- arrays that are stopped, and served again

    async def take_away(self, served: Served, nursery: trio.Nursery) -> None:
        """Out of service, as if it had left the config, until a reload or `bring_back`."""
        async with self._one_at_a_time:
            await self._remove([served.name], nursery)

    async def bring_back(
        self, name: str, nursery: trio.Nursery, *, degraded: bool, force: bool
    ) -> Served:
        """An array of the config that is not served. Raises PmblkError."""
        async with self._one_at_a_time:
            new = await trio.to_thread.run_sync(
                config.load, self._file, self._overrides, abandon_on_cancel=True
            )
            one = self._stopped(name, new)
            alone = msgspec.structs.replace(new, namespace=[one], nbd=None)
            places = {served.name: served.config.places for served in self._registry}
            await trio.to_thread.run_sync(
                lambda: preflight.check_new(self._file, alone, served=places, listening=())
            )
            try:
                served = await open_namespace(one, degraded=degraded, force=force)
            except PmblkError as error:
                raise WorkFailed(error.message, hint=error.hint) from error
            self._registry.add(served)
            nursery.start_soon(served.run)
            return served

    def _stopped(self, name: str, new: Config) -> NamespaceConfig:
        """What the config says of it. Raises PmblkError for one that is served, or no array."""
        arrays = {one.name: one for one in new.namespace if one.raid is not None}
        if name not in arrays:
            hint = did_you_mean(name, list(arrays)) or "add a [namespace.raid] table, and reload"
            raise PmblkError(f"the config has no array {name}", hint=hint)
        for served in self._registry:
            if served.name == name:
                how = "still draining" if served.draining else "served already"
                raise PmblkError(f"{name} is {how}", hint="see pmblk list")
        return arrays[name]

    # ---- settings

    def _change(self, keys: Sequence[str], new: Config, refused: list[Refusal]) -> list[str]:
        """Those that took their new values; `config` is in force then."""
        changed = list(keys)
        if "nbd.listen" in keys and not self._listen(new, refused):
            changed.remove("nbd.listen")
        if self._nbd is not None and new.nbd is not None:
            self._nbd.default = new.default_export
            self._nbd.max_connections = new.nbd.max_connections
        self._spinner.seconds = new.daemon.busy_poll_us / 1e6
        for one in new.namespace:
            if f"namespace.{one.name}.dax" in keys:
                served = self._registry.named(one.name)
                served.config = msgspec.structs.replace(served.config, dax=one.dax)
        if "daemon.log_level" in keys:
            log.configure(new.daemon.log_level)
        self.config = self._in_force(new, listens="nbd.listen" in changed)
        return changed

    def _listen(self, new: Config, refused: list[Refusal]) -> bool:
        """The new addresses first: when one cannot be had, all stay as they are."""
        assert self._nbd is not None
        assert new.nbd is not None
        wanted = new.nbd.addresses
        unwanted = [address for address in self._nbd.addresses if address not in wanted]
        try:
            self._nbd.bind(wanted)
        except PmblkError as error:
            refused.append(Refusal(key="nbd.listen", reason=str(error)))
            return False
        self._nbd.unbind(unwanted)
        return True

    def _in_force(self, new: Config, *, listens: bool) -> Config:
        """`new`, but for what needs a restart; the default export by its name."""
        nbd = old = self.config.nbd
        if new.nbd is not None and old is not None:
            nbd = msgspec.structs.replace(
                new.nbd,
                listen=new.nbd.listen if listens else old.listen,
                default=new.default_export,
            )
        return msgspec.structs.replace(self.config, nbd=nbd, daemon=new.daemon)

    # ---- namespaces that stay or come

    async def _grow(
        self, namespaces: Sequence[NamespaceConfig], refused: list[Refusal]
    ) -> list[str]:
        grown = []
        for one in namespaces:
            served = self._registry.named(one.name)
            size = one.size_bytes
            assert size is not None
            try:
                _forget_excess(served)
                await switching.resize(memory_of(served.namespace, "file to grow"), size)
            except PmblkError as error:
                refused.append(Refusal(key=f"namespace.{one.name}.size", reason=str(error)))
                continue
            if self._fuse is not None:
                self._fuse.forget_size(inode_of(served))
            grown.append(one.name)
        return grown

    async def _switch(
        self, namespaces: Sequence[NamespaceConfig], refused: list[Refusal]
    ) -> list[SwitchReport]:
        switched = []
        for one in namespaces:
            served = self._registry.named(one.name)
            options = config.representation_options(one)
            try:
                switched.append(await switches.switch(served, one.representation_kind, options))
            except PmblkError as error:
                key = f"namespace.{one.name}.representation"
                refused.append(Refusal(key=key, reason=str(error)))
        return switched

    async def _add(
        self,
        namespaces: Sequence[NamespaceConfig],
        nursery: trio.Nursery,
        refused: list[Refusal],
    ) -> list[str]:
        added = []
        for one in namespaces:
            try:
                served = await open_namespace(one)
            except PmblkError as error:
                refused.append(Refusal(key=f"namespace.{one.name}", reason=str(error)))
                continue
            self._registry.add(served)
            nursery.start_soon(served.run)
            added.append(one.name)
        return added


def _forget_excess(served: Served) -> None:
    """What a client wrote past the end must not be what the file grows by. Raises PmblkError."""
    try:
        cut_excess(served)
    except OSError as error:
        raise PmblkError(f"cannot cut {served.config.path}: {error.strerror}") from error


def _as_served(served: Served) -> NamespaceConfig:
    """Its config with what may have changed since, taken from the namespace itself."""
    namespace = in_memory(served.namespace)
    if namespace is None:
        return served.config
    media = namespace.media
    serving = report_of.representation(namespace.representation)
    return msgspec.structs.replace(
        served.config,
        size=media.file_bytes,
        reserve=bool(media.reserve_bytes),
        representation={"kind": serving.kind, **serving.options},
    )
