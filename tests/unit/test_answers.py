"""What the control socket is told while somebody else changes what it is about."""

from pathlib import Path

import pytest
import trio

from pmblk import switching
from pmblk.representations import parse_options
from pmblkd.answers import Answers
from pmblkd.questions import NamespaceQuestion
from pmblkd.reports import StatsReport
from tests.unit.conftest import memory
from tests.unit.test_registry import opened


async def test_stats_are_of_one_representation_though_another_takes_over_meanwhile(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, served = opened(directory, representation="struct-page")

    def resident_bytes() -> int:
        extent = parse_options("extent")
        trio.from_thread.run(switching.switch, memory(served), "extent", extent)
        return 4096

    monkeypatch.setattr(memory(served).representation, "resident_bytes", resident_bytes)
    report = await Answers(registry).handlers()["stats"].answer(NamespaceQuestion(name="a"))
    assert isinstance(report, StatsReport)
    assert report.representation is not None
    assert report.representation.kind == "struct-page"
    assert report.representation_counters is not None
    assert report.representation_counters.metadata_resident_bytes == 4096
    assert memory(served).representation.kind == "extent"
    registry.close_all()
