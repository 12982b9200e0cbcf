"""A real Linux kernel as a process: User-mode Linux on the host's file system, read-only below.

For what the host's kernel lacks (nbd, above all) and for what cannot be done to it (a power cut).
Everything comes from Debian's package user-mode-linux. The guest sees the host's files, writes to
a tmpfs overlay, and ends with its command, with its time limit, or when somebody cuts its power.
"""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from tests.harness.guests import EXPORT_PYTHON_PATH, ROOT, GuestFailed

INIT = Path(__file__).with_name("uml-init.sh")
FAST = Path("/dev/shm")  # UML's memory is a file; so is what a guest writes line by line


class Guest:
    """One boot: a bash script as root. Use it with `with`: what still runs then loses its power.

    `folder` is /run/w in the guest and stays when it ends, so a later boot finds what this one
    left there. `disks` are files, /dev/ubda and so on in the guest. Raises GuestFailed.
    """

    def __init__(
        self, script: str, folder: Path, *, memory: str = "640M", disks: Sequence[Path] = ()
    ) -> None:
        self.folder = folder
        self._memory = memory
        self._disks = disks
        for name in ("status", "output", "console"):
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / "guest", ignore_errors=True)  # the last boot's pid: no obstacle
        (folder / "command").write_text(f"set -euo pipefail\n{_ENVIRONMENT}\n{script}\n")

    def __enter__(self) -> "Guest":
        # Open in every process of the guest: at its end of file all of them are gone.
        self._gone, alive = os.pipe()
        # A pid namespace of its own: UML's helper processes outlive a SIGKILL of the kernel.
        boxed = ["unshare", "--pid", "--fork", "--kill-child=KILL", "sh", "-c"]
        try:
            with (self.folder / "console").open("wb") as console:
                self._process = subprocess.Popen(
                    [*boxed, f"{shlex.join(self._kernel())}; exit $?"],
                    stdin=subprocess.DEVNULL,
                    stdout=console,
                    stderr=console,
                    env={**os.environ, "TMPDIR": str(FAST)},
                    pass_fds=(alive,),
                )
        finally:
            os.close(alive)
        return self

    def _kernel(self) -> list[str]:
        return [
            *("linux.uml", f"mem={self._memory}", "rootfstype=hostfs", "ro", f"init={INIT}"),
            *("con=null", "con0=null,fd:1", "con1=null", "ssl=null", "quiet", "loglevel=3"),
            *("panic=-1", f"uml_dir={self.folder}/", "umid=guest", f"W={self.folder}"),
            *(f"ubd{number}={disk}" for number, disk in enumerate(self._disks)),
        ]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cut_power()
        os.close(self._gone)

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    @property
    def output(self) -> str:
        return _text(self.folder / "output")

    def cut_power(self) -> None:
        """Its memory is lost, page cache and all; what its disks were given is not."""
        self._process.kill()
        self._process.wait()
        os.read(self._gone, 1)

    def wait(self, seconds: float) -> str:
        """Until its script has succeeded; the output. Raises GuestFailed with that output."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.cut_power()
            raise GuestFailed(f"not done in {seconds:g} s:\n{self.output}") from None
        status = _text(self.folder / "status").strip()
        if not status:
            words = _text(self.folder / "console")[-2000:]
            raise GuestFailed(f"the guest ended without a status:\n{words}\n{self.output}")
        if status != "0":
            raise GuestFailed(f"exit status {status}:\n{self.output}")
        return self.output


_ENVIRONMENT = f"""\
cd {shlex.quote(str(ROOT))}
{EXPORT_PYTHON_PATH}
python={shlex.quote(sys.executable)}
"""


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""
