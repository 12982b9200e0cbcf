"""What a run gave, and the arithmetic on several. Pure: no I/O, no clock."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

from pmblkd.compare.spread import Spread, spread


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One run of fio: `ios` in `io_seconds`, and the CPU seconds that server and fio spent.

    `client_seconds` have fio's own start in them. Shares are of one CPU.
    """

    ios: int
    io_seconds: float
    server_user_seconds: float
    server_system_seconds: float
    client_seconds: float
    others_share: float

    @property
    def server_seconds(self) -> float:
        return self.server_user_seconds + self.server_system_seconds

    @property
    def server_share(self) -> float:
        return self.server_seconds / self.io_seconds

    @property
    def client_share(self) -> float:
        return self.client_seconds / self.io_seconds

    @property
    def iops(self) -> float:
        return self.ios / self.io_seconds

    @property
    def cpu_us(self) -> float:
        """Server CPU microseconds per I/O, all threads."""
        return self.server_seconds * 1e6 / self.ios

    @property
    def cpu_user_us(self) -> float:
        return self.server_user_seconds * 1e6 / self.ios

    @property
    def cpu_system_us(self) -> float:
        return self.server_system_seconds * 1e6 / self.ios


Samples = Mapping[str, Sequence[Sample]]  # of each server, in the order of the rounds
Figure = Callable[[Sample], float]

iops: Figure = attrgetter("iops")
cpu_us: Figure = attrgetter("cpu_us")
cpu_user_us: Figure = attrgetter("cpu_user_us")
cpu_system_us: Figure = attrgetter("cpu_system_us")
server_share: Figure = attrgetter("server_share")
client_share: Figure = attrgetter("client_share")


def of_server(samples: Samples, server: str, figure: Figure) -> Spread:
    return spread([figure(sample) for sample in samples[server]])


def ratio(samples: Samples, figure: Figure, *, of: str, to: str) -> Spread:
    """One server's figure / another's, a round at a time: what the machine did cancels out."""
    pairs = zip(samples[of], samples[to], strict=True)
    return spread([_divide(figure(one), figure(other)) for one, other in pairs])


def others(results: Iterable[Samples]) -> Spread:
    """The share of one CPU that other programs had during the runs."""
    return spread(
        [
            sample.others_share
            for samples in results
            for server in samples.values()
            for sample in server
        ]
    )


def rotated(names: Sequence[str], index: int) -> list[str]:
    """Each has its turn to be first."""
    first = index % len(names)
    return [*names[first:], *names[:first]]


def _divide(one: float, other: float) -> float:
    return one / other if other else math.inf  # no tick of CPU time in a very short run
