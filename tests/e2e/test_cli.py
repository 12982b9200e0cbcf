"""The command line: good configs and overrides, and the commands that ask a running daemon."""

import json
import os
import shlex
import socket
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from pmblk.representations import KINDS
from tests.e2e.test_cli_configs import GOOD, everything_in, refusal
from tests.harness.command_line import SECONDS, answer, ask, complaint, pmblk
from tests.harness.daemon import PMBLK, Daemon, running, scratch
from tests.harness.file_systems import attached, make, mounted, run

pytestmark = pytest.mark.e2e

SHIPPED = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))
COLUMNS = 80
SERVED = """
[[namespace]]
name = "data"
path = "{dir}/data.img"
size = "64MiB"

[[namespace]]
name = "a-namespace-with-quite-a-long-name.v2"
path = "{dir}/long.img"
size = "8MiB"
lba_size = 512
representation = "page-cache"

[nbd]
listen = ["unix:{dir}/nbd.sock"]

[fuse]
mountpoint = "{dir}/mnt"
"""
NBD_ONLY = """
[[namespace]]
name = "data"
path = "{dir}/data.img"
size = "1MiB"

[nbd]
listen = ["unix:{dir}/nbd.sock"]
"""


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with running(SERVED) as one:
        yield one


# ---- configs that are good


@pytest.mark.parametrize("shipped", SHIPPED, ids=lambda shipped: str(shipped.name))
def test_every_config_that_we_ship_is_good(shipped: Path) -> None:
    """With its paths in a scratch directory: others may have the real ones."""
    with scratch() as directory:
        config = directory / shipped.name
        text = shipped.read_text().replace("/dev/shm/", f"{directory}/")
        text = text.replace("/run/pmblk/", f"{directory}/")
        config.write_text(text.replace(":10809", f":{free_port()}"))
        before = everything_in(directory)
        socket_there = f"control.socket={directory}/control.sock"
        done = pmblk("check", str(config), "--set", socket_there)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(f"{config}: good (")
        assert everything_in(directory) == before


@pytest.mark.parametrize(
    ("override", "shown"),
    [
        ("namespace.one.size=2MiB", "good (one, two)"),
        ("namespace.1.name=three", "good (one, three)"),
        ('namespace.one.representation={kind="page-cache", arena="1MiB"}', "good"),
        ("nbd.max_connections=8", "good"),
        ("daemon.log_level=debug", "good"),
        ("daemon.stop_seconds=1", "good"),
    ],
)
def test_an_override_takes_the_place_of_what_the_file_says(override: str, shown: str) -> None:
    with scratch() as directory:
        config = directory / "pmblk.toml"
        config.write_text(GOOD.replace("{dir}", str(directory)))
        done = pmblk("check", str(config), "--set", override)
        assert (done.returncode, done.stderr) == (0, "")
        assert shown in done.stdout


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("nbd", "--set: nbd: no value; write --set key=value"),
        ("nbd.listn=5", 'nbd.listn: unknown key; did you mean "listen"?'),
        ("namespace.three.size=1MiB", "--set: namespace.three.size: there is no namespace three"),
        ("namespace.size=1MiB", "namespace.NAME.size="),
        ("namespace.one.size=5000", "namespace[0].size: 5000 bytes are no multiple"),
        ("nbd.max_connections=many", "nbd.max_connections: expected int, got str; found 'many'"),
        ("control.socket.path=x", "--set: control.socket.path: "),
        ("=5", "--set: "),
    ],
)
def test_a_bad_override_is_one_line(override: str, words: str) -> None:
    with scratch() as directory:
        config = directory / "pmblk.toml"
        config.write_text(GOOD.replace("{dir}", str(directory)))
        before = everything_in(directory)
        assert words in refusal(str(config), "--set", override)
        assert everything_in(directory) == before


def test_check_needs_no_root_and_no_daemon() -> None:
    """It reads the config of a user who could not serve it, and says what is missing."""
    with scratch() as directory:
        config = directory / "pmblk.toml"
        config.write_text(GOOD.replace("{dir}", str(directory)))
        directory.chmod(0o755)
        nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        done = subprocess.run(
            [*nobody, PMBLK, "check", str(config)],
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
            env={**os.environ, "HOME": str(directory)},
        )
        line = complaint(done)
        assert line.startswith(f"{config}: namespace[0].path: cannot create files in {directory}")


