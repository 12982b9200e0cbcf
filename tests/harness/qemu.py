"""A real Linux kernel on emulated hardware: Debian's, under QEMU without KVM, up in six seconds.

For what needs devices: an NVMe controller, persistent memory, a power cut. The guest sees the
host's files read-only and writes to a tmpfs overlay. What runs in it is a bash script, as root,
with PYTHONPATH set to this project, `$harness` to the folder of this file and the functions of
qemu-guest.sh. QEMU emulates the processor too (TCG), so times in a guest mean nothing.
"""

import contextlib
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tests.harness.debian_kernel import Kernel, kernel
from tests.harness.file_systems import run as run_program
from tests.harness.guests import EXPORT_PYTHON_PATH, GuestFailed

HERE = Path(__file__).parent
BUSYBOX = Path("/bin/busybox")
ROOT_MODULES = ("virtio_pci", "9pnet_virtio", "9p", "overlay")
CONSOLE_TAIL = 2000
POLL_SECONDS = 0.05

PRELUDE = f"""
{EXPORT_PYTHON_PATH}
export harness={HERE}
set -euo pipefail
. {HERE}/qemu-guest.sh
"""


# ---- devices


class Device(Protocol):
    """Something that a guest has besides its two processors and its memory."""

    def arguments(self, name: str) -> list[str]:
        """QEMU's; `name` is unique in the guest."""

    def kernel_arguments(self) -> list[str]: ...


@dataclass(frozen=True, kw_only=True)
class NvmeOverNbd:
    """An NVMe controller whose namespace is an NBD export: /dev/nvme0n1 is the first.

    QEMU 7.2 drops the FUA of its guest; with its write cache off it sends every write with FUA.
    """

    socket: Path
    export: str
    block_bytes: int = 4096
    write_cache: bool = True

    def arguments(self, name: str) -> list[str]:
        blocks = f"logical_block_size={self.block_bytes},physical_block_size={self.block_bytes}"
        cache = f"write-cache={'on' if self.write_cache else 'off'}"
        return [
            *(
                "-blockdev",
                f"driver=nbd,node-name={name},discard=unmap,export={self.export},"
                f"server.type=unix,server.path={self.socket}",
            ),
            *("-device", f"nvme,drive={name},serial={self.export},{blocks},{cache}"),
        ]

    def kernel_arguments(self) -> list[str]:
        return []


@dataclass(frozen=True, kw_only=True)
class Nvdimm:
    """A file as persistent memory: the first is /dev/pmem0. It keeps what a killed guest stored."""

    file: Path

    def arguments(self, name: str) -> list[str]:
        size = self.file.stat().st_size
        backend = f"memory-backend-file,id={name},share=on,mem-path={self.file},size={size}"
        return ["-object", backend, "-device", f"nvdimm,id=device-{name},memdev={name}"]

    def kernel_arguments(self) -> list[str]:
        return []


@dataclass(frozen=True, kw_only=True)
class MemoryAsPmem:
    """A part of the guest's memory as persistent memory (memmap=); lost with the guest.

    It lies at 1 GiB, so the guest has more than 1 GiB and `size` together.
    """

    size: str

    def arguments(self, _name: str) -> list[str]:
        return []

    def kernel_arguments(self) -> list[str]:
        return [f"memmap={self.size}!1G"]


# ---- a guest


class Guest:
    """One that was booted. `output` is what its script said so far."""

    def __init__(self, folder: Path, process: "subprocess.Popen[bytes]", *, seconds: int) -> None:
        self.folder = folder
        self._process = process
        self._seconds = seconds
        self._limit = threading.Timer(seconds, process.kill)
        self._limit.start()

    @property
    def output(self) -> str:
        return (self.folder / "output").read_text(errors="replace")

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def await_line(self, line: str) -> None:
        """Until the script has said it. Raises GuestFailed when the guest ends without."""
        while line not in self.output.splitlines():
            if not self.running:
                raise GuestFailed(f"{line!r} was never said: {self._end()}")
            time.sleep(POLL_SECONDS)

    @contextlib.contextmanager
    def paused(self, name: str) -> Iterator[None]:
        """While its script is at `pause NAME`."""
        self.await_line(name)
        yield
        (self.folder / f"resumed-{name}").touch()

    def cut_power(self) -> None:
        """No part of the guest gets to know. It is gone on return."""
        self._limit.cancel()
        self._process.kill()
        self._process.wait()

    def wait(self) -> str:
        """Its output, when the script has succeeded. Raises GuestFailed with it otherwise."""
        self._process.wait()
        status = self.folder / "status"
        if not status.exists() or status.read_text().strip() != "0":
            raise GuestFailed(self._end())
        return self.output

    def _end(self) -> str:
        """How it ended, and all that was said."""
        status = self.folder / "status"
        if status.exists():
            return f"exit status {status.read_text().strip()}:\n{self.output}"
        console = (self.folder / "console").read_text(errors="replace")[-CONSOLE_TAIL:]
        ended = f"ended without a status (QEMU: {self._process.returncode})"
        if not self._limit.is_alive():
            ended = f"was not done in {self._seconds} s"
        return f"the guest {ended}:\n{console}\n{self.output}"


