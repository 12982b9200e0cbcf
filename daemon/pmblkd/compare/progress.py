"""How far the comparison is: a bar on a terminal, a line for each step in a log."""

import contextlib
import sys
import time
from collections.abc import Iterator
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress


class Progress:
    """Steps of known cost; the time left is theirs, at the pace of those that are done."""

    def __init__(self, *, steps: int, expected_seconds: float) -> None:
        self._steps, self._done = steps, 0
        self._expected_seconds, self._done_seconds = expected_seconds, 0.0
        self._begun = time.monotonic()
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
            console=Console(highlight=False, markup=False),
            disable=not sys.stdout.isatty(),
            expand=True,
            refresh_per_second=2,  # what is measured shares the CPUs with it
        )
        self._task = self._bar.add_task("", total=steps, left="")

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    @contextlib.contextmanager
    def step(self, what: str, *, expected_seconds: float) -> Iterator["Step"]:
        """One step of the work; what it says of itself is shown when it is done."""
        self._bar.update(self._task, description=what, left=self._left())
        step = Step()
        yield step
        self._done += 1
        self._done_seconds += expected_seconds
        self._bar.update(self._task, completed=self._done, left=self._left())
        if self._bar.disable:
            print(f"[{self._done}/{self._steps}] {what}: {step.said}, {self._left()}", flush=True)

    def _left(self) -> str:
        left = max(0.0, self._expected_seconds - self._done_seconds)
        if self._done_seconds:
            left *= (time.monotonic() - self._begun) / self._done_seconds
        return f"{duration(left)} left"


class Step:
    said = "done"


def duration(seconds: float) -> str:
    """For people: 40 s, 12 min, 1.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
