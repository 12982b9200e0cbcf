"""Arrays in service: opened, worked for, stopped before they are closed, and reported."""

import errno
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from pmblk import Command, PmblkError
from pmblk.nvme.command import READ, WRITE
from pmblk.volume import running_of
from pmblkd import arrays, report_of, views
from pmblkd.answers import Answers
from pmblkd.config import Config, NamespaceConfig, NbdConfig, RaidConfig, load
from pmblkd.errors import WorkFailed
from pmblkd.fuse.dax import Way, choose
from pmblkd.fuse.files import Files, inode_of
from pmblkd.nbd.server import Exports, NbdServer
from pmblkd.questions import NamespaceQuestion, RangeQuestion, SaveQuestion, SwitchQuestion
from pmblkd.registry import Registry, Served
from pmblkd.service import Service
from tests.unit.arrays import FakeRunning
from tests.unit.conftest import LogRecord, MakeNamespace, registered

RAID = RaidConfig(members=["/m0", "/m1", "/m2", "/m3"])
CONFIG = NamespaceConfig(name="array", raid=RAID)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What arrays were opened with: from now on they are fakes."""
    found: list[dict[str, Any]] = []

    async def open_array(raid: RaidConfig, **allowed: bool) -> FakeRunning:
        await trio.lowlevel.checkpoint()
        running = FakeRunning()
        found.append({"running": running, "members": raid.members, **allowed})
        return running

    monkeypatch.setattr(arrays, "open_array", open_array)
    return found


async def in_service() -> tuple[Registry, Served, FakeRunning]:
    registry = Registry()
    served = await arrays.open_namespace(CONFIG)
    registry.add(served)
    running = running_of(served.namespace)
    assert isinstance(running, FakeRunning)
    return registry, served, running


# ---- its life


async def test_an_array_is_opened_as_its_config_says_or_as_it_is_allowed_for_once(
    opened: list[dict[str, Any]],
) -> None:
    await arrays.open_namespace(CONFIG)
    served = await arrays.open_namespace(CONFIG, degraded=True)
    allowed = [(one["degraded"], one["force"]) for one in opened]
    assert allowed == [(False, False), (True, False)]
    assert served.config is CONFIG, "so that a reload finds nothing changed"
    assert not served.created


async def test_its_work_ends_before_it_is_stopped_and_it_is_flushed_before_both(
    opened: list[dict[str, Any]],
) -> None:
    registry, served, running = await in_service()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(served.run)
        await trio.testing.wait_all_tasks_blocked()
        assert running.runs == 1
        served.draining = True
        await registry.close(served)
    assert running.array.asked == [("flush", 0)]
    assert running.stopped
    assert list(registry) == []


async def test_what_cannot_be_stopped_cleanly_is_closed_all_the_same(
    opened: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, logged: LogRecord
) -> None:
    async def fail() -> None:
        raise OSError(errno.EIO, "a member is gone")

    registry, _served, running = await in_service()
    monkeypatch.setattr(running, "stop", fail)
    await registry.stop_all()
    assert logged.expect("not stopped cleanly")["reason"] == "a member is gone"
    registry.close_all()
    assert running.closed


async def test_an_array_that_does_not_stop_is_left_at_the_deadline(
    opened: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    logged: LogRecord,
    autojump_clock: trio.testing.MockClock,
) -> None:
    registry, _, running = await in_service()
    monkeypatch.setattr(running, "stop", trio.sleep_forever)
    await registry.stop_all()
    logged.expect("not stopped in time")
    registry.close_all()
    assert running.closed


async def test_a_defect_in_the_work_behind_an_array_ends_nothing_else(
    opened: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, logged: LogRecord
) -> None:
    async def defect() -> None:
        raise ZeroDivisionError

    registry, served, running = await in_service()
    monkeypatch.setattr(running, "run", defect)
    await served.run()
    assert logged.expect("the work behind a namespace has failed")["exc_info"]
    await registry.stop_all()
    assert running.stopped


def test_a_start_that_fails_late_stops_the_arrays_that_it_has_opened(
    opened: list[dict[str, Any]], directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = directory / "c.toml"
    file.write_text(
        f"""
        [[namespace]]
        name = "array"
        raid = {{ members = ["{directory}/m0", "{directory}/m1"] }}
        [nbd]
        listen = ["unix:{directory}/n.sock"]
        [control]
        socket = "{directory}/c.sock"
        """
    )

    def refuse(*_: Any) -> None:
        raise PmblkError("no")

    monkeypatch.setattr(NbdServer, "bind", refuse)
    with pytest.raises(PmblkError, match="no"):
        trio.run(Service(file, load(file)).serve)
    (one,) = opened
    assert one["running"].stopped
    assert [path.name for path in directory.iterdir()] == ["c.toml"]


# ---- what it is to the rest of the daemon


async def test_its_file_goes_through_the_daemon(opened: list[dict[str, Any]]) -> None:
    registry, served, running = await in_service()
    assert choose(served.config.dax, served.namespace) == (Way.DAEMON, "it is an array")
    files = Files(registry)
    inode = inode_of(served)
    assert files.attributes(inode).size == running.size
    assert files.attributes(inode).allocated == running.size
    assert files.statistics().free == 0
    assert await files.write(inode, 100, b"hello") == 5
    assert bytes(await files.read(inode, 100, 5)) == b"hello"
    await files.sync(inode)
    assert ("flush", 0) in running.array.asked


async def test_its_export_says_what_it_is(opened: list[dict[str, Any]]) -> None:
    registry, _, running = await in_service()
    export = Exports(registry)["array"]
    assert (export.description, export.size) == ("768 KiB of RAID 5 over 4 members", running.size)


async def test_the_list_tells_of_its_members_and_not_of_a_file(
    opened: list[dict[str, Any]],
) -> None:
    _, served, running = await in_service()
    config = Config(namespace=[CONFIG], nbd=NbdConfig(listen=["tcp:h:1"]))
    report = report_of.namespace(served, config, None)
    assert (report.path, report.representation, report.durability) == ("", None, "members")
    view = views.namespaces([report], columns=80)
    assert "768 KiB, LBA 4096, RAID 5 (left-symmetric), 4 members, clean" in view
    assert "members: a flush is done when every member has flushed" in view
    assert "nbd://h:1/array" in view
    running.members[0].gone = True
    running.members[1].gone = True
    view = views.namespaces([report_of.namespace(served, config, None)], columns=80)
    assert "2 of them not whole" in view
    assert "failed: more members have failed than it can be without" in view


async def test_its_counters_are_those_of_its_clients_and_of_its_members(
    opened: list[dict[str, Any]],
) -> None:
    registry, served, _running = await in_service()
    one = Command(WRITE, 0, 0, 4096, payload=bytes(4096))
    await served.namespace.complete(served.namespace.execute([one]))
    answer = Answers(registry).handlers()["stats"].answer
    report = await answer(NamespaceQuestion(name="array"))
    view = views.stats(report)  # type: ignore[arg-type]
    assert view.startswith("array: RAID 5 (left-symmetric), 4 members, clean\n")
    assert "writes                             1       4 KiB" in view
    assert "members\n    read" in view
    assert "metadata" not in view


@pytest.mark.parametrize(
    ("command", "question", "words"),
    [
        (
            "switch",
            SwitchQuestion(name="array", kind="extent"),
            "array is an array: it has no representation to switch",
        ),
        (
            "describe",
            RangeQuestion(name="array", offset=0, length=1),
            "it has no memory to describe",
        ),
        (
            "poison",
            RangeQuestion(name="array", offset=0, length=1),
            "it has no memory that could fail",
        ),
        ("save", SaveQuestion(name="array", target="/x"), "it has no memory to save from"),
    ],
)
async def test_what_needs_memory_is_refused(
    opened: list[dict[str, Any]], command: str, question: Any, words: str, tmp_path: Path
) -> None:
    registry, served, _ = await in_service()
    with pytest.raises(PmblkError, match=words) as refused:
        await Answers(registry).handlers()[command].answer(question)
    assert not isinstance(refused.value, WorkFailed), "it is wrong use"
    assert served.users == 0


async def test_a_namespace_in_memory_has_no_work_and_needs_no_stop(
    make_namespace: MakeNamespace,
) -> None:
    registry = registered(make_namespace())
    (served,) = registry
    await served.run()
    await registry.stop_all()
    one = Command(READ, 0, 0, 4096)
    assert not served.namespace.execute([one])
    assert one.status == 0
    served.namespace.release([one])