def run(
    script: str, *, devices: Sequence[Device] = (), memory: str = "1536M", seconds: int = 300
) -> str:
    """Run a bash script as root in a fresh guest; its output. Raises GuestFailed with it."""
    with booted(script, devices=devices, memory=memory, seconds=seconds) as guest:
        return guest.wait()


@contextlib.contextmanager
def booted(
    script: str, *, devices: Sequence[Device] = (), memory: str = "1536M", seconds: int = 300
) -> Iterator[Guest]:
    """A guest that runs the script; killed at the end of the block, or after `seconds`.

    In the guest, /run/w is `guest.folder`.
    """
    with tempfile.TemporaryDirectory(prefix="pmblk-qemu-") as name:
        folder = Path(name)
        debian = kernel()
        (folder / "command").write_text(f"{PRELUDE}\n{script}\n")
        (folder / "modules").write_text(str(debian.modules))
        (folder / "output").touch()
        command = [
            *("setpriv", "--pdeathsig", "KILL"),  # not even a killed test leaves a guest behind
            *_machine(debian, _initial_ram_disk(folder, debian), devices, memory=memory),
            *_folders(folder),
        ]
        for number, device in enumerate(devices):
            command += device.arguments(f"d{number}")
        with (folder / "console").open("wb") as console:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                start_new_session=True,
            )
        guest = Guest(folder, process, seconds=seconds)
        try:
            yield guest
        finally:
            guest.cut_power()


# ---- QEMU's arguments


def _machine(
    debian: Kernel, initial_ram_disk: Path, devices: Sequence[Device], *, memory: str
) -> list[str]:
    words = ["console=ttyS0", "quiet", "loglevel=3", "panic=-1", "mitigations=off", "nokaslr"]
    words += ["no_timer_check", "tsc=reliable", "audit=0", "random.trust_cpu=on"]
    for device in devices:
        words += device.kernel_arguments()
    return [
        *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-no-reboot"),
        # la57=off: page tables of four levels are emulated a little faster than those of five.
        *("-accel", "tcg,thread=multi,tb-size=512", "-cpu", "max,la57=off", "-smp", "2"),
        *("-machine", "q35,nvdimm=on", "-m", f"{memory},slots=4,maxmem=32G"),
        *("-display", "none", "-serial", "stdio", "-device", "virtio-rng-pci"),
        *("-kernel", str(debian.image), "-initrd", str(initial_ram_disk)),
        *("-append", " ".join(words)),
    ]


def _folders(work: Path) -> list[str]:
    root = "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap"
    return [
        *("-fsdev", root, "-device", "virtio-9p-pci,fsdev=root,mount_tag=root"),
        *("-fsdev", f"local,id=work,path={work},security_model=none"),
        *("-device", "virtio-9p-pci,fsdev=work,mount_tag=work"),
    ]


def _initial_ram_disk(folder: Path, debian: Kernel) -> Path:
    """busybox, qemu-init.sh and the modules that mount the root."""
    tree = folder / "initial"
    (tree / "bin").mkdir(parents=True)
    (tree / "modules").mkdir()
    shutil.copy(BUSYBOX, tree / "bin")
    shutil.copy(HERE / "qemu-init.sh", tree / "init")
    (tree / "init").chmod(0o755)
    for number, module in enumerate(debian.load_order(*ROOT_MODULES)):
        shutil.copy(module, tree / "modules" / f"{number:02}-{module.name}")
    image = folder / "initial.img"
    run_program("sh", "-c", f"cd {tree} && find . | cpio -o -H newc --quiet >{image}")
    return image
