"""The kernel's name of a mountpoint."""

from pathlib import Path

from pmblkd.links import without_links


def test_links_are_followed_in_every_part(tmp_path: Path) -> None:
    (tmp_path / "real" / "mnt").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "last").symlink_to("link/mnt")
    (tmp_path / "absolute").symlink_to(tmp_path / "last")
    for name in ("real/mnt", "link/mnt", "last", "absolute"):
        assert without_links(tmp_path / name) == tmp_path / "real" / "mnt"


def test_what_is_not_there_keeps_its_name(tmp_path: Path) -> None:
    assert without_links(tmp_path / "new" / "mnt") == tmp_path / "new" / "mnt"


def test_a_circle_of_links_comes_to_an_end(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert without_links(tmp_path / "a").parent == tmp_path
