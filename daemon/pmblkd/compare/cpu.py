"""Whose CPU time it was during a run: the server's, its client's, everybody's.

Not here: what the kernel does on behalf of others in threads of its own, which is nobody's. Source:
proc(5), `stat` and `task/TID/children`. The benchmarks use it too.
"""

import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, kw_only=True)
class Clock:
    """CPU seconds so far: of the server, of our ended children (fio), of the whole machine.

    `machine` leaves niced work out: such as keeps CPUs awake for a benchmark.
    """

    wall: float
    server: float
    client: float
    machine: float

    def since(self, earlier: "Clock") -> "Clock":
        return Clock(
            wall=self.wall - earlier.wall,
            server=self.server - earlier.server,
            client=self.client - earlier.client,
            machine=self.machine - earlier.machine,
        )

    @property
    def others_share(self) -> float:
        """What neither server nor client used, of one CPU. Ticks are coarse: never below 0."""
        return max(0.0, self.machine - self.server - self.client) / self.wall


def clock(server_pid: int) -> Clock:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Clock(
        wall=time.monotonic(),
        server=_process_seconds(server_pid),
        client=children.ru_utime + children.ru_stime,
        machine=_machine_seconds(),
    )


def _process_seconds(pid: int) -> float:
    """User and system time of the process and its children, all threads, the ended ones too."""
    while True:
        own, ended = _ticks(pid)
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        running = sum(_ticks_or_none(int(child)) for child in children)
        if _ticks(pid)[1] == ended:  # else a child has ended meanwhile, and is in both or neither
            return (own + ended + running) / TICKS


def _ticks(pid: int) -> tuple[int, int]:
    """Its own, and those of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    user, system, ended_user, ended_system = map(int, fields[11:15])
    return user + system, ended_user + ended_system


def _ticks_or_none(pid: int) -> int:
    try:
        return sum(_ticks(pid))
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _machine_seconds() -> float:
    """All but idle, waiting and niced time; with what the hypervisor took away."""
    line = Path("/proc/stat").read_text().splitlines()[0]
    user, _nice, system, _idle, _iowait, irq, softirq, steal, *_ = map(int, line.split()[1:])
    return (user + system + irq + softirq + steal) / TICKS
