"""The rules of the config; that the command line says them in one line is tested end to end."""

import tomllib
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import pytest

from pmblkd import config as configuration
from pmblkd import preflight
from pmblkd.config import Config, load
from pmblkd.errors import ConfigError
from pmblkd.listen import TcpAddress, UnixAddress, parse_address

CONFIGS = Path(__file__).parents[2] / "configs"
GOOD = """
[[namespace]]
name = "ns1"
path = "/dev/shm/ns1.img"
size = "1GiB"
[nbd]
listen = ["unix:/run/pmblk/nbd.sock"]
"""


def write(directory: Path, text: str) -> Path:
    file = directory / "test.toml"
    file.write_text(text)
    return file


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.toml")), ids=lambda file: file.name)
def test_every_config_that_is_shipped_loads(file: Path) -> None:
    assert load(file).namespace


def keys_of(table: Any) -> set[str]:
    return set(table.__struct_fields__)


def test_the_full_config_has_every_key() -> None:
    raw = tomllib.loads((CONFIGS / "full.toml").read_text())
    assert set(raw) == keys_of(Config)
    files, arrays = raw["namespace"][0], raw["namespace"][-1]
    assert {*files, *arrays} == keys_of(configuration.NamespaceConfig)
    assert set(arrays["raid"]) == keys_of(configuration.RaidConfig)
    for name, table in (
        ("nbd", configuration.NbdConfig),
        ("fuse", configuration.FuseConfig),
        ("control", configuration.ControlConfig),
        ("daemon", configuration.DaemonConfig),
    ):
        assert set(raw[name]) == keys_of(table), name


def test_the_full_config_shows_the_defaults() -> None:
    full = load(CONFIGS / "full.toml")
    assert full.control == configuration.ControlConfig()
    assert full.daemon == configuration.DaemonConfig()
    assert full.nbd is not None
    assert full.fuse is not None
    assert full.nbd.max_connections == configuration.NbdConfig(listen=[]).max_connections
    assert full.default_export == msgspec.structs.replace(full, nbd=None).default_export
    raid = full.namespace[-1].raid
    assert raid is not None
    assert msgspec.structs.replace(raid, array=None) == configuration.RaidConfig(
        members=raid.members
    )
    assert full.fuse.allow_other == configuration.FuseConfig(mountpoint="").allow_other


