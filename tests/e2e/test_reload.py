"""Reloading the config of a daemon that serves: what comes, goes, changes, and is refused."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pmblk import PmblkError
from pmblk.media import open_media
from pmblkd.reports import ReloadReport
from tests.harness.daemon import Daemon, running
from tests.harness.file_systems import attached, make, mounted
from tests.harness.nbd_raw import ERR_UNKNOWN, FUA, INFO, LIST, REP_ACK, Client, connected, string
from tests.harness.programs import assert_no_complaints, program, wait_for

pytestmark = pytest.mark.e2e

SECONDS = 20
UNIT = 1 << 20
ONE = """
[[namespace]]
name = "one"
path = "{dir}/one.img"
size = "4MiB"
"""
TWO = """
[[namespace]]
name = "two"
path = "{dir}/two.img"
size = "2MiB"
"""
REST = """
[nbd]
listen = ["unix:{dir}/nbd.sock"]

[fuse]
mountpoint = "{dir}/mnt"
"""


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    with running(ONE + TWO + REST) as one:
        yield one


def nbd(daemon: Daemon, name: str = "nbd.sock") -> Path:
    return daemon.directory / name


def exports(daemon: Daemon) -> list[str]:
    """What LIST names."""
    with Client(nbd(daemon)) as client:
        replies = client.greet().ask_option(LIST)
    ends = [4 + int.from_bytes(reply.data[:4], "big") for reply in replies[:-1]]
    return [reply.data[4:end].decode() for reply, end in zip(replies, ends, strict=False)]


def is_export(daemon: Daemon, name: str) -> bool:
    """Whether a handshake that asks for it succeeds."""
    with Client(nbd(daemon)) as client:
        reply = client.greet().ask_option(INFO, string(name) + bytes(2))[-1]
    assert reply.kind in (REP_ACK, ERR_UNKNOWN)
    return reply.kind == REP_ACK


def names(daemon: Daemon) -> list[str]:
    return [namespace["name"] for namespace in daemon.list()]


def files(daemon: Daemon) -> list[str]:
    return sorted(os.listdir(daemon.directory / "mnt"))


def changes(report: ReloadReport) -> dict[str, list[str]]:
    """What a report names, without what it leaves empty."""
    found = {
        "added": report.added,
        "removed": report.removed,
        "draining": report.draining,
        "switched": [one.name for one in report.switched],
        "grown": report.grown,
        "changed": report.changed,
        "refused": [refusal.key for refusal in report.refused],
    }
    return {what: names for what, names in found.items() if names}


def reload(daemon: Daemon, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """By the command line."""
    return subprocess.run(
        daemon.command("reload", *arguments),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def test_media_on_a_device_of_the_daemon_s_own_are_refused(daemon: Daemon) -> None:
    """It could never stop: its last flush would need the file that it has just closed."""
    with attached(daemon, "one") as device:
        make("ext4", device)
        with mounted(device, daemon.directory / "fs") as directory:
            inside = TWO.replace("two", "inside").replace("{dir}/inside.img", f"{directory}/x.img")
            config = ONE + TWO + inside.replace("2MiB", "1MiB") + REST
            daemon.config.write_text(config.replace("{dir}", str(daemon.directory)))
            done = reload(daemon)
            assert done.returncode == 2
            assert "lies on a file system of this very daemon" in done.stderr
            assert names(daemon) == ["one", "two"]


def test_media_on_the_daemon_s_own_mount_are_refused(daemon: Daemon) -> None:
    """Their first I/O would have the daemon wait for itself."""
    inside = TWO.replace("two", "inside").replace("{dir}/inside.img", "{dir}/mnt/one")
    inside = inside.replace('size = "2MiB"\n', "")
    daemon.config.write_text((ONE + TWO + inside + REST).replace("{dir}", str(daemon.directory)))
    done = reload(daemon)
    assert done.returncode == 2
    assert "lies on a file system of this very daemon" in done.stderr
    assert names(daemon) == ["one", "two"]


# ---- namespaces that come and go


def test_a_file_that_has_not_changed_changes_nothing(daemon: Daemon) -> None:
    done = reload(daemon)
    assert (done.returncode, done.stdout, done.stderr) == (0, "nothing has changed\n", "")
    assert changes(daemon.reload()) == {}
    assert_no_complaints(daemon)


def test_a_new_namespace_is_an_export_and_a_file_at_once() -> None:
    with running(ONE + REST) as daemon:
        assert files(daemon) == ["one"]
        assert changes(daemon.reload(ONE + TWO + REST)) == {"added": ["two"]}
        assert names(daemon) == exports(daemon) == files(daemon) == ["one", "two"]
        with connected(nbd(daemon), "two") as client:
            assert client.write(4096, b"hello", flags=FUA) == 0
        assert (daemon.directory / "mnt/two").read_bytes()[4096:4101] == b"hello"
        assert_no_complaints(daemon)


def test_an_unused_namespace_is_gone_at_once_and_its_file_is_free(daemon: Daemon) -> None:
    with connected(nbd(daemon), "two") as client:
        assert client.write(0, b"kept") == 0
    wait_for(lambda: daemon.list()[1]["users"] == 0)
    assert changes(daemon.reload(ONE + REST)) == {"removed": ["two"]}
    assert names(daemon) == exports(daemon) == files(daemon) == ["one"]
    assert not is_export(daemon, "two")
    assert not (daemon.directory / "mnt/two").exists()
    open_media(daemon.directory / "two.img").close()
    assert changes(daemon.reload(ONE + TWO + REST)) == {"added": ["two"]}
    with connected(nbd(daemon), "two") as client:
        assert client.read(0, 4) == b"kept"
    assert_no_complaints(daemon)


def test_who_uses_a_namespace_that_left_is_served_to_the_end(daemon: Daemon) -> None:
    fd = os.open(daemon.directory / "mnt/two", os.O_RDWR)
    with connected(nbd(daemon), "two") as client:
        assert changes(daemon.reload(ONE + REST)) == {"draining": ["two"]}
        assert (exports(daemon), files(daemon)) == (["one"], ["one"])
        assert not is_export(daemon, "two")
        with pytest.raises(FileNotFoundError):
            os.open(daemon.directory / "mnt/two", os.O_RDONLY)
        (_, left) = daemon.list()
        assert (left["name"], left["draining"], left["users"]) == ("two", True, 2)
        assert client.write(0, b"by NBD") == 0
        assert os.pread(fd, 6, 0) == b"by NBD"
        assert os.pwrite(fd, b"by FUSE", 4096) == 7
    wait_for(lambda: daemon.list()[1]["users"] == 1)
    os.close(fd)
    wait_for(lambda: names(daemon) == ["one"])
    media = open_media(daemon.directory / "two.img")
    assert bytes(media.view[:6]) + bytes(media.view[4096:4103]) == b"by NBDby FUSE"
    media.close()
    assert_no_complaints(daemon)


def test_what_drains_cannot_come_back_before_it_is_gone(daemon: Daemon) -> None:
    with connected(nbd(daemon), "two") as client:
        daemon.reload(ONE + REST)
        daemon.config.write_text((ONE + TWO + REST).replace("{dir}", str(daemon.directory)))
        done = reload(daemon)
        assert done.returncode == 1
        assert done.stdout.startswith("namespace.two: refused, it is still draining; ")
        assert client.read(0, 4) == bytes(4)
    wait_for(lambda: names(daemon) == ["one"])
    assert changes(daemon.reload()) == {"added": ["two"]}


def test_a_device_that_is_attached_drains_until_it_is_detached(daemon: Daemon) -> None:
    with attached(daemon, "two") as device:
        assert changes(daemon.reload(ONE + REST)) == {"draining": ["two"]}
        device.write_bytes(b"x" * 4096)
        done = subprocess.run(
            daemon.command("switch", "two", "pfn"), capture_output=True, text=True, check=False
        )
        assert "two is draining: it takes no new users" in done.stderr
    wait_for(lambda: names(daemon) == ["one"])


def test_a_stop_does_not_wait_longer_for_what_drains(daemon: Daemon) -> None:
    with Client(nbd(daemon)) as client:
        client.go("two")
        daemon.reload(ONE + REST)
        assert client.write(0, b"last") == 0
        assert daemon.stop() == 0
        assert client.closed()
    assert (daemon.directory / "two.img").read_bytes()[:4] == b"last"


# ---- namespaces that change


def test_the_config_brings_its_representation_back(daemon: Daemon) -> None:
    with connected(nbd(daemon), "one") as client:
        assert client.write(0, b"hello") == 0
        new = ONE + 'representation = "pfn"\n' + TWO + REST
        report = daemon.reload(new)
        assert changes(report) == {"switched": ["one"]}
        assert report.switched[0].after.kind == "pfn"
        daemon.switch("one", "page-cache", arena="1MiB")
        assert daemon.reload().switched[0].before.options == {"arena": "1MiB"}
        assert daemon.kind("one") == "pfn"
        assert client.read(0, 5) == b"hello"
    assert_no_complaints(daemon)


def test_a_namespace_grows_and_never_shrinks(daemon: Daemon) -> None:
    file = daemon.directory / "mnt/one"
    assert file.stat().st_size == 4 * UNIT
    with connected(nbd(daemon), "one") as client:
        assert client.write(4 * UNIT, b"x") == 28
        grown = ONE.replace("4MiB", "8MiB") + TWO + REST
        assert changes(daemon.reload(grown)) == {"grown": ["one"]}
        assert file.stat().st_size == 8 * UNIT
        assert client.write(8 * UNIT - 4, b"tail") == 0
        assert os.path.getsize(daemon.directory / "one.img") == 8 * UNIT
    size = program("nbdinfo", "--size", daemon.uri("one"))
    assert int(size) == 8 * UNIT
    for _ in range(2):
        report = daemon.reload(ONE + TWO + REST)
        assert changes(report) == {"refused": ["namespace.one.size"]}
        assert report.refused[0].reason == "a namespace that is served can grow, not shrink"
    assert daemon.list()[0]["size_bytes"] == 8 * UNIT


def test_a_reserve_makes_room_for_a_page_table_on_the_device(daemon: Daemon) -> None:
    """Not for a namespace that is served; for a new one at once."""
    three = TWO.replace("two", "three") + "reserve = true\n"
    report = daemon.reload(ONE + "reserve = true\n" + TWO + three + REST)
    assert changes(report) == {"added": ["three"], "refused": ["namespace.one.reserve"]}
    listed = {one["name"]: (one["size_bytes"], one["reserve_bytes"]) for one in daemon.list()}
    assert listed["one"] == (4 * UNIT, 0)
    assert listed["three"] == (2 * UNIT * 63 // 64, 2 * UNIT // 64)
    daemon.switch("three", "struct-page", memmap="device")
    with pytest.raises(PmblkError, match="reserve = true"):
        daemon.switch("one", "struct-page", memmap="device")


def test_what_needs_a_restart_is_refused_by_its_key_and_the_rest_is_done(daemon: Daemon) -> None:
    new = (ONE + TWO + REST).replace('path = "{dir}/one.img"', 'path = "{dir}/else.img"')
    new = new.replace('size = "2MiB"', 'size = "2MiB"\nlba_size = 512\nrepresentation = "pfn"')
    new = new.replace("/mnt", "/other") + "[daemon]\nstop_seconds = 5\n"
    for switched in ({"switched": ["two"], "changed": ["daemon.stop_seconds"]}, {}):
        refused = ["namespace.one.path", "namespace.two.lba_size", "fuse.mountpoint"]
        assert changes(daemon.reload(new)) == {**switched, "refused": refused}
    assert daemon.list()[0]["path"] == str(daemon.directory / "one.img")
    assert daemon.list()[0]["fuse"]["path"] == str(daemon.directory / "mnt/one")
    assert not (daemon.directory / "else.img").exists()
    done = reload(daemon, "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["refused"][0] == {
        "key": "namespace.one.path",
        "reason": "needs a restart",
    }


def test_a_representation_that_cannot_be_had_does_not_hold_up_the_others() -> None:
    huge = ONE.replace("4MiB", "6TiB")
    with running(huge + REST) as daemon:
        eager = 'representation = { kind = "struct-page", init = "eager" }\n'
        report = daemon.reload(huge + eager + TWO + REST)
        assert changes(report) == {"added": ["two"], "refused": ["namespace.one.representation"]}
        assert "memory" in report.refused[0].reason
        assert daemon.kind("one") == "extent"


# ---- exports and settings


def test_addresses_come_and_go_and_connections_stay(daemon: Daemon) -> None:
    with connected(nbd(daemon), "one") as client:
        both = REST.replace('"]', '", "unix:{dir}/second.sock"]')
        assert changes(daemon.reload(ONE + TWO + both)) == {"changed": ["nbd.listen"]}
        with connected(nbd(daemon, "second.sock"), "two") as second:
            assert second.write(0, b"x") == 0
        only = REST.replace("nbd.sock", "second.sock")
        assert changes(daemon.reload(ONE + TWO + only)) == {"changed": ["nbd.listen"]}
        assert not nbd(daemon).exists()
        assert client.write(0, b"still here") == 0
        with pytest.raises(OSError, match="No such file"):
            Client(nbd(daemon))
        uri = daemon.uri("one", socket_name="second.sock")
        assert daemon.list()[0]["nbd"] == [uri]
        assert int(program("nbdinfo", "--size", uri)) == 4 * UNIT
    assert daemon.stop() == 0
    assert not nbd(daemon, "second.sock").exists()


def test_the_default_export_and_the_limits_change_for_new_clients(daemon: Daemon) -> None:
    rest = REST.replace("[fuse]", 'default = "two"\nmax_connections = 1\n[fuse]')
    rest += "[daemon]\nbusy_poll_us = 0\nlog_level = 'warning'\n"
    keys = ["nbd.default", "nbd.max_connections", "daemon.busy_poll_us", "daemon.log_level"]
    assert changes(daemon.reload(ONE + TWO + rest)) == {"changed": keys}
    with connected(nbd(daemon)) as client:
        assert daemon.list()[1]["users"] == 1
        with Client(nbd(daemon)) as second:
            assert second.closed(), "there is one already"
        before = daemon.log.count("level=info")
        client.read(0, 4096)
    daemon.reload()
    assert daemon.log.count("level=info") == before


# ---- files that are wrong, and signals


WRONG = (
    ("[[namespace", "not TOML"),
    (ONE + TWO + REST + "[daemn]\n", 'did you mean "daemon"'),
    (ONE + TWO.replace("/two", "/none/two") + REST, "no directory"),
    (ONE + TWO.replace("two.img", "one.img") + REST, "already belongs to one"),
    (ONE + TWO.replace('size = "2MiB"', "") + REST, "missing, and there is no"),
    (ONE + TWO + REST.replace("nbd.sock", "none/nbd.sock"), "no directory"),
    (ONE + TWO + REST.replace("nbd.sock", "pmblk.toml"), "is not a socket"),
)


def test_a_file_that_is_wrong_changes_nothing_and_is_one_line() -> None:
    """What else it asks for would be fine: `three` would go, and `two` would come."""
    three = TWO.replace("two", "three")
    with running(ONE + three + REST) as daemon:
        before = daemon.list()
        for config, words in WRONG:
            daemon.config.write_text(config.replace("{dir}", str(daemon.directory)))
            done = reload(daemon)
            assert (done.returncode, done.stdout) == (2, "")
            assert words in done.stderr
            assert done.stderr.count("\n") == 1
            assert daemon.list() == before
            assert not (daemon.directory / "two.img").exists()


def test_the_overrides_of_the_start_hold_for_every_reload() -> None:
    with running(ONE + TWO + REST, overrides=["namespace.one.size=8MiB"]) as daemon:
        assert changes(daemon.reload()) == {}
        assert daemon.list()[0]["size_bytes"] == 8 * UNIT


def test_a_hangup_reloads_and_a_file_that_is_wrong_is_logged(daemon: Daemon) -> None:
    daemon.config.write_text((ONE + REST).replace("{dir}", str(daemon.directory)))
    os.kill(daemon.pid, signal.SIGHUP)
    wait_for(lambda: "config reloaded" in daemon.log)
    assert names(daemon) == ["one"]
    daemon.config.write_text("[[")
    os.kill(daemon.pid, signal.SIGHUP)
    wait_for(lambda: "the config was not reloaded" in daemon.log)
    assert "level=error" in daemon.log
    assert names(daemon) == exports(daemon) == ["one"]
    assert daemon.stop() == 0


def test_hangups_in_a_hurry_do_no_harm(daemon: Daemon) -> None:
    with connected(nbd(daemon), "one") as client:
        for number in range(50):
            config = (ONE + REST, ONE + TWO + REST)[number % 2]
            daemon.config.write_text(config.replace("{dir}", str(daemon.directory)))
            os.kill(daemon.pid, signal.SIGHUP)
            assert client.write(number * 4096, bytes([number]) * 4096) == 0
        daemon.reload()
        assert names(daemon) == exports(daemon) == files(daemon) == ["one", "two"]
        for number in range(50):
            assert client.read(number * 4096, 4096) == bytes([number]) * 4096
    assert "Traceback" not in daemon.log
    assert daemon.stop() == 0