# ---- list


def test_list_fits_80_columns_and_breaks_nothing_amid_a_word(daemon: Daemon) -> None:
    table = answer(daemon, "list", COLUMNS=str(COLUMNS))
    for line in table.splitlines():
        # What is too long by itself must stay whole: it is there to be copied.
        assert len(line) <= COLUMNS or len(line.split()) == 1, line
    words = table.split()
    for namespace in daemon.list():
        assert namespace["name"] in words
        assert namespace["durability"] in {word.rstrip(":") for word in words}
        assert namespace["fuse"]["path"] in words
        assert set(namespace["nbd"]) <= set(words)


def test_list_json_is_what_the_daemon_says(daemon: Daemon) -> None:
    listed = json.loads(answer(daemon, "list", "--json"))
    assert listed == daemon.list()
    assert [namespace["name"] for namespace in listed] == [
        "data",
        "a-namespace-with-quite-a-long-name.v2",
    ]
    assert {"size_bytes": 64 << 20, "lba_bytes": 4096, "read_only": False}.items() <= listed[
        0
    ].items()
    assert listed[0]["nbd"] == [daemon.uri("data")]


def test_the_socket_may_come_from_the_environment(daemon: Daemon) -> None:
    done = subprocess.run(
        [PMBLK, "list", "--json"],
        capture_output=True,
        timeout=SECONDS,
        check=True,
        env={**os.environ, "PMBLK_SOCKET": str(daemon.socket)},
    )
    assert json.loads(done.stdout) == daemon.list()


# ---- attach and detach


def test_attaching_twice_gives_the_same_device(daemon: Daemon) -> None:
    with attached(daemon, "data") as device:
        assert answer(daemon, "attach", "data") == f"{device}\n"
        assert json.loads(answer(daemon, "attach", "data", "--json")) == {
            "name": "data",
            "device": str(device),
        }
        assert run("blockdev", "--getsize64", str(device)).strip() == str(64 << 20)


def test_detach_says_which_device_is_gone_and_only_once(daemon: Daemon) -> None:
    def detach_as_json() -> object:
        return json.loads(answer(daemon, "detach", "data", "--json"))

    device = answer(daemon, "attach", "data").strip()
    assert detach_as_json() == {"name": "data", "devices": [device]}
    assert detach_as_json() == {"name": "data", "devices": []}
    assert answer(daemon, "detach", "data") == "data is not attached\n"


def test_a_mounted_device_is_not_detached_and_the_place_is_named(daemon: Daemon) -> None:
    directory = daemon.directory / "fs"
    with attached(daemon, "data") as device:
        make("ext4", device)
        with mounted(device, directory):
            line = complaint(ask(daemon, "detach", "data"))
            assert line == f"{device} is mounted on {directory}; run: umount {directory}"
            assert answer(daemon, "attach", "data") == f"{device}\n"


