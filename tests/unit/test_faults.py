"""Media that fail under a load or store. What may be SIGBUS is tried in a process of its own."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit import fault_trials

SECONDS = 60


def _tried(trial: str, directory: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "tests.unit.fault_trials", trial, str(directory)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def _passes(trial: str, directory: Path) -> None:
    done = _tried(trial, directory)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done


@pytest.mark.parametrize("how", fault_trials.TOUCHES)
def test_whoever_touches_memory_that_a_file_has_lost_goes_on_and_it_is_known(
    directory: Path, how: str
) -> None:
    _passes(f"touch:{how}", directory)


@pytest.mark.parametrize("trial", fault_trials.ALONE)
def test_what_is_replaced_is_what_has_failed(directory: Path, trial: str) -> None:
    _passes(trial, directory)


@pytest.mark.parametrize("kind", fault_trials.KINDS)
def test_a_batch_that_meets_lost_memory_fails_and_so_does_all_after_it(
    directory: Path, kind: str
) -> None:
    _passes(f"serve:{kind}", directory)


@pytest.mark.parametrize("kind", fault_trials.WITH_WINDOWS)
def test_a_write_that_was_received_into_lost_memory_is_an_error(directory: Path, kind: str) -> None:
    _passes(f"half-received:{kind}", directory)


@pytest.mark.parametrize("trial", fault_trials.DEADLY)
def test_any_other_sigbus_ends_the_process_as_ever(directory: Path, trial: str) -> None:
    done = _tried(trial, directory)
    assert (done.returncode, done.stdout) == (-signal.SIGBUS, "before\n"), done
    if trial == "somebody-elses":  # whose handler was there before ours
        assert "Fatal Python error: Bus error" in done.stderr
        assert "in open_somebody_elses" in done.stderr
