"""What tests of attaching and detaching share: a daemon, and the loop devices on its files."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from pmblkd import loop
from tests.harness.command_line import answer
from tests.harness.daemon import Daemon, scratch
from tests.harness.file_systems import drop_loop, guarded

MIB = 1 << 20
DATA_BYTES = 16 * MIB + 4096 * (os.getpid() % 1000)  # others test a namespace of this name too
HANG_SECONDS = 60
CONFIG = """
[[namespace]]
name = "data"
path = "{dir}/data.img"
size = SIZE
dax = "DAX"

[[namespace]]
name = "small"
path = "{dir}/small.img"
size = "8MiB"
lba_size = 512
dax = "DAX"

[[namespace]]
name = "fixed"
path = "{dir}/fixed.img"
read_only = true

[fuse]
mountpoint = "{dir}/mnt"
engine = "ENGINE"
"""


@contextlib.contextmanager
def served(engine: str = "kernel", dax: str = "auto") -> Iterator[Daemon]:
    """Whatever is attached on the way is taken away in the end."""
    with scratch() as directory:
        (directory / "fixed.img").write_bytes(bytes(range(256)) * 4096)
        text = CONFIG.replace("ENGINE", engine).replace("DAX", dax).replace("SIZE", str(DATA_BYTES))
        daemon = Daemon(directory, text.replace("{dir}", str(directory)))
        try:
            daemon.start()
            with guarded(daemon, seconds=HANG_SECONDS):
                yield daemon
        finally:
            for device in devices(daemon):
                drop_loop(device)
            if daemon.running:
                daemon.stop()


def devices(daemon: Daemon) -> list[Path]:
    """Also those whose mount was taken off the tree."""
    sizes = {"data": DATA_BYTES, "small": 8 * MIB, "fixed": MIB}
    return loop.devices_below(daemon.directory / "mnt", sizes)


def attach_it(daemon: Daemon, name: str) -> Path:
    return Path(answer(daemon, "attach", name).strip())
