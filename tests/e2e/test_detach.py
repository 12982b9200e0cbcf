"""Detaching, with the daemon and without it: what goes, and what is refused."""

import json
import os
from pathlib import Path

import pytest

from pmblkd import mounts
from tests.e2e.attaching import attach_it, devices, served
from tests.harness.command_line import answer, ask, complaint, detach_all, pmblk
from tests.harness.file_systems import attached, make, mounted, run

pytestmark = pytest.mark.e2e


def test_a_detached_device_is_gone() -> None:
    with served() as daemon:
        with attached(daemon, "data") as device:
            assert devices(daemon) == [device]
        assert devices(daemon) == []


def test_all_devices_go_but_for_one_that_is_mounted() -> None:
    with served() as daemon:
        data, small = attach_it(daemon, "data"), attach_it(daemon, "small")
        make("ext4", data)
        with mounted(data, daemon.directory / "fs") as directory:
            done = ask(daemon, "detach", "--all")
            assert done.returncode == 1
            assert done.stdout.splitlines() == [
                str(small),
                f"{data}: refused, is mounted on {directory}; run: umount {directory}",
            ]
            assert devices(daemon) == [data]
            (directory / "file").write_text("still works")
        assert answer(daemon, "detach", "--all") == f"{data}\n"
        assert answer(daemon, "detach", "--all") == "nothing is attached\n"
        assert mounts.find(daemon.directory / "mnt") is not None


def test_a_device_that_another_one_lies_on_is_refused() -> None:
    with served() as daemon:
        device = attach_it(daemon, "data")
        above = run("losetup", "--find", "--show", "--direct-io=on", str(device)).strip()
        try:
            done = ask(daemon, "detach", "--all", "--json")
        finally:
            run("losetup", "--detach", above)
        assert done.returncode == 1
        (refusal,) = json.loads(done.stdout)["refused"]
        assert refusal["key"] == str(device)
        assert refusal["reason"] == f"is the file of {above}; run: losetup --detach {above}"


@pytest.mark.parametrize("engine", ["kernel", "pyfuse3"])
def test_what_a_killed_daemon_left_goes_without_a_daemon(engine: str) -> None:
    with served(engine) as daemon:
        mountpoint = str(daemon.directory / "mnt")
        data, small = attach_it(daemon, "data"), attach_it(daemon, "small")
        make("ext4", data)
        with mounted(data, daemon.directory / "fs") as directory:
            daemon.kill()
            status, said = detach_all(daemon)
            assert (status, said["devices"], said["unmounted"]) == (1, [str(small)], [])
            (refusal,) = said["refused"]
            assert refusal == {
                "key": str(data),
                "reason": f"is mounted on {directory}; run: umount {directory}",
            }
        assert detach_all(daemon) == (
            0,
            {"devices": [str(data)], "unmounted": [mountpoint], "aborted": [], "refused": []},
        )
        assert mounts.find(Path(mountpoint)) is None
        assert devices(daemon) == []
        daemon.start()
        assert "killed" not in daemon.log


def test_a_device_is_found_also_when_its_dead_mount_was_taken_off_the_tree() -> None:
    with served() as daemon:
        device = attach_it(daemon, "data")
        daemon.kill()
        mounts.unmount(daemon.directory / "mnt")
        status, said = detach_all(daemon)
        assert (status, said["devices"]) == (0, [str(device)])


def test_a_living_daemon_keeps_its_mount_whatever_detach_is_told() -> None:
    with served() as daemon:
        device = attach_it(daemon, "data")
        status, said = detach_all(daemon, "--force")
        assert (status, said["devices"]) == (0, [str(device)])
        assert said["aborted"] == said["unmounted"] == []
        assert sorted(os.listdir(daemon.directory / "mnt")) == ["data", "fixed", "small"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "detach takes a NAME, or --all and its options"),
        (["data", "--force"], "detach takes a NAME, or --all and its options"),
        (["data", "--all"], "--all takes no NAME"),
        (["--all", "--force"], "--force and --set take --config"),
        (["--all", "--socket", "/nowhere"], "pmblk detach --all --config FILE"),
        (["--all", "--config", "/nowhere"], "/nowhere: cannot read it"),
    ],
)
def test_a_detach_that_cannot_be_meant_is_one_line(arguments: list[str], words: str) -> None:
    assert words in complaint(pmblk("detach", *arguments))