def test_without_nbd_in_the_kernel_attach_says_so(daemon: Daemon) -> None:
    """On a kernel that has it, its devices are hidden: a mount namespace with an empty sysfs."""
    hide = 'mount -t tmpfs none /sys/block && exec "$@"'
    hidden = ["unshare", "--mount", "sh", "-c", hide, "sh"]
    done = subprocess.run(
        [*hidden, *daemon.command("attach", "data", "--via", "nbd")],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    line = complaint(done)
    assert "this kernel has no nbd devices" in line
    assert "modprobe nbd" in line


def test_without_a_fuse_file_attach_says_what_to_add() -> None:
    with running(NBD_ONLY) as daemon:
        line = complaint(ask(daemon, "attach", "data", "--via", "loop"))
        assert line.startswith("data has no FUSE file to attach; add [fuse]")
        assert answer(daemon, "detach", "data") == "data is not attached\n"


@pytest.mark.parametrize("command", ["attach", "detach"])
def test_a_namespace_that_is_not_there_is_guessed(daemon: Daemon, command: str) -> None:
    assert complaint(ask(daemon, command, "dat")) == ('no namespace dat; did you mean "data"?')


# ---- no daemon, and wrong use


@pytest.mark.parametrize(
    "arguments",
    [
        *(("list",), ("reload",), ("attach", "data"), ("detach", "data"), ("stats", "data")),
        *(("switch", "data", "pfn"), ("describe", "data"), ("poison", "data", "--offset", "0")),
    ],
    ids=lambda arguments: str(arguments[0]),
)
def test_without_a_daemon_there_is_one_line_with_a_hint(arguments: tuple[str, ...]) -> None:
    with scratch() as directory:
        line = complaint(pmblk(*arguments, "--socket", f"{directory}/control.sock"))
        assert line.startswith(f"no daemon answers at {directory}/control.sock: ")
        assert "pmblk serve CONFIG" in line


def test_a_daemon_of_somebody_else_is_not_taken_for_a_missing_one(daemon: Daemon) -> None:
    daemon.directory.chmod(0o755)
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    done = subprocess.run(
        [*nobody, *daemon.command("list")],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    line = complaint(done)
    assert "Permission denied" in line
    assert "start it" not in line


def test_a_reader_that_has_enough_causes_no_traceback(daemon: Daemon) -> None:
    listing = shlex.join(daemon.command("list", "--json"))
    done = subprocess.run(
        ["bash", "-c", f"{listing} | true"], capture_output=True, timeout=SECONDS, check=False
    )
    assert done.stderr == b""


def test_an_answer_that_cannot_be_written_is_one_line(daemon: Daemon) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            daemon.command("list", "--json"),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    assert done.stderr == "pmblk: cannot write the answer: No space left on device\n"
    assert done.returncode == 1


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("frobnicate",), "no command frobnicate; known are serve, check, list"),
        (("chekc", "a.toml"), 'no command chekc; did you mean "check"?'),
        (("check",), "CONFIG requires an argument; see pmblk check --help"),
        (("check", "a.toml", "--ste", "a=b"), "--set"),
        (("list", "surplus"), "surplus"),
        (("compare",), "no config to take a namespace from; see pmblk compare --help"),
        (("compare", "a.toml", "--from", "results.json"), "--from measures nothing; leave out"),
        (("compare", "--from", "results.json", "--rounds", "5"), "--from measures nothing"),
        (("compare", "--from", "/nowhere/results.json"), "cannot read /nowhere/results.json"),
        (("attach", "data", "--via", "usb"), '"loop", "nbd"'),
        (("completion", "tcsh"), "choose bash, zsh or fish"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_wrong_use_is_one_line(arguments: tuple[str, ...], words: str) -> None:
    line = complaint(pmblk(*arguments))
    assert words in line
    assert ".;" not in line


def test_the_version_is_the_one_of_the_package() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    done = pmblk("--version")
    assert (done.returncode, done.stdout) == (0, f"{project['project']['version']}\n")


def test_help_names_every_command() -> None:
    done = pmblk("--help")
    assert (done.returncode, done.stderr) == (0, "")
    commands = "serve check reload list stats switch describe poison attach detach completion"
    for command in commands.split():
        assert command in done.stdout


def test_the_completion_for_bash_parses_and_completes_the_commands() -> None:
    with scratch() as directory:
        script = directory / "pmblk.bash"
        script.write_text(pmblk("completion", "bash").stdout)
        run("bash", "-n", str(script))
        words = 'COMP_WORDS=(pmblk ""); COMP_CWORD=1; _pmblk; echo "${COMPREPLY[@]}"'
        completed = run("bash", "-c", f"source {script}; {words}").split()
        assert {"serve", "check", "list", "attach", "detach"} <= set(completed)


def test_help_lists_the_kinds_and_no_default_that_is_nothing() -> None:
    words = pmblk("switch", "--help").stdout.split()
    assert {f"{kind}," for kind in list(KINDS)[:-1]} <= set(words)
    for command in ("switch", "compare", "poison", "list"):
        text = pmblk(command, "--help").stdout
        assert "[default: False]" not in text
        assert '""]' not in text
