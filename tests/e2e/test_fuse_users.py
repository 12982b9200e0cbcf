"""Who may do what: other users at the mount, a daemon without root, a machine without FUSE."""

import contextlib
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from pmblkd import mounts
from tests.harness.daemon import PMBLK, Daemon, running, scratch
from tests.harness.file_systems import ProgramError, guarded, run
from tests.harness.programs import assert_no_complaints, wait_for

pytestmark = pytest.mark.e2e

SIZE = 4 << 20
HANG_SECONDS = 60
NOBODY, SOMEBODY, GROUP = 65534, 1234, 4321
CONFIG = """
[[namespace]]
name = "data"
path = "{dir}/data.img"
size = 4194304

[nbd]
listen = ["unix:{dir}/nbd.sock"]

[fuse]
mountpoint = "{dir}/mnt"
"""
ENGINES = ("kernel", "pyfuse3")


def as_user(uid: int, *, gid: int, capabilities: str = "-all") -> list[str]:
    """What goes before a command. Users here are numbers; none of them has to be known."""
    return [
        *("setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups"),
        *(f"--inh-caps={capabilities}", f"--ambient-caps={capabilities}"),
    ]


@contextlib.contextmanager
def served(fuse: str) -> Iterator[tuple[Daemon, Path]]:
    """In a directory that all may pass through: only the mount keeps anybody out."""
    with running(CONFIG + fuse) as daemon, guarded(daemon, seconds=HANG_SECONDS):
        daemon.directory.chmod(0o755)
        yield daemon, daemon.directory / "mnt" / "data"
        assert_no_complaints(daemon)


# ---- other users at the mount


def rights(file: Path, uid: int, gid: int) -> str:
    """What the user may do: r, w, both or nothing."""
    read = ("dd", f"if={file}", "of=/dev/null", "bs=4096", "count=1")
    write = ("dd", "if=/dev/zero", f"of={file}", "bs=4096", "count=1", "conv=notrunc")
    return "".join(word for word, command in (("r", read), ("w", write)) if _may(command, uid, gid))


def _may(command: tuple[str, ...], uid: int, gid: int) -> bool:
    try:
        run(*as_user(uid, gid=gid), *command)
    except ProgramError as error:
        if "Permission denied" not in str(error):
            raise
        return False
    return True


@pytest.mark.parametrize("engine", ENGINES)
def test_without_allow_other_nobody_else_gets_in(engine: str) -> None:
    """Whatever the file's owner and mode."""
    fuse = f'engine = "{engine}"\nowner = "{NOBODY}"\nmode = "0666"\n'
    with served(fuse) as (_, file):
        assert rights(file, NOBODY, NOBODY) == ""
        with pytest.raises(ProgramError, match="Permission denied"):
            run(*as_user(NOBODY, gid=NOBODY), "ls", str(file.parent))
        assert rights(file, 0, 0) == "rw"


@pytest.mark.parametrize(
    ("engine", "owner", "mode", "expected"),
    [
        ("kernel", None, "0600", {(NOBODY, NOBODY): "", (0, 0): "rw"}),
        ("kernel", None, "0644", {(NOBODY, NOBODY): "r", (SOMEBODY, GROUP): "r"}),
        ("kernel", f"{NOBODY}", "0600", {(NOBODY, NOBODY): "rw", (SOMEBODY, NOBODY): ""}),
        (
            "kernel",
            f"{SOMEBODY}:{GROUP}",
            "0640",
            {(SOMEBODY, SOMEBODY): "rw", (NOBODY, GROUP): "r", (NOBODY, NOBODY): ""},
        ),
        ("pyfuse3", f"{NOBODY}", "0600", {(NOBODY, NOBODY): "rw", (SOMEBODY, NOBODY): ""}),
    ],
)
def test_with_allow_other_owner_and_mode_say_who_gets_in(
    engine: str, owner: str | None, mode: str, expected: Mapping[tuple[int, int], str]
) -> None:
    fuse = f'engine = "{engine}"\nallow_other = true\nmode = "{mode}"\n'
    if owner is not None:
        fuse += f'owner = "{owner}"\n'
    with served(fuse) as (daemon, file):
        assert {user: rights(file, *user) for user in expected} == expected
        assert (daemon.directory / "data.img").stat().st_uid == 0


# ---- mount options


