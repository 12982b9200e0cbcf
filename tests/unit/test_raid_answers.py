"""What the control socket is asked about arrays in service; members are simulated."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from pmblk import PmblkError
from pmblkd import arrays, preflight
from pmblkd.config import Config, RaidConfig, load
from pmblkd.errors import WorkFailed
from pmblkd.questions import (
    AssembleQuestion,
    GrowQuestion,
    MemberQuestion,
    NamespaceQuestion,
    RaidStatusQuestion,
    ReplaceQuestion,
    ScrubQuestion,
)
from pmblkd.raid_answers import RaidAnswers
from pmblkd.raid_reports import RaidReport, StoppedReport
from pmblkd.registry import Registry, Served
from pmblkd.reloader import Reloader
from pmblkd.service import Service
from pmblkd.spin import Spinner
from tests.unit.arrays import FakeRunning
from tests.unit.conftest import LogRecord, MakeNamespace
from tests.unit.test_arrays import CONFIG, in_service, opened

__all__ = ["opened"]  # a fixture


class GrowableRunning(FakeRunning):
    resized: Callable[[], None] = staticmethod(lambda: None)

    async def grow(self, *, size: int | None, add: Sequence[str]) -> None:
        await self._note("grow", size, tuple(add))
        self.size *= 2


async def answers(
    **options: Any,
) -> tuple[RaidAnswers, FakeRunning, Served, list[str]]:
    registry, served, running = await in_service()
    resized: list[str] = []
    made = RaidAnswers(registry, resized=lambda one: resized.append(one.name), **options)
    return made, running, served, resized


async def ask(made: RaidAnswers, command: str, question: Any) -> Any:
    handler = made.handlers()[command]
    assert isinstance(question, handler.takes)
    return await handler.answer(question)


@pytest.mark.parametrize(
    ("command", "question", "asked"),
    [
        ("raid-fail", MemberQuestion(name="array", member="/m0"), ("fail", "/m0")),
        ("raid-remove", MemberQuestion(name="array", member="/m0"), ("remove", "/m0")),
        ("raid-add", MemberQuestion(name="array", member="nbd://h/x"), ("add", "nbd://h/x")),
        (
            "raid-replace",
            ReplaceQuestion(name="array", old="/m0", new="/m9"),
            ("replace", "/m0", "/m9"),
        ),
        ("raid-scrub", ScrubQuestion(name="array"), ("scrub", False)),
        ("raid-scrub", ScrubQuestion(name="array", repair=True), ("scrub", True)),
        ("raid-scrub", ScrubQuestion(name="array", stop=True), ("stop_scrub",)),
    ],
)
async def test_what_is_asked_of_an_array_reaches_it_and_its_status_comes_back(
    opened: list[dict[str, Any]], command: str, question: Any, asked: tuple[Any, ...]
) -> None:
    made, running, served, _ = await answers()
    report = await ask(made, command, question)
    assert isinstance(report, RaidReport)
    assert (report.name, report.status.level) == ("array", 5)
    assert running.asked == [asked]
    assert served.users == 0


async def test_a_refusal_is_wrong_use_and_a_member_that_fails_is_work_that_failed(
    opened: list[dict[str, Any]],
) -> None:
    made, running, served, _ = await answers()
    question = MemberQuestion(name="array", member="/m0")
    running.refusal = PmblkError("no", hint="do not")
    with pytest.raises(PmblkError, match="no; do not") as refused:
        await ask(made, "raid-fail", question)
    assert not isinstance(refused.value, WorkFailed)
    running.refusal.__cause__ = OSError("a member")
    with pytest.raises(WorkFailed, match="no; do not"):
        await ask(made, "raid-fail", question)
    assert served.users == 0


async def test_status_is_of_all_arrays_or_of_one(
    opened: list[dict[str, Any]], make_namespace: MakeNamespace
) -> None:
    made, _, _, _ = await answers()
    for name in (None, "array"):
        (report,) = await ask(made, "raid-status", RaidStatusQuestion(name=name))
        assert (report.name, len(report.status.members)) == ("array", 4)
    with pytest.raises(PmblkError, match="no namespace aray; did you mean"):
        await ask(made, "raid-status", RaidStatusQuestion(name="aray"))


async def test_an_array_grows_and_whoever_keeps_its_size_is_told(
    opened: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    question = GrowQuestion(name="array", size=None, add=["/m9"])
    made, _, _, _ = await answers()
    with pytest.raises(PmblkError, match="array cannot grow"):
        await ask(made, "raid-grow", question)

    async def open_array(_raid: RaidConfig, **_allowed: bool) -> FakeRunning:
        return GrowableRunning()

    monkeypatch.setattr(arrays, "open_array", open_array)
    made, running, served, resized = await answers()
    before = served.namespace.size
    await ask(made, "raid-grow", question)
    assert running.asked == [("grow", None, ("/m9",))]
    assert resized == ["array"]
    assert isinstance(running, GrowableRunning)
    running.resized()  # the data have moved
    assert resized == ["array", "array"]
    assert served.namespace.size == 2 * before


async def test_a_member_of_our_own_is_refused(
    opened: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made, running, _, _ = await answers(mountpoint=tmp_path)
    monkeypatch.setattr(preflight, "is_served_by_us", lambda path, mount: path.parent == mount)
    inside = f"{tmp_path}/ns1"
    for command, question in (
        ("raid-add", MemberQuestion(name="array", member=inside)),
        ("raid-replace", ReplaceQuestion(name="array", old="/m0", new=inside)),
    ):
        with pytest.raises(PmblkError, match="is served by this very daemon"):
            await ask(made, command, question)
    assert running.asked == []
    await ask(made, "raid-add", MemberQuestion(name="array", member="/elsewhere"))
    assert running.asked == [("add", "/elsewhere")]


# ---- stopping and assembling


class Daemon:
    """A service with one array and one namespace in memory; nothing is mounted or listens."""

    def __init__(self, directory: Path) -> None:
        self.file = directory / "c.toml"
        self.file.write_text(
            f"""
            [[namespace]]
            name = "a"
            path = "{directory}/a.img"
            size = "1MiB"
            [[namespace]]
            name = "array"
            raid = {{ members = ["{directory}/m0", "{directory}/m1"] }}
            [nbd]
            listen = ["unix:{directory}/n.sock"]
            [control]
            socket = "{directory}/c.sock"
            """
        )
        self.config: Config = load(self.file)
        self.service = Service(self.file, self.config)
        self.registry: Registry = self.service._registry

    async def open(self, nursery: trio.Nursery) -> None:
        for one in self.config.namespace:
            served = await arrays.open_namespace(one)
            self.registry.add(served)
            nursery.start_soon(served.run)
        self.service._nursery = nursery
        self.service._reloader = Reloader(
            self.file,
            (),
            self.config,
            registry=self.registry,
            spinner=Spinner(0),
            nbd=None,
            fuse=None,
        )

    async def stop(self, name: str) -> StoppedReport:
        return await self.service._stop_array(NamespaceQuestion(name=name))

    async def assemble(self, name: str, **allowed: bool) -> RaidReport:
        return await self.service._assemble_array(AssembleQuestion(name=name, **allowed))

    def names(self) -> list[str]:
        return [served.name for served in self.registry]

    async def end(self, nursery: trio.Nursery) -> None:
        nursery.cancel_scope.cancel()
        await self.registry.stop_all()
        self.registry.close_all()


async def test_an_array_that_is_stopped_is_gone_until_it_is_assembled(
    opened: list[dict[str, Any]], directory: Path
) -> None:
    daemon = Daemon(directory)
    async with trio.open_nursery() as nursery:
        await daemon.open(nursery)
        assert await daemon.stop("array") == StoppedReport(name="array", users=0)
        assert daemon.names() == ["a"]
        assert opened[0]["running"].stopped
        report = await daemon.assemble("array", degraded=True)
        assert (report.name, opened[1]["degraded"], opened[1]["force"]) == ("array", True, False)
        assert daemon.names() == ["a", "array"]
        assert (await daemon.service._reload()).added == []
        await trio.testing.wait_all_tasks_blocked()
        assert opened[1]["running"].runs == 1
        await daemon.end(nursery)


async def test_an_array_that_is_stopped_comes_back_with_a_reload(
    opened: list[dict[str, Any]], directory: Path
) -> None:
    daemon = Daemon(directory)
    async with trio.open_nursery() as nursery:
        await daemon.open(nursery)
        await daemon.stop("array")
        assert (await daemon.service._reload()).added == ["array"]
        await daemon.end(nursery)


async def test_an_array_that_is_stopped_serves_its_users_to_the_end(
    opened: list[dict[str, Any]], directory: Path
) -> None:
    daemon = Daemon(directory)
    async with trio.open_nursery() as nursery:
        await daemon.open(nursery)
        with daemon.registry.named("array").used():
            assert await daemon.stop("array") == StoppedReport(name="array", users=1)
            with pytest.raises(PmblkError, match="draining already"):
                await daemon.stop("array")
            with pytest.raises(PmblkError, match="array is still draining"):
                await daemon.assemble("array")
            assert not opened[0]["running"].stopped
        await trio.testing.wait_all_tasks_blocked()
        assert opened[0]["running"].stopped
        await daemon.end(nursery)


async def test_what_cannot_be_stopped_or_assembled_is_refused(
    opened: list[dict[str, Any]],
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    logged: LogRecord,
) -> None:
    daemon = Daemon(directory)
    async with trio.open_nursery() as nursery:
        await daemon.open(nursery)
        with pytest.raises(PmblkError, match="a is no array"):
            await daemon.stop("a")
        with pytest.raises(PmblkError, match='no array arrya; did you mean "array"'):
            await daemon.assemble("arrya")
        with pytest.raises(PmblkError, match="array is served already"):
            await daemon.assemble("array")
        await daemon.stop("array")

        async def refuse(_raid: RaidConfig, **_allowed: bool) -> FakeRunning:
            raise PmblkError("2 of 3 members are missing")

        monkeypatch.setattr(arrays, "open_array", refuse)
        with pytest.raises(WorkFailed, match="2 of 3 members are missing"):
            await daemon.assemble("array")
        assert (await daemon.service._reload()).refused[0].key == "namespace.array"
        logged.expect("not reloaded")
        assert daemon.names() == ["a"]
        await daemon.end(nursery)


async def test_an_array_may_have_another_name_than_its_namespace(
    opened: list[dict[str, Any]],
) -> None:
    made, running, _, _ = await answers()
    running.name = "made-elsewhere"
    (report,) = await ask(made, "raid-status", RaidStatusQuestion())
    assert (report.name, report.status.name) == (CONFIG.name, "made-elsewhere")
