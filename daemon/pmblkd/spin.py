"""When to look again before going to sleep: a bounded spin for the one busy client.

Waking a virtual CPU costs more than serving a 4 KiB I/O, so with one client at queue depth 1 the
daemon would mostly measure its own sleep. Spinning pays only there: with more in flight the next
batch comes by itself and grows while the loop turns, and with two busy clients a spin takes the
loop from the other one. The kernel does the same for network devices (SO_BUSY_POLL).
"""

SMALL_BATCH = 2
TURN_SPINS = 32  # then the event loop gets a turn, for whoever else has something to do
SHORT_WAIT_SECONDS = 0.5e-3


class Spinner:
    """One for the event loop, shared by everything that is busy on it; 0 us switches it off.

    A spin that finds nothing ends the right to spin; a short wait in the loop gives it back. So
    an idle daemon sleeps, and one with a busy client spins again after one turn.
    """

    def __init__(self, busy_poll_us: int) -> None:
        self._last_batch = 0
        self.seconds = busy_poll_us / 1e6
        self._last_user: object = None
        self._promising = False
        self._spins = 0

    def worth_it(self, user: object) -> bool:
        """Whether `user` should spin now; asking also tells that it is busy."""
        alone = self._last_user is user
        self._last_user = user
        self._spins += 1
        if not alone or self._spins > TURN_SPINS:
            self._spins = 0
            return False
        return self._promising and self._last_batch <= SMALL_BATCH and self.seconds > 0

    def answered(self, commands: int) -> None:
        """A batch of so many commands was answered at once."""
        self._last_batch = commands

    def waited(self, seconds: float) -> None:
        """A wait in the event loop took this long."""
        self._promising = seconds < SHORT_WAIT_SECONDS

    def missed(self) -> None:
        self._promising = False
