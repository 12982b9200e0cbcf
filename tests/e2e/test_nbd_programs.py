"""Real NBD programs against a real daemon: libnbd's tools, qemu's, fio, nbdkit in front of us."""

import contextlib
import filecmp
import json
import os
import random
import select
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pmblkd import mounts
from tests.harness.daemon import Daemon, running, scratch
from tests.harness.programs import assert_no_complaints, program

pytestmark = pytest.mark.e2e

SIZE = 32 << 20
MIB = 1 << 20
KINDS = {
    "extent": '"extent"',
    "cache": '{ kind = "page-cache", arena = "1MiB" }',
    "struct": '{ kind = "struct-page", compound = "2MiB" }',
    "transient": '{ kind = "transient-page", pool_pages = 256 }',
    "pfn": '"pfn"',
}
NAMES = [
    *(f"{kind}-{lba}" for kind in ("extent", "cache") for lba in (512, 4096)),
    *("struct-4096", "transient-512", "pfn-4096"),
]


def _namespace(name: str) -> str:
    kind, lba = name.split("-")
    return f"""
[[namespace]]
name = "{name}"
path = "{{dir}}/{name}.img"
size = {SIZE}
lba_size = {lba}
representation = {KINDS[kind]}
"""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def port() -> int:
    return _free_port()


@pytest.fixture(scope="module")
def daemon(port: int) -> Iterator[Daemon]:
    """Both representations with both LBA sizes, over a unix socket and TCP."""
    config = f"""
{"".join(map(_namespace, NAMES))}
[nbd]
listen = ["unix:{{dir}}/nbd.sock", "tcp:127.0.0.1:{port}"]
default = "cache-512"
"""
    with running(config) as started:
        yield started


@pytest.fixture(autouse=True)
def _no_complaints(daemon: Daemon) -> Iterator[None]:
    yield
    assert_no_complaints(daemon)


@pytest.fixture
def blank(daemon: Daemon) -> str:
    """The URI of an export that is one hole."""
    uri = daemon.uri("extent-4096")
    program("qemu-io", "-f", "raw", "-c", f"discard 0 {SIZE}", uri)
    return uri


def _sparse_file(path: Path, seed: int) -> Path:
    """`SIZE` bytes: runs of noise of odd lengths at odd places, and holes between."""
    source = random.Random(seed)
    with path.open("wb") as stream:
        stream.truncate(SIZE)
        for place in range(0, SIZE, 2 * MIB):
            stream.seek(place + source.randrange(MIB))
            stream.write(source.randbytes(source.randrange(1, MIB)))
    return path


def _info(uri: str, *options: str) -> dict[str, Any]:
    answer = json.loads(program("nbdinfo", "--json", *options, uri))
    assert answer["protocol"] == "newstyle-fixed"
    assert answer["structured"] is True
    return dict(answer)


@pytest.mark.parametrize("name", NAMES)
def test_nbdinfo_shows_the_size_the_block_sizes_and_the_flags(daemon: Daemon, name: str) -> None:
    (export,) = _info(daemon.uri(name))["exports"]
    assert export["export-name"] == name
    assert export["export-size"] == SIZE
    assert export["block_size_minimum"] == 1
    assert export["block_size_preferred"] == int(name.split("-")[1])
    assert export["block_size_maximum"] == 32 * MIB
    assert export["contexts"] == ["base:allocation"]
    assert not export["is_read_only"]
    assert not export["is_rotational"]
    for word in ("cache", "df", "fast_zero", "flush", "fua", "multi_conn", "trim", "zero"):
        assert export[f"can_{word}"] is True, word


def test_nbdinfo_lists_every_export_by_name_and_the_empty_name_is_the_default(
    daemon: Daemon,
) -> None:
    listed = _info(daemon.uri(), "--list")["exports"]
    assert [export["export-name"] for export in listed] == NAMES
    assert all(export["export-size"] == SIZE for export in listed)
    (default,) = _info(daemon.uri(""))["exports"]
    assert default["description"] == "32 MiB of persistent memory as page-cache"
    assert default["block_size_preferred"] == 512


def test_nbdinfo_maps_the_holes_of_a_sparse_namespace(blank: str) -> None:
    program("qemu-io", "-f", "raw", "-c", "write 1M 64k", "-c", "write 31M 1M", blank)
    extents = json.loads(program("nbdinfo", "--map", "--json", blank))
    assert [(e["offset"], e["length"], e["description"]) for e in extents] == [
        (0, MIB, "hole,zero"),
        (MIB, 65536, "data"),
        (MIB + 65536, 30 * MIB - 65536, "hole,zero"),
        (31 * MIB, MIB, "data"),
    ]


@pytest.mark.parametrize("name", NAMES)
def test_nbdcopy_brings_data_in_and_out_over_four_connections(daemon: Daemon, name: str) -> None:
    with scratch() as directory:
        original = _sparse_file(directory / "in", seed=1)
        options = ("--connections=4", "--requests=16", "--flush")
        program("nbdcopy", *options, str(original), daemon.uri(name))
        program("nbdcopy", *options, daemon.uri(name), str(directory / "out"))
        assert filecmp.cmp(original, directory / "out", shallow=False)


