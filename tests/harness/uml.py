"""A real Linux kernel as a process: User-mode Linux on the host's file system, read-only below.

For what the host's kernel lacks (nbd, above all). Everything comes from Debian's package
user-mode-linux. The guest sees the host's files, writes to a tmpfs overlay, and ends with its
command or with its time limit, whichever comes first.
"""

import os
import shlex
import subprocess
import tempfile
from pathlib import Path

INIT = Path(__file__).with_name("uml-init.sh")


class UmlFailed(AssertionError):
    """The command failed in the guest, or the guest did not finish."""


def run(script: str, *, memory: str = "640M", seconds: int = 120) -> str:
    """Run a bash script as root in a fresh guest; its output. Raises UmlFailed with that output.

    In the guest, /run/w is a host folder of this call; guest memory is a file in /dev/shm.
    """
    with tempfile.TemporaryDirectory(prefix="pmblk-uml-") as name:
        folder = Path(name)
        (folder / "command").write_text(f"set -euo pipefail\n{script}\n")
        (folder / "output").touch()
        command = [
            *("linux.uml", f"mem={memory}", "rootfstype=hostfs", "ro", f"init={INIT}"),
            *("con=null", "con0=null,fd:1", "con1=null", "ssl=null", "quiet", "loglevel=3"),
            *("panic=-1", f"uml_dir={folder}/", "umid=guest", f"W={folder}"),
        ]
        # A pid namespace of its own: UML's helper processes outlive a SIGKILL of the kernel.
        boxed = ["unshare", "--pid", "--fork", "--kill-child=KILL", "sh", "-c"]
        try:
            done = subprocess.run(
                [*boxed, f"{shlex.join(command)}; exit $?"],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=seconds,
                env={**os.environ, "TMPDIR": "/dev/shm"},
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise UmlFailed(
                f"not done in {seconds} s:\n{(folder / 'output').read_text()}"
            ) from None
        output = (folder / "output").read_text(errors="replace")
        status = folder / "status"
        if not status.exists():
            words = (done.stdout + done.stderr).decode(errors="replace")[-2000:]
            raise UmlFailed(f"the guest ended without a status:\n{words}\n{output}")
        if status.read_text().strip() != "0":
            raise UmlFailed(f"exit status {status.read_text().strip()}:\n{output}")
        return output
