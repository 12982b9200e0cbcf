"""A reload carried out on namespaces in service; that of a whole daemon is tested end to end."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from pmblkd.config import Config, load
from pmblkd.fuse.dax import Way, choose
from pmblkd.registry import Registry, Served, open_served
from pmblkd.reloader import Reloader
from pmblkd.reports import ReloadReport
from pmblkd.spin import Spinner
from tests.unit.test_mappings import mapped


class Daemon:
    """What of a daemon a reload changes, over one config file; nothing is mounted or listens."""

    def __init__(self, directory: Path) -> None:
        self.file = directory / "pmblk.toml"
        self.directory = directory
        config = self.write()
        self.registry = Registry()
        for one in config.namespace:
            self.registry.add(open_served(one))
        self.reloader = Reloader(
            self.file,
            (),
            config,
            registry=self.registry,
            spinner=Spinner(0),
            nbd=None,
            fuse=None,
        )

    def write(self, *lines: str) -> Config:
        """The file with these lines in its namespace."""
        newline = "\n"
        text = f"""
            [[namespace]]
            name = "a"
            path = "{self.directory}/a.img"
            size = "1MiB"
            {newline.join(lines)}
            [fuse]
            mountpoint = "{self.directory}/mnt"
            [control]
            socket = "{self.directory}/c.sock"
        """
        self.file.write_text(text)
        return load(self.file)

    @property
    def served(self) -> Served:
        return self.registry.named("a")

    async def reload(self) -> ReloadReport:
        async with trio.open_nursery() as nursery:
            return await self.reloader.reload(nursery)


@pytest.fixture
def daemon(directory: Path) -> Iterator[Daemon]:
    one = Daemon(directory)
    yield one
    one.registry.close_all()


async def test_how_a_file_may_be_mapped_changes_at_once_and_only_once(daemon: Daemon) -> None:
    ways = []
    for dax in ("off", "fast", "auto"):
        daemon.write(f'dax = "{dax}"')
        report = await daemon.reload()
        assert (report.changed, report.refused) == (["namespace.a.dax"], [])
        ways.append(choose(daemon.served.config.dax, daemon.served.namespace)[0])
        assert (await daemon.reload()).changed == []
    assert ways == [Way.DAEMON, Way.FAST, Way.DAX]


async def test_a_file_that_is_closed_to_mappings_can_be_switched_to_copies_in_one_reload(
    daemon: Daemon,
) -> None:
    daemon.write('dax = "off"', 'representation = "page-cache"')
    report = await daemon.reload()
    assert [one.name for one in report.switched] == ["a"]
    assert report.changed == ["namespace.a.dax"]
    assert not daemon.served.dax_kept_out


async def test_a_switch_to_copies_is_refused_while_somebody_maps_the_media(daemon: Daemon) -> None:
    daemon.write('representation = "page-cache"')
    with mapped(daemon.directory / "a.img") as pid:
        report = await daemon.reload()
    assert report.switched == []
    (refusal,) = report.refused
    assert refusal.key == "namespace.a.representation"
    assert f"process {pid} maps them" in refusal.reason
    assert [one.name for one in (await daemon.reload()).switched] == ["a"]
