"""One line a case, with its time: what its docstring says, the parameters filled in."""

import signal

import pytest

WORDS = {"passed": "ok", "failed": "FAILED", "skipped": "skipped"}


def pytest_configure(config: pytest.Config) -> None:
    # As ^C: what a case has made goes away with it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    config.pluginmanager.register(_Lines(config))


def pytest_itemcollected(item: pytest.Item) -> None:
    assert isinstance(item, pytest.Function)
    title = (item.function.__doc__ or item.name).splitlines()[0].rstrip(".")
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    item.user_properties.append(("title", title.format(**parameters)))


class _Lines:
    """Prints them, in the place of dots and letters."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._seconds = 0.0
        self._outcome = "passed"

    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str]:
        counts = report.when == "call" or report.outcome != "passed"
        return (report.outcome if counts else "", "", "")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "setup":
            self._seconds, self._outcome = 0.0, "passed"
        self._seconds += report.duration
        if report.outcome != "passed":
            self._outcome = report.outcome
        if report.when == "teardown":
            terminal = self._config.pluginmanager.get_plugin("terminalreporter")
            assert terminal is not None
            title = dict(report.user_properties)["title"]
            terminal.write_line(f"{WORDS[self._outcome]:6} {self._seconds:6.1f} s  {title}")
