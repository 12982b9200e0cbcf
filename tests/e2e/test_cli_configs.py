"""Bad configs: each is refused in one line, and nothing is made or changed.

The line names the file, the key and what would help, and it is the same for `check` and `serve`.
"""

import contextlib
import socket
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.harness.command_line import complaint, pmblk
from tests.harness.daemon import scratch
from tests.harness.file_systems import run

pytestmark = pytest.mark.e2e

MIB = 1 << 20
GOOD = """
[[namespace]]
name = "one"
path = "{dir}/one.img"
size = "1MiB"

[[namespace]]
name = "two"
path = "{dir}/two.img"
size = "1MiB"

[nbd]
listen = ["unix:{dir}/nbd.sock"]

[fuse]
mountpoint = "{dir}/mnt"

[control]
socket = "{dir}/control.sock"
"""


def refusal(*arguments: str, at_once: bool = True) -> str:
    """What `check` and `serve` say, which is the same. Not at once where both look at media."""
    with ThreadPoolExecutor(2 if at_once else 1) as pool:
        lines = pool.map(lambda name: complaint(pmblk(name, *arguments)), ("check", "serve"))
        said_by_check, said_by_serve = lines
    assert said_by_serve == said_by_check
    return said_by_check


def everything_in(directory: Path) -> set[tuple[str, int, int, int]]:
    """As any change would show on it: names, modes, sizes, times."""
    found = set()
    for path in (directory, *directory.rglob("*")):
        status = path.lstat()
        found.add((str(path), status.st_mode, status.st_size, status.st_ctime_ns))
    return found


# ---- a world in which a good config is bad


Prepare = Callable[[Path], "contextlib.AbstractContextManager[None] | None"]


def media(directory: Path, size: int = MIB) -> Path:
    path = directory / "one.img"
    path.write_bytes(bytes(size))
    return path


def link_symbolically(directory: Path) -> None:
    (directory / "two.img").symlink_to(media(directory))


def link_hard(directory: Path) -> None:
    (directory / "two.img").hardlink_to(media(directory))


def make_empty_media(directory: Path) -> None:
    media(directory, 0)


def make_longer_media(directory: Path) -> None:
    media(directory, 2 * MIB)


def make_a_directory_of_the_media(directory: Path) -> None:
    (directory / "one.img").mkdir()


def make_a_file_of_the_socket(directory: Path) -> None:
    (directory / "nbd.sock").touch()


def make_the_mountpoint_full(directory: Path) -> None:
    (directory / "mnt").mkdir()
    (directory / "mnt" / "precious").touch()


@contextlib.contextmanager
def serve_the_socket(directory: Path) -> Iterator[None]:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(directory / "nbd.sock"))
        server.listen()
        yield


