"""Who owns the files of a mount, and what is said of a config before anything is mounted."""

import grp
import os
import pwd
from pathlib import Path
from typing import Any

import pytest

from pmblk import PmblkError
from pmblkd import mappers, mounts, preflight
from pmblkd.config import Config, ControlConfig, FuseConfig, NamespaceConfig
from pmblkd.errors import ConfigError
from pmblkd.mappers import MappedAs
from pmblkd.rights import ID_MAX, Rights, rights_of
from tests.unit.test_mappings import mapped

FILE = Path("/etc/pmblk.toml")
UNKNOWN = 3_999_999_999  # a number that no user of a machine has, and that one could have


def fuse(**changes: Any) -> FuseConfig:
    return FuseConfig(mountpoint="/mnt/x", **changes)


def test_without_an_owner_the_files_are_ours() -> None:
    assert rights_of(fuse(mode="0640")) == Rights(os.getuid(), os.getgid(), 0o640)


def test_an_owner_is_a_user_or_a_user_and_a_group_by_name_or_number() -> None:
    user = pwd.getpwuid(0)
    other = max(grp.getgrall(), key=lambda group: group.gr_gid)
    for name in (user.pw_name, "0", "00", f"{user.pw_name}:"):
        assert rights_of(fuse(owner=name)) == Rights(0, user.pw_gid, 0o600)
    for group in (other.gr_name, str(other.gr_gid)):
        for name in (user.pw_name, "0"):
            assert rights_of(fuse(owner=f"{name}:{group}")) == Rights(0, other.gr_gid, 0o600)


def test_a_number_that_nobody_has_is_taken_as_it_is() -> None:
    """A container's, say."""
    assert rights_of(fuse(owner=str(UNKNOWN))) == Rights(UNKNOWN, UNKNOWN, 0o600)
    assert rights_of(fuse(owner=f"0:{UNKNOWN}")).gid == UNKNOWN
    assert rights_of(fuse(owner=f"{ID_MAX}:{ID_MAX}")) == Rights(ID_MAX, ID_MAX, 0o600)


@pytest.mark.parametrize(
    ("owner", "message"),
    [
        ("nobody-of-that-name", 'no user "nobody-of-that-name"'),
        ("0:nobody-of-that-name", 'no group "nobody-of-that-name"'),
        ("", 'no user ""'),
        (":root", 'no user ""'),
        ("-1", 'no user "-1"'),
        ("root\0", "no user"),
        ("0:ro\0ot", "no group"),
        ("\u0661", "no user"),
        ("0:0:0", 'no group "0:0"'),
        ("4294967295", "4294967295 is too large"),
        ("0:4294967295", "4294967295 is too large"),
        ("9" * 5000, "is too large"),
    ],
)
def test_who_cannot_be_found_is_named(owner: str, message: str) -> None:
    with pytest.raises(PmblkError, match=message):
        rights_of(fuse(owner=owner))


# ---- preflight


def config(directory: Path, *, kind: str = "extent", **changes: Any) -> Config:
    (directory / "mnt").mkdir(exist_ok=True)
    media = directory / "a.img"
    one = NamespaceConfig(name="a", path=str(media), size="1MiB", representation=kind)
    return Config(
        namespace=[one],
        fuse=FuseConfig(mountpoint=str(directory / "mnt"), **changes),
        control=ControlConfig(socket=str(directory / "c.sock")),
    )


def test_an_owner_that_is_not_there_is_said_before_anything_is_mounted(directory: Path) -> None:
    preflight.check(FILE, config(directory, owner="root"))
    with pytest.raises(ConfigError, match=r"fuse\.owner: no user"):
        preflight.check(FILE, config(directory, owner="nobody-of-that-name"))


def test_media_that_a_process_maps_are_not_described_by_copies(directory: Path) -> None:
    copies = config(directory, kind="page-cache")
    preflight.check(FILE, copies)
    (directory / "a.img").write_bytes(bytes(1 << 20))
    with mapped(directory / "a.img") as pid:
        with pytest.raises(ConfigError, match=rf"namespace\[0\].path: process {pid} maps"):
            preflight.check(FILE, copies)
        preflight.check(FILE, config(directory))
    preflight.check(FILE, copies)


def test_media_that_somebody_has_open_are_not_described_by_copies(directory: Path) -> None:
    """Nobody is named by /proc: a client, say, whose mount is gone with its daemon."""
    path = directory / "a.img"
    path.write_bytes(bytes(1 << 20))
    copies = config(directory, kind="page-cache")
    with path.open("rb"):
        with pytest.raises(ConfigError, match=rf"others have {path} open or mapped.*detach --all"):
            preflight.check(FILE, copies)
        preflight.check(FILE, config(directory))
    preflight.check(FILE, copies)


def test_a_client_of_a_killed_daemon_is_known_by_its_file_on_the_mount_that_is_left(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (directory / "a.img").write_bytes(bytes(1 << 20))
    left = mounts.Mount(directory / "mnt", "fuse.pmblk", "pmblk", 40)
    monkeypatch.setattr(mounts, "find", lambda path: left if path == left.path else None)
    monkeypatch.setattr(mounts, "check_mountpoint", lambda _path: None)
    asked: list[Any] = []

    def find(path: Path, _status: object, *, also: Any) -> list[int]:
        asked.append((path, also))
        return [4321]

    monkeypatch.setattr(mappers, "processes_that_map", find)
    copies = config(directory, kind="page-cache")
    preflight.check(FILE, copies)
    assert not asked, "nobody has the media open"
    with (
        (directory / "a.img").open("rb"),  # as the mapping has it
        pytest.raises(ConfigError, match="process 4321 maps"),
    ):
        preflight.check(FILE, copies)
    assert asked == [(directory / "a.img", (MappedAs("00:28", "a"),))]