@pytest.mark.parametrize(
    ("old", "new", "key", "message"),
    [
        ("size =", "sise =", "namespace[0].sise", 'did you mean "size"'),
        ("[nbd]", "[nbs]", "nbs", 'did you mean "nbd"'),
        ('name = "ns1"', "name = 7", "namespace[0].name", "expected str, got int; found 7"),
        ('name = "ns1"', 'name = "a/b"', "namespace[0].name", "cannot be a name"),
        ('name = "ns1"', "", "namespace[0].name", "missing"),
        ('"1GiB"', '"1GB"', "namespace[0].size", "is not a size"),
        ('"1GiB"', "0", "namespace[0].size", "one block"),
        ('"1GiB"', "5000", "namespace[0].size", "4096 would be"),
        ('"1GiB"', '"1GiB"\nlba_size = 1024', "namespace[0].lba_size", "512 or 4096"),
        ('"/dev/shm/ns1.img"', '"ns1.img"', "namespace[0].path", "start it with /"),
        (
            '"1GiB"',
            '"1GiB"\nrepresentation = "extend"',
            "namespace[0].representation",
            'did you mean "extent"',
        ),
        (
            '"1GiB"',
            '"1GiB"\nrepresentation = {kind = "page-cache", area = 1}',
            "namespace[0].representation.area",
            'did you mean "arena"',
        ),
        (
            '"1GiB"',
            '"1GiB"\nrepresentation = {kind = "extent", arena = 1}',
            "namespace[0].representation.arena",
            "known are fragments",
        ),
        (
            '"1GiB"',
            '"1GiB"\nrepresentation = {kind = "page-cache", arena = "3KiB"}',
            "namespace[0].representation.arena",
            "at least 1MiB",
        ),
        (
            '"1GiB"',
            '"1GiB"\nrepresentation = {kind = "page-cache", arena = "1GB"}',
            "namespace[0].representation.arena",
            "'1GB' is not a size",
        ),
        (
            '"1GiB"',
            '"1GiB"\nrepresentation = {kind = "transient-page", pool_pages = 1}',
            "namespace[0].representation.pool_pages",
            "1 is not in 256 to",
        ),
        ('["unix:/run/pmblk/nbd.sock"]', "[]", "nbd.listen", "is empty"),
        ('["unix:/run/pmblk/nbd.sock"]', '["unix:x"]', "nbd.listen[0]", "no address"),
        ('["unix:/run/pmblk/nbd.sock"]', '["tcp:h:1", "tcp:h:1"]', "nbd.listen", "twice"),
        ("listen", 'default = "ns2"\nlisten', "nbd.default", 'did you mean "ns1"'),
        ("listen", "max_connections = 0\nlisten", "nbd.max_connections", "0 is too small"),
        ("[nbd]", '[fuse]\nmountpoint = "mnt"\n[nbd]', "fuse.mountpoint", "start it with /"),
        ('"1GiB"', '"1GiB"\ndax = "on"', "namespace[0].dax", '"auto" or "fast" or "off"'),
        ('"1GiB"', '"1GiB"\ndax = true', "namespace[0].dax", '"auto" or "fast" or "off"'),
        *(
            ("[nbd]", f'[fuse]\nmountpoint = "/mnt/x"\n{line}\n[nbd]', key, message)
            for line, key, message in [
                ('engine = "libfuse"', "fuse.engine", '"auto" or "kernel" or "pyfuse3"'),
                ("owner = 0", "fuse.owner", "found 0"),
                ('mode = "rw"', "fuse.mode", 'in octal, e.g. "0660"'),
                ('mode = "0888"', "fuse.mode", "is no file mode"),
                ('mode = "4755"', "fuse.mode", "is no file mode"),
                ('mode = "0o600"', "fuse.mode", "is no file mode"),
                ('mode = "60"', "fuse.mode", "is no file mode"),
                ('mode = "\u0661\u0662\u0663"', "fuse.mode", "is no file mode"),
                ("mode = 600", "fuse.mode", "expected str, got int"),
                ('options = "ro"', "fuse.options", "expected list, got str"),
                ('options = ["ro", "suid"]', "fuse.options[1]", "choose from noatime, noexec, ro"),
                ('options = ["ro,dev"]', "fuse.options[0]", '"ro,dev" is not known'),
                ("punch = 1", "fuse.punch", "expected bool, got int"),
                ("request_timeout_seconds = -1", "fuse.request_timeout_seconds", "0 (never) to"),
                ("request_timeout_seconds = 65536", "fuse.request_timeout_seconds", "65535"),
                ("request_timeout_seconds = 1.5", "fuse.request_timeout_seconds", "found 1.5"),
                ("requst_timeout = 1", "fuse.requst_timeout", '"request_timeout_seconds"'),
            ]
        ),
        ("[nbd]", "[daemon]\nstop_seconds = 0\n[nbd]", "daemon.stop_seconds", "0 is out of range"),
        ("[nbd]", "[daemon]\nbusy_poll_us = 5000\n[nbd]", "daemon.busy_poll_us", "0 (off) to 1000"),
        ("[nbd]", '[daemon]\nlog_level = "warn"\n[nbd]', "daemon.log_level", '"warning"'),
        ("[nbd]", '[control]\nsocket = "x"\n[nbd]', "control.socket", "absolute path"),
    ],
)
def test_what_is_wrong_is_said_with_its_key_and_a_hint(
    tmp_path: Path, old: str, new: str, key: str, message: str
) -> None:
    assert old in GOOD
    file = write(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(ConfigError) as caught:
        load(file)
    text = str(caught.value)
    assert text.startswith(f"{file}: {key}: "), text
    assert message in text


def with_fuse(*lines: str) -> str:
    return GOOD + '[fuse]\nmountpoint = "/mnt/x"\n' + "\n".join(lines)


def test_a_mountpoint_has_the_name_that_the_kernel_knows_it_by(tmp_path: Path) -> None:
    """Lists of mounts and of loop devices are compared with it, and have no links."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    text = with_fuse().replace("/mnt/x", f"{tmp_path}/link/mnt")
    fuse = load(write(tmp_path, text)).fuse
    assert fuse is not None
    assert fuse.mountpoint == f"{tmp_path}/real/mnt"


def test_a_mount_is_ours_alone_and_its_files_may_be_mapped_unless_it_says_otherwise(
    tmp_path: Path,
) -> None:
    config = load(write(tmp_path, with_fuse()))
    assert config.fuse == configuration.FuseConfig(
        mountpoint="/mnt/x",
        engine="auto",
        allow_other=False,
        owner=None,
        mode="0600",
        options=[],
        punch=False,
        request_timeout_seconds=0,
    )
    assert config.fuse.mode_bits == 0o600
    assert config.namespace[0].dax == "auto"


@pytest.mark.parametrize(
    ("mode", "bits"), [("0660", 0o660), ("444", 0o444), ("0777", 0o777), ("000", 0)]
)
def test_a_mode_is_octal(tmp_path: Path, mode: str, bits: int) -> None:
    fuse = load(write(tmp_path, with_fuse(f'mode = "{mode}"'))).fuse
    assert fuse is not None
    assert fuse.mode_bits == bits


def test_what_can_be_said_of_a_mount_is_taken(tmp_path: Path) -> None:
    lines = ['engine = "kernel"', 'options = ["ro", "noexec", "noatime"]', "punch = true"]
    fuse = load(write(tmp_path, with_fuse(*lines, "request_timeout_seconds = 65535"))).fuse
    assert fuse is not None
    assert (fuse.engine, fuse.punch, fuse.request_timeout_seconds) == ("kernel", True, 65535)
    assert fuse.options == ["ro", "noexec", "noatime"]


def test_a_mode_on_the_command_line_needs_no_quotes(tmp_path: Path) -> None:
    fuse = load(write(tmp_path, with_fuse()), ["fuse.mode=0644", "namespace.ns1.dax=off"]).fuse
    assert fuse is not None
    assert fuse.mode_bits == 0o644


def second(path: str, name: str = "ns2") -> str:
    return GOOD + f'[[namespace]]\nname = "{name}"\npath = "{path}"\nsize = "1MiB"\n'


def test_two_namespaces_on_one_file_are_refused_whatever_the_path_looks_like(
    tmp_path: Path,
) -> None:
    (tmp_path / "link").symlink_to("/dev/shm/ns1.img")
    for path in ("/dev/shm/ns1.img", "/dev/shm/../shm/ns1.img", str(tmp_path / "link")):
        file = write(tmp_path, second(path))
        with pytest.raises(ConfigError, match="already belongs to ns1"):
            preflight.check(file, load(file))


RAID = """
[[namespace]]
name = "array"
[namespace.raid]
members = ["/dev/shm/m0", "nbd://host/m1"]
"""


@pytest.mark.parametrize(
    ("line", "key", "message"),
    [
        ('path = "/m"', "namespace[1].path", "the namespace is an array; leave path out"),
        ('size = "1MiB"', "namespace[1].size", "leave size out, or [namespace.raid]"),
        ("reserve = true", "namespace[1].reserve", "the namespace is an array"),
        ('representation = "pfn"', "namespace[1].representation", "is an array"),
        ('dax = "auto"', "namespace[1].dax", "is an array"),
        ("members = []", "namespace[1].raid.members", "name each member by its path or NBD URI"),
        ('members = ["m"]', "namespace[1].raid.members[0]", "'m' is no place of a member"),
        ('members = ["/m", "/m"]', "namespace[1].raid.members[1]", "name each member once"),
        ('member = ["/m"]', "namespace[1].raid.member", 'did you mean "members"'),
        ('array = "7"', "namespace[1].raid.array", "is no UUID; pmblk raid examine shows it"),
        ("member_timeout_seconds = 0", "namespace[1].raid.member_timeout_seconds", "more than 0"),
        ('sweep_max = "1GB"', "namespace[1].raid.sweep_max", "'1GB' is not a size"),
        ('sweep_max = "1MiB"', "namespace[1].raid.sweep_max", "less than sweep_min; 0 is no limit"),
        ('members = ["/run/pmblk/nbd.sock"]', "nbd.listen[0]", "is namespace[1].raid.members[0]"),
    ],
)
def test_what_is_wrong_with_an_array_is_said_too(
    tmp_path: Path, line: str, key: str, message: str
) -> None:
    above = ("path", "size", "reserve", "representation", "dax")
    text = GOOD + RAID
    if line.startswith(above):
        text = text.replace('name = "array"', f'name = "array"\n{line}')
    elif line.startswith("member "):
        text += line
    elif line.startswith("members"):
        text = text.replace('members = ["/dev/shm/m0", "nbd://host/m1"]', line)
    else:
        text += line
    file = write(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        load(file)
    assert str(error.value).startswith(f"{file}: {key}: ")
    assert message in str(error.value)


def test_an_array_has_members_and_what_it_may_take(tmp_path: Path) -> None:
    more = 'array = "{00000000000000000000000000000007}"\nsweep_max = "1GiB"\n'
    array = load(write(tmp_path, GOOD + RAID + more)).namespace[1]
    assert array.raid is not None
    assert array.places == ["/dev/shm/m0", "nbd://host/m1"]
    assert array.raid.uuid == UUID(int=7)
    assert (array.raid.sweep_max_bytes, array.raid.sweep_min_bytes) == (1 << 30, 10 << 20)
    assert array.served_bytes() == 0
    overridden = load(
        write(tmp_path, GOOD + RAID), ["namespace.array.raid.degraded=true"]
    ).namespace[1]
    assert overridden.raid is not None
    assert overridden.raid.degraded


def test_a_namespace_needs_a_path_or_members(tmp_path: Path) -> None:
    file = write(tmp_path, GOOD.replace('path = "/dev/shm/ns1.img"', ""))
    with pytest.raises(
        ConfigError, match=r"\[0\]\.path: missing; .* or a \[namespace\.raid\] table"
    ):
        load(file)


@pytest.mark.parametrize(
    ("members", "key", "message"),
    [
        (["{dir}/ns1.img"], "namespace[1].raid.members[0]", "already belongs to ns1"),
        (["{dir}/a", "{dir}/link"], "namespace[2].raid.members[0]", "already belongs to array"),
        (["nbd://host/x"], "namespace[2].raid.members[1]", "nbd://host/x already belongs to array"),
    ],
)
def test_no_two_namespaces_share_a_member(
    tmp_path: Path, members: list[str], key: str, message: str
) -> None:
    (tmp_path / "a").write_bytes(bytes(4096))
    (tmp_path / "link").symlink_to(tmp_path / "a")
    listed = ", ".join(f'"{member.format(dir=tmp_path)}"' for member in members)
    text = GOOD.replace("/dev/shm", str(tmp_path)) + RAID.replace(
        '"/dev/shm/m0", "nbd://host/m1"', listed
    )
    text += RAID.replace('"array"', '"other"').replace(
        '"/dev/shm/m0", "nbd://host/m1"', f'"{tmp_path}/a", "nbd://host/x"'
    )
    file = write(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        preflight.check(file, load(file))
    assert f"{key}: " in str(error.value)
    assert message in str(error.value)


def test_names_are_unique(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='a second "ns1"'):
        load(write(tmp_path, second("/dev/shm/other.img", name="ns1")))


def test_a_config_that_exports_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing is exported"):
        load(write(tmp_path, GOOD.split("[nbd]")[0]))


@pytest.mark.parametrize("text", ["namespace = [", "\xff", "namespace = []"])
def test_what_is_no_config_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=str(file)):
        load(file)


def test_overrides_reach_into_tables_and_namespaces(tmp_path: Path) -> None:
    config = load(
        write(tmp_path, GOOD),
        [
            "nbd.max_connections=3",
            "namespace.ns1.size=2GiB",
            "namespace.0.read_only=true",
            'nbd.listen=["tcp:127.0.0.1:1"]',
            "fuse.mountpoint=/mnt/x",
        ],
    )
    assert config.nbd is not None
    assert config.fuse is not None
    assert config.nbd.max_connections == 3
    assert config.nbd.listen == ["tcp:127.0.0.1:1"]
    assert (config.namespace[0].size, config.namespace[0].read_only) == ("2GiB", True)
    assert config.fuse.mountpoint == "/mnt/x"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("nbd.max_connections", "no value"),
        ("namespace.ns9.size=1", "no namespace ns9"),
        ("namespace=3", "expected"),
        ("nbd.listen.x=3", "no namespace|is no key"),
        ("nbd.maxconnections=3", "max_connections"),
        ("namespace.ns1.name.x=3", "is no key"),
        ("daemon.stop_seconds=nan", "out of range"),
        ("namespace.ns1.size=9999999PiB", "too large"),
        ('namespace.ns1.path="/dev/shm/a\\u0000"', "not an absolute path"),
        ('nbd.listen=["unix:/a\\u0000"]', "no address"),
    ],
)
def test_overrides_that_cannot_be_are_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(write(tmp_path, GOOD), [override])


def test_addresses_are_read_and_written() -> None:
    for text, address in {
        "unix:/a/b": UnixAddress(Path("/a/b")),
        "tcp:127.0.0.1:10809": TcpAddress("127.0.0.1", 10809),
        "tcp:[::1]:1": TcpAddress("::1", 1),
    }.items():
        assert parse_address(text) == address
        assert str(address) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "unix:rel",
        "tcp:host",
        "tcp::1",
        "tcp:h:99999",
        "tcp:h:0",
        "udp:h:1",
        "unix:/" + "x" * 120,
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"address|at most"):
        parse_address(text)