@contextlib.contextmanager
def serve_the_port(directory: Path) -> Iterator[None]:
    """The port is chosen here, so it is put into the config here."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        config = directory / "pmblk.toml"
        address = f"tcp:127.0.0.1:{server.getsockname()[1]}"
        config.write_text(config.read_text().replace(f"unix:{directory}/nbd.sock", address))
        yield


@contextlib.contextmanager
def mount_there(directory: Path) -> Iterator[None]:
    (directory / "mnt").mkdir()
    run("mount", "-t", "tmpfs", "pmblk-test", str(directory / "mnt"))
    try:
        yield
    finally:
        run("umount", str(directory / "mnt"))


@contextlib.contextmanager
def own_the_media(directory: Path) -> Iterator[None]:
    with subprocess.Popen(
        ["flock", str(media(directory)), "sh", "-c", "echo locked; read line"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as owner:
        assert owner.stdin is not None
        assert owner.stdout is not None
        owner.stdout.readline()
        yield
        owner.stdin.close()  # and the shell's read ends


# ---- the matrix


@dataclass(frozen=True)
class Bad:
    """The good config with `old` made `new`, in a world that `prepare` made.

    `key` is what the line blames, and `words` are in it, too.
    """

    key: str
    words: str
    old: str = ""
    new: str = ""
    prepare: Prepare | None = None


SIZE, PATH, NAME = 'size = "1MiB"', 'path = "{dir}/one.img"', 'name = "one"'
LISTEN, MOUNT = 'listen = ["unix:{dir}/nbd.sock"]', 'mountpoint = "{dir}/mnt"'
CONTROL = 'socket = "{dir}/control.sock"'


def size(value: str, words: str) -> Bad:
    return Bad("namespace[0].size", words, SIZE, f"size = {value}")


def name(value: str, words: str = "letters, digits, dot, dash") -> Bad:
    return Bad("namespace[0].name", words, NAME, f'name = "{value}"')


def path(value: str, words: str) -> Bad:
    return Bad("namespace[0].path", words, PATH, f'path = "{value}"')


def below_one(line: str, key: str, words: str) -> Bad:
    return Bad(f"namespace[0].{key}", words, SIZE, f"{SIZE}\n{line}")


def listen(value: str, words: str, key: str = "nbd.listen[0]") -> Bad:
    return Bad(key, words, LISTEN, f"listen = {value}")


def after_nbd(line: str, key: str, words: str) -> Bad:
    return Bad(key, words, LISTEN, f"{LISTEN}\n{line}")


def at_the_end(lines: str, key: str, words: str) -> Bad:
    return Bad(key, words, CONTROL, f"{CONTROL}\n{lines}")


def world(key: str, words: str, prepare: Prepare) -> Bad:
    return Bad(key, words, prepare=prepare)


ARENA = 'representation = { kind = "page-cache", %s }'
BAD: dict[str, Bad] = {
    # keys and types
    "an unknown key of a namespace": below_one("siz = 5", "siz", 'did you mean "size"?'),
    "an unknown key of a table": after_nbd("listn = 5", "nbd.listn", 'did you mean "listen"?'),
    "an unknown table": at_the_end("[fus]\na = 5", "fus", 'did you mean "fuse"?'),
    "a missing key": Bad("namespace[0].path", "add path = ...", PATH),
    "a name that is a number": Bad("namespace[0].name", "found 5", NAME, "name = 5"),
    "a size that is a truth": size("true", "found True"),
    "a read_only that is a word": below_one('read_only = "no"', "read_only", "found 'no'"),
    "an lba_size that is a fraction": below_one("lba_size = 0.5", "lba_size", "found 0.5"),
    "a listen that is no list": listen('"unix:{dir}/s"', "expected list", "nbd.listen"),
    "a namespace that is a table": Bad(
        "namespace", "expected list", GOOD[: GOOD.index("[nbd]")], '[namespace]\nname = "one"\n'
    ),
    # names, sizes, representations
    "no namespace": Bad(
        "namespace", "add a [[namespace]]", GOOD[: GOOD.index("[nbd]")], "namespace = []\n"
    ),
    "a name with a slash": name("a/b"),
    "a name that hides": name(".one"),
    "an empty name": name(""),
    "a long name": name("n" * 65),
    "the same name twice": Bad(
        "namespace[1].name", "names are unique", 'name = "two"', 'name = "one"'
    ),
    "a size of no blocks": size("0", "one block"),
    "a negative size": size("-4096", "is not a size"),
    "a size of a block and a bit": size("5000", "4096 would be"),
    "a decimal unit": size('"1MB"', 'or KiB, MiB, GiB, TiB ("64MiB")'),
    "a size that no file can have": size('"99999PiB"', "too large"),
    "an lba_size of 1000": below_one("lba_size = 1000", "lba_size", "choose 512 or 4096"),
    "an unknown representation": below_one(
        'representation = "extnt"', "representation", 'did you mean "extent"?'
    ),
    "a representation without a kind": below_one(
        'representation = { arena = "1MiB" }', "representation", "known are page-cache, struct-page"
    ),
    "an unknown option": below_one(
        ARENA % 'arna = "1MiB"', "representation.arna", 'did you mean "arena"?'
    ),
    "an option of another kind": below_one(
        'representation = { kind = "extent", arena = "1MiB" }',
        "representation.arena",
        "known are fragments",
    ),
    "an arena that is too small": below_one(
        ARENA % 'arena = "4KiB"', "representation.arena", "1MiB"
    ),
    "an arena that is a truth": below_one(
        ARENA % "arena = true", "representation.arena", "got bool; found True"
    ),
    "a word that an option does not know": below_one(
        'representation = { kind = "struct-page", memmap = "drm" }',
        "representation.memmap",
        """'drm' is not known; choose "dram" or "device\"""",
    ),
    # paths and addresses
    "a relative path": path("one.img", "start it with /"),
    "a path with a NUL": path("{dir}/o\\u0000ne", ""),
    "a missing directory": path("{dir}/none/one.img", "make it, or mend the path"),
    "the same path twice": Bad("namespace[1].path", "of its own", PATH, 'path = "{dir}/two.img"'),
    "the same path in other words": Bad(
        "namespace[1].path", "of its own", PATH, 'path = "{dir}/../{base}/two.img"'
    ),
    "a media in the socket's place": Bad(
        "nbd.listen[0]", "namespace[0].path", PATH, 'path = "{dir}/nbd.sock"'
    ),
    "a media in the mountpoint's place": Bad(
        "fuse.mountpoint", "namespace[0].path", PATH, 'path = "{dir}/mnt"'
    ),
    "one socket for two": Bad(
        "control.socket", "nbd.listen[0]", LISTEN, 'listen = ["unix:{dir}/control.sock"]'
    ),
    "no size and no file": Bad("namespace[0].size", 'give a size ("1GiB")', SIZE),
    "read-only and no file": below_one("read_only = true", "path", "leave read_only out"),
    "an address without a scheme": listen('["localhost:10809"]', 'write "unix:/PATH"'),
    "a port that is none": listen('["tcp:127.0.0.1:99999"]', '"tcp:HOST:PORT"'),
    "an address of elsewhere": listen('["tcp:192.0.2.1:1"]', "an address of this machine"),
    "a socket's path that is too long": listen(f'["unix:/{"p" * 107}"]', "at most 107 bytes"),
    "a socket's path with a NUL": listen('["unix:{dir}/a\\u0000b"]', ""),
    "a host with a NUL": listen('["tcp:a\\u0000b:5"]', ""),
    "a missing directory of a socket": listen('["unix:{dir}/none/s"]', "or name another path"),
    "no address": listen("[]", "unix:/run/pmblk/nbd.sock", "nbd.listen"),
    "the same address twice": listen('["unix:{dir}/s", "unix:{dir}/s"]', "twice", "nbd.listen"),
    "an unknown default": after_nbd('default = "tow"', "nbd.default", 'did you mean "two"?'),
    "no connections": after_nbd("max_connections = 0", "nbd.max_connections", "64 is the default"),
    "a relative mountpoint": Bad("fuse.mountpoint", "start it with /", MOUNT, 'mountpoint = "mnt"'),
    "a mountpoint with a NUL": Bad("fuse.mountpoint", "", MOUNT, 'mountpoint = "/a\\u0000b"'),
    "a relative control socket": Bad(
        "control.socket", "an absolute path", CONTROL, 'socket = "control.sock"'
    ),
    "a stop that never waits": at_the_end(
        "[daemon]\nstop_seconds = 0", "daemon.stop_seconds", "more than 0"
    ),
    "a stop that is not a number": at_the_end(
        "[daemon]\nstop_seconds = nan", "daemon.stop_seconds", "more than 0"
    ),
    "an unknown log level": at_the_end(
        '[daemon]\nlog_level = "inf"', "daemon.log_level", 'did you mean "info"?'
    ),
    "a poll that never ends": at_the_end(
        "[daemon]\nbusy_poll_us = 5000", "daemon.busy_poll_us", "0 (off) to 1000"
    ),
    # the world
    "two paths to one file": world("namespace[1].path", "of its own", link_symbolically),
    "two names of one file": world("namespace[1].path", "of its own", link_hard),
    "an empty media": world("namespace[0].path", "remove it", make_empty_media),
    "a media of another size": world("namespace[0].path", "leave the size out", make_longer_media),
    "a media that is a directory": world(
        "namespace[0].path", "one.img", make_a_directory_of_the_media
    ),
    "a media that is served": world("namespace[0].path", "in use by process", own_the_media),
    "a socket that is served": world("nbd.listen[0]", "stop that one", serve_the_socket),
    "a socket that is a file": world("nbd.listen[0]", "remove it", make_a_file_of_the_socket),
    "a port that is served": world("nbd.listen[0]", "another server has it", serve_the_port),
    "a mountpoint in use": world("fuse.mountpoint", "stop its owner", mount_there),
    "a mountpoint with files": world(
        "fuse.mountpoint", "an empty directory", make_the_mountpoint_full
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_config_is_one_line_and_nothing_is_made(what: str) -> None:
    bad = BAD[what]
    with scratch() as directory, contextlib.ExitStack() as world:
        config = directory / "pmblk.toml"
        assert bad.old in GOOD
        text = GOOD.replace(bad.old, bad.new, 1) if bad.old else GOOD
        text = text.replace("{dir}", str(directory)).replace("{base}", directory.name)
        config.write_text(text)
        if bad.prepare is not None and (prepared := bad.prepare(directory)) is not None:
            world.enter_context(prepared)
        before = everything_in(directory)
        line = refusal(str(config), at_once=bad.prepare is None)
        assert line.startswith(f"{config}: {bad.key}: ")
        assert bad.words in line
        assert everything_in(directory) == before


@pytest.mark.parametrize(
    ("text", "words"),
    [(b"[nbd", "not TOML"), (b"a = '\xff'", "not TOML"), (None, "No such file")],
    ids=["half a table", "not UTF-8", "no file"],
)
def test_a_file_that_is_no_config_is_one_line(text: bytes | None, words: str) -> None:
    with scratch() as directory:
        config = directory / "pmblk.toml"
        if text is not None:
            config.write_bytes(text)
        line = refusal(str(config))
        assert line.startswith(f"{config}: ")
        assert words in line
