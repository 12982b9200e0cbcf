"""SIGINT, SIGTERM and SIGHUP as something to look for, not something that strikes.

Handlers only note the signal. It is raised where the work says that it can be left (`check`), so
no exception comes between a process and the note that it runs, or into the tidying up.
"""

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(Exception):
    """`number` is the first signal that came."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Interrupts:
    def __init__(self) -> None:
        self.number = 0

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        def handle(number: int, _frame: Any) -> None:
            self.arrived(number)

        before = {number: signal.signal(number, handle) for number in _NUMBERS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def arrived(self, number: int) -> None:
        """The first that comes is the one that counts."""
        self.number = self.number or number

    def check(self) -> None:
        """Raises Interrupted once a signal has come."""
        if self.number:
            raise Interrupted(self.number)
