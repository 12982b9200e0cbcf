"""At the end of a test run: a line for every case that a guest worked through.

One boot does for many tests, so pytest's own times say little.
"""

import pytest

from tests.harness import cases


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if cases.told:
        terminalreporter.section("in User-mode Linux")
        for line in cases.told:
            terminalreporter.write_line(line)