def test_nbddump_shows_what_was_written(blank: str) -> None:
    program("qemu-io", "-f", "raw", "-c", "write -P 0x5a 16 16", blank)
    dump = program("nbddump", "-n", "48", blank).splitlines()
    assert dump[0].split()[1:17] == ["00"] * 16
    assert dump[1].split()[1:17] == ["5a"] * 16
    assert "ZZZZZZZZZZZZZZZZ" in dump[1]


@pytest.mark.parametrize("name", NAMES)
def test_qemu_io_reads_back_what_it_wrote_zeroed_and_discarded(daemon: Daemon, name: str) -> None:
    commands = (
        "write -P 0x55 1M 64k",
        "read -P 0x55 1M 64k",
        "write -f -P 0xaa 2M 4k",
        "read -P 0xaa 2M 4k",
        "write -P 0x77 4M 128k",
        "write -zu 4M 64k",
        "read -P 0 4M 64k",
        "write -z 4160k 512",
        "read -P 0 4160k 512",
        "read -P 0x77 4260352 64000",
        "write -P 0x66 5M 64k",
        "discard 5M 64k",
        "flush",
        "read -P 0 5M 64k",
        "read -P 0x55 1M 64k",
        "read -P 0xaa 2M 4k",
        "writev -P 0x11 6M 512 4k 1k",
        "read -v -P 0x11 6M 32",
        "aio_write -P 0x22 7M 1M",
        "aio_read -P 0x22 7M 1M",
        "aio_flush",
    )
    words = program("qemu-io", "-f", "raw", *_each("-c", commands), daemon.uri(name))
    assert "failed" not in words, words


def _each(option: str, values: tuple[str, ...]) -> Iterator[str]:
    for value in values:
        yield option
        yield value


def test_qemu_img_converts_compares_maps_and_benches(blank: str) -> None:
    with scratch() as directory:
        original, back = _sparse_file(directory / "in", seed=2), directory / "out"
        raw = ("-f", "raw")
        program("qemu-img", "convert", "-n", *raw, "-O", "raw", str(original), blank)
        words = program("qemu-img", "compare", *raw, "-F", "raw", str(original), blank)
        assert "identical" in words
        program("qemu-img", "convert", *raw, "-O", "raw", blank, str(back))
        assert filecmp.cmp(original, back, shallow=False)
        extents = json.loads(program("qemu-img", "map", *raw, "--output=json", blank))
        assert sum(extent["length"] for extent in extents) == SIZE
        assert {extent["data"] for extent in extents} == {True, False}
        _check_map(original, extents)
    for options in (("-d", "16", "-s", "4k"), ("-d", "1", "-s", "512"), ("-d", "8", "-s", "1M")):
        count = ("-c", "20" if "1M" in options else "1000")
        words = program("qemu-img", "bench", *raw, "-w", "-t", "none", *count, *options, blank)
        assert "Run completed" in words


def _check_map(original: Path, extents: list[dict[str, Any]]) -> None:
    """What the map calls a hole is zero."""
    content = original.read_bytes()
    for extent in extents:
        if not extent["data"]:
            start, end = extent["start"], extent["start"] + extent["length"]
            assert not any(content[start:end]), extent


@pytest.mark.parametrize("name", NAMES)
def test_fio_verifies_what_it_wrote_at_random_and_unaligned(daemon: Daemon, name: str) -> None:
    words = _fio(
        daemon.uri(name),
        "--rw=randwrite",
        "--bsrange=512-64k",
        "--bs_unaligned",
        "--iodepth=32",
        f"--size={SIZE}",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--fsync=64",
    )
    assert "err= 0" in words


@pytest.mark.parametrize("name", ["extent-4096", "cache-4096"])
def test_fio_mixes_reads_writes_and_trims_from_two_clients(daemon: Daemon, name: str) -> None:
    _fill(daemon.uri(name))
    words = _fio(
        daemon.uri(name),
        "--rw=randrw",
        "--bsrange=512-256k",
        "--bs_unaligned",
        "--iodepth=16",
        "--numjobs=2",
        "--group_reporting",
        f"--size={SIZE}",
    )
    assert "err= 0" in words


def test_fio_reads_with_a_queue_deeper_than_the_arena() -> None:
    """128 reads of 64 KiB are eight times the frames of a 1 MiB arena."""
    config = _namespace("cache-4096") + '[nbd]\nlisten = ["unix:{dir}/nbd.sock"]'
    with running(config) as daemon:
        _fill(daemon.uri())
        options = ("--rw=randread", "--bs=64k", "--iodepth=128", f"--size={SIZE}", "--loops=2")
        assert "err= 0" in _fio(daemon.uri(), *options)
        assert_no_complaints(daemon)


def _fill(uri: str) -> None:
    program("nbdkit", "-U", "-", "pattern", str(SIZE), "--run", f'nbdcopy "$uri" "{uri}"')


