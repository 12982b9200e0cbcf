"""Whose CPU time it was during a run: the server's, its client's, everybody's.

Not here: what the kernel does on behalf of others in threads of its own, which is nobody's. Source:
proc(5), `stat` and `task/TID/children`. The benchmarks use it too.
"""

import os
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, kw_only=True)
class Clock:
    """CPU seconds so far: of the server, of our ended children (fio), of the whole machine.

    `machine` leaves niced work out: such as keeps CPUs awake for a benchmark.
    """

    wall: float
    server_user: float
    server_system: float
    client: float
    machine: float

    @property
    def server(self) -> float:
        return self.server_user + self.server_system

    def since(self, earlier: "Clock") -> "Clock":
        return Clock(
            wall=self.wall - earlier.wall,
            server_user=self.server_user - earlier.server_user,
            server_system=self.server_system - earlier.server_system,
            client=self.client - earlier.client,
            machine=self.machine - earlier.machine,
        )

    @property
    def others_share(self) -> float:
        """What neither server nor client used, of one CPU. Ticks are coarse: never below 0."""
        return max(0.0, self.machine - self.server - self.client) / self.wall


def clock(*server_pids: int) -> Clock:
    """Of a server that is all of these processes, with their children."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    parts = [_process_ticks(pid) for pid in server_pids]
    return Clock(
        wall=time.monotonic(),
        server_user=sum(user for user, _ in parts) / TICKS,
        server_system=sum(system for _, system in parts) / TICKS,
        client=children.ru_utime + children.ru_stime,
        machine=_machine_seconds(),
    )


Ticks = tuple[int, int]  # in user mode, in the kernel


def _process_ticks(pid: int) -> Ticks:
    """Of the process and its children, all threads, the ended ones too."""
    while True:
        own, ended = _ticks(pid)
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        running = [_ticks_or_none(int(child)) for child in children]
        if _ticks(pid)[1] == ended:  # else a child has ended meanwhile, and is in both or neither
            return _sum([own, ended, *running])


def _ticks(pid: int) -> tuple[Ticks, Ticks]:
    """Its own, and those of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    user, system, ended_user, ended_system = map(int, fields[11:15])
    return (user, system), (ended_user, ended_system)


def _ticks_or_none(pid: int) -> Ticks:
    try:
        return _sum(_ticks(pid))
    except (FileNotFoundError, ProcessLookupError):
        return 0, 0


def _sum(parts: Sequence[Ticks]) -> Ticks:
    return sum(user for user, _ in parts), sum(system for _, system in parts)


def _machine_seconds() -> float:
    """All but idle, waiting and niced time; with what the hypervisor took away."""
    line = Path("/proc/stat").read_text().splitlines()[0]
    user, _nice, system, _idle, _iowait, irq, softirq, steal, *_ = map(int, line.split()[1:])
    return (user + system + irq + softirq + steal) / TICKS
