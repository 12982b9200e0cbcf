"""What the service does when things fail; that it starts and stops is tested end to end."""

import errno
import signal
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from pmblk import PmblkError
from pmblkd.config import Config, load
from pmblkd.errors import WorkFailed, only_ours
from pmblkd.nbd.server import NbdServer
from pmblkd.service import Service
from tests.unit.conftest import LogRecord, MakeNamespace, registered


def make_config(directory: Path, *, listen: str = "n.sock") -> Config:
    file = directory / "c.toml"
    file.write_text(
        f"""
        [[namespace]]
        name = "a"
        path = "{directory}/a.img"
        size = "1MiB"
        [nbd]
        listen = ["unix:{directory}/{listen}"]
        [control]
        socket = "{directory}/c.sock"
        """
    )
    return load(file)


async def test_a_flush_that_fails_keeps_no_other_namespace_from_its_own(
    directory: Path, make_namespace: MakeNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed = []

    async def fail() -> None:
        raise OSError(errno.EIO, "namespace bad: the flush failed")

    async def succeed() -> None:
        flushed.append("good")

    bad, good = make_namespace(name="bad.img"), make_namespace(name="good.img")
    bad.name, good.name = "bad", "good"
    monkeypatch.setattr(bad, "flush", fail)
    monkeypatch.setattr(good, "flush", succeed)
    service = Service(directory / "c.toml", make_config(directory))
    service._registry = registered(bad, good)
    with pytest.raises(WorkFailed, match="namespace bad"):
        await service._flush_namespaces()
    assert flushed == ["good"]


def test_a_start_that_fails_late_takes_everything_back(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(directory)

    def refuse(*_: Any) -> None:
        raise PmblkError("no")

    monkeypatch.setattr(NbdServer, "bind", refuse)
    with pytest.raises(PmblkError, match="no"):
        trio.run(Service(directory / "c.toml", config).serve)
    assert [path.name for path in directory.iterdir()] == ["c.toml"]


class Hanging:
    """A reload that never ends by itself."""

    async def reload(self, _nursery: trio.Nursery) -> None:
        await trio.sleep_forever()


async def test_a_stop_ends_the_reloads_and_who_asked_is_told(directory: Path) -> None:
    service = Service(directory / "c.toml", make_config(directory))
    service._reloader = Hanging()  # type: ignore[assignment]
    told: list[str] = []

    async def ask() -> None:
        with pytest.raises(WorkFailed) as failed:
            await service._reload()
        told.append(failed.value.message)

    async with trio.open_nursery() as service._nursery:
        service._nursery.start_soon(ask)
        service._nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        service._stop(signal.SIGTERM)
    assert told == ["the daemon stops", "the daemon stops"]


async def test_a_daemon_that_stops_takes_no_reload(directory: Path) -> None:
    service = Service(directory / "c.toml", make_config(directory))
    service._reloader = Hanging()  # type: ignore[assignment]
    service._stop(signal.SIGTERM)
    async with trio.open_nursery() as service._nursery:
        with pytest.raises(WorkFailed, match="the daemon stops"):
            await service._reload()


class Defective:
    async def reload(self, _nursery: trio.Nursery) -> None:
        raise ZeroDivisionError


async def test_a_defect_in_a_reload_is_logged_and_the_daemon_lives(
    directory: Path, logged: LogRecord
) -> None:
    service = Service(directory / "c.toml", make_config(directory))
    service._reloader = Defective()  # type: ignore[assignment]
    async with trio.open_nursery() as service._nursery:
        await service._reload_signalled()
    assert logged.expect("the config was not reloaded")["exc_info"]


def test_a_defect_beside_an_error_of_ours_is_not_hidden() -> None:
    ours = PmblkError("polite")
    assert only_ours(ours) is ours
    assert only_ours(ExceptionGroup("", [ExceptionGroup("", [ours])])) is ours
    assert only_ours(ExceptionGroup("", [ours, ZeroDivisionError()])) is None
    assert only_ours(ZeroDivisionError()) is None