def _fio(uri: str, *options: str) -> str:
    """fio's report; it prints a banner to standard output, hence the file."""
    with scratch() as directory:
        output = directory / "fio.out"
        run = ("--name=job", "--ioengine=nbd", f"--uri={uri}", f"--output={output}")
        program("fio", *run, "--randseed=7", "--verify_state_save=0", *options, seconds=20)
        return output.read_text()


def test_nbdfuse_makes_a_file_of_an_export(blank: str) -> None:
    with scratch() as directory:
        original = _sparse_file(directory / "in", seed=3)
        mountpoint = directory / "mnt"
        with _nbdfuse(blank, mountpoint) as disk:
            assert disk.stat().st_size == SIZE
            program("dd", f"if={original}", f"of={disk}", "bs=64k", "conv=notrunc,fsync")
            program("cmp", str(original), str(disk))
        program("nbdcopy", blank, str(directory / "out"))
        assert filecmp.cmp(original, directory / "out", shallow=False)


@contextlib.contextmanager
def _nbdfuse(uri: str, mountpoint: Path) -> Iterator[Path]:
    """nbdfuse while it runs; it has to end well by itself once it is unmounted."""
    mountpoint.mkdir()
    process = subprocess.Popen(["nbdfuse", str(mountpoint / "disk"), uri])
    try:
        _await_mount(mountpoint, seconds=10)
        yield mountpoint / "disk"
        program("fusermount3", "-u", str(mountpoint))
        assert process.wait(10) == 0
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()


def _await_mount(path: Path, *, seconds: float) -> None:
    """mountinfo wakes its pollers (POLLPRI) whenever something is mounted (proc(5))."""
    with Path("/proc/self/mountinfo").open() as mountinfo:
        poll = select.poll()
        poll.register(mountinfo, select.POLLPRI)
        end = time.monotonic() + seconds
        while mounts.find(path) is None:
            assert time.monotonic() < end, f"nothing was mounted at {path} in {seconds} s"
            poll.poll(1000 * seconds)


def test_tcp_serves_as_the_unix_socket_does(daemon: Daemon, port: int) -> None:
    uri = f"nbd://127.0.0.1:{port}/extent-512"
    (export,) = _info(uri)["exports"]
    assert (export["export-name"], export["export-size"]) == ("extent-512", SIZE)
    with scratch() as directory:
        original = _sparse_file(directory / "in", seed=4)
        program("nbdcopy", "--connections=4", "--flush", str(original), uri)
        program("nbdcopy", daemon.uri("extent-512"), str(directory / "out"))
        assert filecmp.cmp(original, directory / "out", shallow=False)
    options = ("--rw=randwrite", "--bsrange=512-64k", "--bs_unaligned", "--iodepth=32")
    verify = ("--verify=crc32c", "--verify_fatal=1", "--fsync=64", f"--size={SIZE}")
    assert "err= 0" in _fio(uri, *options, *verify)


def test_nbdkit_stands_in_front_as_a_proxy(daemon: Daemon) -> None:
    with scratch() as directory:
        original = _sparse_file(directory / "in", seed=5)
        script = f"""set -e
            nbdinfo --size "$uri"
            nbdcopy --connections=4 --flush "{original}" "$uri"
            nbdcopy --connections=4 "$uri" "{directory}/out"
            qemu-io -f raw -c 'write -zu 8M 1M' -c 'discard 9M 1M' -c flush "$uri"
            qemu-io -f raw -r -c 'read -P 0 8M 2M' "$uri"
        """
        proxy = (f"socket={daemon.directory}/nbd.sock", "export=cache-4096", "shared=false")
        words = program("nbdkit", "-U", "-", "nbd", *proxy, "--run", script)
        assert words.splitlines()[0] == str(SIZE)
        assert filecmp.cmp(original, directory / "out", shallow=False)


def test_a_read_only_namespace_is_read_by_two_daemons_and_written_by_none() -> None:
    with scratch() as directory:
        media = _sparse_file(directory / "media", seed=6)
        before, occupied = media.read_bytes(), media.stat().st_blocks
        config = f"""
[[namespace]]
name = "ro"
path = "{media}"
read_only = true
[nbd]
listen = ["unix:{{dir}}/nbd.sock"]
"""
        with running(config) as first, running(config) as second:
            for daemon in (first, second):
                (export,) = _info(daemon.uri("ro"))["exports"]
                assert export["is_read_only"]
                assert export["can_flush"]
                out = directory / f"out-{daemon.pid}"
                program("nbdcopy", "--connections=4", daemon.uri("ro"), str(out))
                assert out.read_bytes() == before
                refused = program(
                    "qemu-io", "-f", "raw", "-c", "write 0 512", daemon.uri("ro"), status=1
                )
                assert "wrote" not in refused
                assert_no_complaints(daemon)
            assert (first.stop(), second.stop()) == (0, 0)
        assert media.read_bytes() == before
        assert media.stat().st_blocks == occupied
        assert os.access(media, os.R_OK)
