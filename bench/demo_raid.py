"""The demo's second part: an array, of which a member fails while it serves.

A namespace that is RAID 6 over five files, with a spare: written and verified, then without a
member, then rebuilt on the spare, then scrubbed.
"""

import json
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.demo_step import CheckFailed, Outcome, Step
from tests.harness.command_line import pmblk
from tests.harness.daemon import Daemon

NAME = "array"
MEMBERS, MEMBER_SIZE = 5, "48MiB"
WAIT_SECONDS = 60

Verify = Callable[[Sequence[str]], Outcome]


class Array:
    """Its members lie in `directory`."""

    def __init__(self, directory: Path) -> None:
        self.members = [f"{directory}/member{number}" for number in range(MEMBERS)]
        self.spare = f"{directory}/spare"

    @property
    def config(self) -> str:
        """Its namespace, for the daemon's config."""
        members = json.dumps([*self.members, self.spare])
        return f'\n[[namespace]]\nname = "{NAME}"\n[namespace.raid]\nmembers = {members}\n'

    def make(self) -> Outcome:
        """Before the daemon starts: it serves arrays that are there."""
        options = ("--level", "6", "--size", MEMBER_SIZE, "--integrity", "--spare", self.spare)
        made = pmblk("raid", "create", NAME, *self.members, *options)
        if made.returncode:
            raise CheckFailed(made.stderr.strip())
        return Outcome(said=f"RAID 6: {MEMBERS} files, a spare")


class RaidDemo:
    """What is done with it. `verify` has fio write, and read back."""

    def __init__(self, array: Array, daemon: Daemon, verify: Verify) -> None:
        self._array = array
        self._daemon = daemon
        self._verify = verify

    def steps(self) -> Sequence[Step]:
        return (
            Step(title="RAID  write, then verify", work=lambda: self._verify(self._fio())),
            Step(title="RAID  a member fails", work=self._fail),
            Step(title="RAID  write, then verify", work=lambda: self._verify(self._fio())),
            Step(title="RAID  rebuilt on the spare", work=self._rebuilt),
            Step(title="RAID  scrub", work=self._scrub),
        )

    def _fio(self) -> Sequence[str]:
        size = size_of(self._daemon, NAME)
        return "--ioengine=nbd", f"--uri={self._daemon.uri(NAME)}", f"--size={size}"

    def _fail(self) -> Outcome:
        self._pmblk("fail", NAME, self._array.members[1])
        return Outcome(said=f"pmblk raid fail {NAME} member1")

    def _rebuilt(self) -> Outcome:
        status = self._until(lambda one: one["sweep"] is None and one["state"] == "active")
        places = {one["place"]: one["state"] for one in status["members"]}
        if places.get(self._array.spare) != "active":
            raise CheckFailed(f"the spare is {places.get(self._array.spare)}")
        return Outcome(said="it has the slot", check="active")

    def _scrub(self) -> Outcome:
        self._pmblk("scrub", NAME)
        status = self._until(lambda one: one["sweep"] is None and one["scrub"] is not None)
        findings = status["scrub"]["findings"]
        if findings:
            raise CheckFailed(f"the scrub found: {findings[:3]}")
        return Outcome(said="parity and checksums", check="all fits")

    # ---- the command

    def _pmblk(self, *arguments: str) -> str:
        command = self._daemon.command("raid", *arguments)
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=WAIT_SECONDS, check=False
        )
        if result.returncode:
            raise CheckFailed(result.stderr.strip())
        return result.stdout

    def _status(self) -> dict[str, Any]:
        return dict(json.loads(self._pmblk("status", NAME, "--json"))["status"])

    def _until(self, done: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        end = time.monotonic() + WAIT_SECONDS
        while not done(status := self._status()):
            if time.monotonic() > end:
                raise CheckFailed(f"not done in {WAIT_SECONDS} s: {status['sweep']}")
            time.sleep(0.1)
        return status


def size_of(daemon: Daemon, name: str) -> int:
    """Of a namespace, in bytes."""
    (size,) = (int(one["size_bytes"]) for one in daemon.list() if one["name"] == name)
    return size
