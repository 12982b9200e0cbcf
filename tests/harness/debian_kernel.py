"""Debian's newest kernel 6.1, as it is shipped: downloaded with apt, unpacked, never installed.

It is kept in `.cache/kernel` of the project, 400 MiB, until `make clean`. The real-time and cloud
flavours are left out: this is the one that machines run.
"""

import fcntl
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.harness.file_systems import ProgramError, run
from tests.harness.guests import ROOT

CACHE = ROOT / ".cache"
NAMES = r"^linux-image-6\.1\.0-[0-9]+-amd64$"
DOWNLOAD_SECONDS = 300
UNPACK_SECONDS = 120


@dataclass(frozen=True)
class Kernel:
    """An unpacked package: `root` has boot/vmlinuz-VERSION and lib/modules/VERSION."""

    root: Path
    version: str

    @property
    def image(self) -> Path:
        return self.root / f"boot/vmlinuz-{self.version}"

    @property
    def modules(self) -> Path:
        return self.root / f"lib/modules/{self.version}"

    def load_order(self, *names: str) -> list[Path]:
        """The files of these modules and of all that they need, each once, in order."""
        files: dict[Path, None] = {}
        for name in names:
            words = ("-d", str(self.root), "-S", self.version, "--show-depends", name)
            for line in run("modprobe", *words).splitlines():
                verb, _, rest = line.partition(" ")
                if verb == "insmod":  # what is built in needs no file
                    files[Path(rest.strip())] = None
        return list(files)


def kernel() -> Kernel:
    """It, after a download if this is the first time. Raises ProgramError when apt has none."""
    CACHE.mkdir(exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test runs at once download one kernel
        home = CACHE / "kernel"
        if not home.exists():
            _fetch(home)
    (image,) = (home / "boot").glob("vmlinuz-*")
    return Kernel(home, image.name.removeprefix("vmlinuz-"))


def _fetch(home: Path) -> None:
    """Whole or not at all: it gets its name when it is complete."""
    with tempfile.TemporaryDirectory(prefix="unpacking-", dir=CACHE) as name:
        folder = Path(name)
        folder.chmod(0o755)  # apt downloads as a user of its own
        _download(folder)
        (package,) = folder.glob("*.deb")
        root = folder / "root"
        run("dpkg-deb", "-x", str(package), str(root), seconds=UNPACK_SECONDS)
        shutil.rmtree(root / "usr")
        (modules,) = (root / "lib/modules").iterdir()
        run("depmod", "-b", str(root), modules.name, seconds=UNPACK_SECONDS)
        root.rename(home)


def _download(folder: Path) -> None:
    """Into the folder. The lists of apt may be missing, or older than the archive: then anew."""
    try:
        _download_newest(folder)
    except ProgramError:
        run("apt-get", "-q", "update", seconds=DOWNLOAD_SECONDS)
        _download_newest(folder)


def _download_newest(folder: Path) -> None:
    found = [
        line.partition(" ")[0]
        for line in run("apt-cache", "search", "--names-only", NAMES).splitlines()
    ]
    if not found:
        raise ProgramError(f"apt knows no package {NAMES}: is this Debian 12?")
    newest = max(found, key=lambda name: int(re.findall(r"-(\d+)-amd64$", name)[0]))
    run("sh", "-c", f"cd {folder} && apt-get -q download {newest}", seconds=DOWNLOAD_SECONDS)