@pytest.mark.parametrize("engine", ENGINES)
def test_mount_options_are_those_of_the_config(engine: str) -> None:
    with served(f'engine = "{engine}"\noptions = ["noatime", "noexec", "ro"]\n') as (_, file):
        assert {"noatime", "noexec", "ro", "nosuid", "nodev"} <= mount_options(file.parent)
        with pytest.raises(ProgramError, match="Read-only file system"):
            run("dd", "if=/dev/zero", f"of={file}", "count=1", "conv=notrunc")
        assert file.read_bytes() == bytes(SIZE)


@pytest.mark.parametrize("engine", ENGINES)
def test_without_options_the_mount_can_be_written_to(engine: str) -> None:
    with served(f'engine = "{engine}"\n') as (_, file):
        shown = mount_options(file.parent)
        assert {"rw", "nosuid", "nodev"} <= shown
        assert not {"noatime", "noexec", "ro"} & shown


def mount_options(mountpoint: Path) -> set[str]:
    (line,) = (
        line
        for line in Path("/proc/self/mountinfo").read_text().splitlines()
        if line.split()[4] == str(mountpoint)
    )
    return set(line.split()[5].split(","))


# ---- a daemon without root


@contextlib.contextmanager
def served_by_nobody(fuse: str = "") -> Iterator[Daemon]:
    """It may read and search every directory, for this may lie in one that only root can read."""
    with scratch() as directory:
        os.chown(directory, NOBODY, NOBODY)
        program = [*as_user(NOBODY, gid=NOBODY, capabilities="+dac_read_search"), PMBLK, "serve"]
        text = (CONFIG + fuse).replace("{dir}", str(directory))
        daemon = Daemon(directory, text, program=program)
        try:
            daemon.start()
            with guarded(daemon, seconds=HANG_SECONDS):
                yield daemon
        finally:
            if daemon.running:
                daemon.stop()


def test_without_root_the_kernel_engine_serves_without_passthrough_and_says_so() -> None:
    """Mounted by fusermount3, and its user's alone: not even root gets in."""
    with served_by_nobody() as daemon:
        (listed,) = daemon.list()
        fuse = listed["fuse"]
        assert (fuse["engine"], fuse["discards"]) == ("kernel", True)
        assert (fuse["dax"], fuse["dax_reason"]) == ("off", "passthrough takes CAP_SYS_ADMIN")
        file = daemon.directory / "mnt" / "data"
        assert rights(file, NOBODY, NOBODY) == "rw"
        assert rights(file, 0, 0) == ""
        run(*as_user(NOBODY, gid=NOBODY), "fallocate", "--length=4096", str(file))
        assert {"nosuid", "nodev"} <= mount_options(file.parent)
        assert daemon.stop() == 0, daemon.log
        assert mounts.find(file.parent) is None
        assert "level=error" not in daemon.log


def test_without_root_pyfuse3_serves_too() -> None:
    with served_by_nobody('engine = "pyfuse3"\n') as daemon:
        (listed,) = daemon.list()
        assert (listed["fuse"]["engine"], listed["fuse"]["discards"]) == ("pyfuse3", False)
        assert rights(daemon.directory / "mnt" / "data", NOBODY, NOBODY) == "rw"
        assert daemon.stop() == 0, daemon.log


def test_a_mount_of_nobody_s_killed_daemon_is_no_obstacle_to_the_next() -> None:
    with served_by_nobody() as daemon:
        daemon.kill()
        daemon.start()
        wait_for(lambda: "killed daemon's mount is in the way" in daemon.log)
        assert rights(daemon.directory / "mnt" / "data", NOBODY, NOBODY) == "rw"


# ---- no FUSE


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
def test_a_machine_without_fuse_gets_one_clear_line(engine: str) -> None:
    """/dev/fuse is there, and nobody may open it, in a mount namespace of the daemon's own."""
    with scratch() as directory:
        config = directory / "pmblk.toml"
        text = CONFIG + f'engine = "{engine}"\n[control]\nsocket = "{directory}/control.sock"\n'
        config.write_text(text.replace("{dir}", str(directory)))
        unusable = "mount --bind /dev/fuse /dev/fuse && mount -o remount,bind,nodev /dev/fuse"
        command = f'{unusable} && exec "$0" serve "$1"'
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", command, PMBLK, str(config)],
            capture_output=True,
            text=True,
            timeout=HANG_SECONDS,
            check=False,
        )
        assert (done.returncode, done.stdout) == (2, ""), done
        complaint = done.stderr.splitlines()[-1]
        assert complaint.startswith("pmblk: cannot ")
        assert "/dev/fuse" in complaint
        assert "Permission denied" in complaint or engine == "pyfuse3"
        assert "Traceback" not in done.stderr
        assert sorted(path.name for path in directory.iterdir()) == ["pmblk.toml"]
