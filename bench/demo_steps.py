"""What the demo does: the steps, in their order, each with what it found out.

Not here: how it is shown, what is done about signals (demo.py).
"""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.demo_raid import Array, RaidDemo, size_of
from bench.demo_step import CheckFailed, Outcome, Step
from pmblkd.compare import fio
from tests.harness import file_systems
from tests.harness.daemon import Daemon

CONFIG = Path(__file__).parents[1] / "configs/demo.toml"
NAME = "demo"  # the namespace in it
FILE_BYTES = 128 << 20  # what fio uses of the file system
FIO_EXTRA_SECONDS = 60
HANG_SECONDS = 300  # for everything, before the daemon is killed to set free who waits for it

# rw, block size, queue depth, and how a person says that
LOADS = (
    ("randwrite", "4k", 32, "4K random write, QD32"),
    ("randread", "4k", 32, "4K random read, QD32"),
    ("write", "1m", 4, "1M write, QD4"),
)
LATENCY = ("randread", "4k", 1, "4K random read, QD1")
VERIFY = (
    *("--rw=randwrite", "--bsrange=4k-64k", "--blockalign=4k", "--iodepth=16"),
    *("--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0"),
)

Load = tuple[str, str, int, str]


class Demo:
    """The daemon in `directory`, and what is made above it. `undo` unmakes what is still there."""

    def __init__(self, directory: Path, seconds: float, undo: contextlib.ExitStack) -> None:
        self._seconds = seconds
        self._directory = directory
        self._array = Array(directory)
        self._daemon = Daemon(
            directory,
            CONFIG.read_text() + self._array.config,
            overrides=[
                f"namespace.{NAME}.path={directory}/media.img",
                f'nbd.listen=["unix:{directory}/nbd.sock"]',
                f"fuse.mountpoint={directory}/mnt",
            ],
        )
        self._raid = RaidDemo(self._array, self._daemon, self._verify)
        undo.enter_context(file_systems.guarded(self._daemon, seconds=HANG_SECONDS))
        undo.callback(self._stop_if_running)
        self._attached = undo.enter_context(contextlib.ExitStack())
        self._mounted = undo.enter_context(contextlib.ExitStack())
        self._device = Path()
        self._checksums: dict[str, str] = {}

    @property
    def log(self) -> str:
        return self._daemon.log

    def steps(self) -> Sequence[Step]:
        nbd, file = self._fio_on_nbd, self._fio_on_file
        return (
            Step(title="RAID  make an array", work=self._make_array),
            Step(title="start the daemon", work=self._start, is_short=True),
            Step(title="NBD   write, then verify", work=lambda: self._verify(nbd())),
            *(self._measured("NBD ", nbd, load) for load in (LATENCY, *LOADS)),
            Step(title="FUSE  same bytes as over NBD", work=self._compare_with_nbd),
            Step(title="loop  attach", work=self._attach, is_short=True),
            Step(title="ext4  make", work=self._make),
            Step(title="ext4  mount", work=self._mount, is_short=True),
            Step(title="ext4  copy a tree", work=self._copy),
            Step(title="ext4  write, then verify", work=lambda: self._verify(file())),
            *(self._measured("ext4", file, load) for load in LOADS),
            Step(title="ext4  checksums", work=self._remember),
            Step(title="ext4  unmount", work=self._unmount, is_short=True),
            Step(title="ext4  fsck", work=self._check),
            Step(title="ext4  mount again", work=self._mount, is_short=True),
            Step(title="ext4  the same checksums", work=self._compare),
            Step(title="ext4  unmount again", work=self._unmount, is_short=True),
            Step(title="loop  detach", work=self._detach, is_short=True),
            *self._raid.steps(),
            Step(title="stop the daemon", work=self._stop, is_short=True),
        )

    # ---- the daemon

    def _start(self) -> Outcome:
        self._daemon.start()
        return Outcome(said=f"ready in {self._daemon.ready_seconds:.2f} s")

    def _stop(self) -> Outcome:
        status = self._daemon.stop()
        if status != 0:
            raise CheckFailed(f"the daemon ended with exit status {status}")
        return Outcome(said="exit status 0", check="ok")

    def _stop_if_running(self) -> None:
        if self._daemon.running:
            self._daemon.stop()

    def _compare_with_nbd(self) -> Outcome:
        """Every byte of the namespace, read through both front ends."""
        compare = 'set -o pipefail; nbdcopy -- "$0" - | cmp -- - "$1"'
        uri, file = self._daemon.uri(NAME), f"{self._directory}/mnt/{NAME}"
        file_systems.run("bash", "-c", compare, uri, file)
        return Outcome(said=f"{self._size >> 20} MiB", check="same")

    @property
    def _size(self) -> int:
        return size_of(self._daemon, NAME)

    def _make_array(self) -> Outcome:
        return self._array.make()

    # ---- fio

    def _fio_on_nbd(self) -> Sequence[str]:
        return "--ioengine=nbd", f"--uri={self._daemon.uri(NAME)}", f"--size={self._size}"

    def _fio_on_file(self) -> Sequence[str]:
        file = ("--ioengine=libaio", "--direct=1", f"--filename={self._fs}/fio.data")
        return *file, f"--size={FILE_BYTES}"

    def _measured(self, where: str, target: Callable[[], Sequence[str]], load: Load) -> Step:
        *_, name = load
        return Step(title=f"{where}  {name}", work=lambda: self._measure(target(), load))

    def _measure(self, target: Sequence[str], load: Load) -> Outcome:
        rw, block, depth, _ = load
        arguments = [f"--rw={rw}", f"--bs={block}", f"--iodepth={depth}", "--norandommap"]
        limit = ["--time_based", f"--runtime={round(self._seconds * 1000)}ms"]
        result = fio.run([*target, *arguments, *limit], seconds=self._seconds + FIO_EXTRA_SECONDS)
        return Outcome(side=result.read if "read" in rw else result.write)

    def _verify(self, target: Sequence[str]) -> Outcome:
        """Write every block once, in random order and sizes; read each back, with its checksum."""
        result = fio.run([*target, *VERIFY], seconds=FIO_EXTRA_SECONDS)
        if result.read.ios != result.write.ios:
            raise CheckFailed(f"{result.write.ios} blocks written, {result.read.ios} verified")
        return Outcome(side=result.write, check=f"{result.read.ios} blocks")

    # ---- the file system

    @property
    def _fs(self) -> Path:
        return self._directory / "fs"

    def _attach(self) -> Outcome:
        self._device = self._attached.enter_context(file_systems.attached(self._daemon, NAME))
        return Outcome(said=f"pmblk attach {NAME}: {self._device}")

    def _detach(self) -> Outcome:
        self._attached.close()
        return Outcome(said=f"pmblk detach {NAME}")

    def _make(self) -> Outcome:
        file_systems.make("ext4", self._device)
        return Outcome(said=f"mkfs.ext4 {self._device}")

    def _mount(self) -> Outcome:
        file_systems.forget_cached(self._device)
        self._mounted.enter_context(file_systems.mounted(self._device, self._fs))
        return Outcome(said=f"on {self._fs}")

    def _unmount(self) -> Outcome:
        self._mounted.close()
        return Outcome()

    def _copy(self) -> Outcome:
        file_systems.copy_tree(self._fs)
        return Outcome(said=str(file_systems.TREE))

    def _remember(self) -> Outcome:
        self._checksums = file_systems.checksums(self._fs)
        return Outcome(said=f"{len(self._checksums)} files")

    def _compare(self) -> Outcome:
        found = file_systems.checksums(self._fs)
        wrong = [name for name, digest in self._checksums.items() if found.get(name) != digest]
        if wrong or len(found) != len(self._checksums):
            raise CheckFailed(f"{len(wrong)} files differ or are missing: {wrong[:3]}")
        return Outcome(said=f"{len(found)} files", check="same")

    def _check(self) -> Outcome:
        file_systems.check("ext4", self._device)
        return Outcome(said="e2fsck -f -n", check="clean")
