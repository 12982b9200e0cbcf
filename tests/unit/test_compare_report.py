"""What is made of results: JSON and back, tables, sentences, Markdown, the page."""

import os
import re
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pmblk import PmblkError
from pmblk.representations import KINDS
from pmblkd.compare import command, figures, markdown, page
from pmblkd.compare.matrix import ROWS
from pmblkd.compare.results import Results, encode, load
from pmblkd.compare.summary import glance, summary
from pmblkd.compare.tables import contender_table, device_tables, tables
from tests.harness.html_page import Page
from tests.unit.comparisons import large_file, results, sample

NUMBER = r"[\d,.e+-]+"


def numbers(cell: str) -> tuple[float, float, float]:
    """The median, the least and the most that a cell gives."""
    match = re.fullmatch(rf"({NUMBER}) \(({NUMBER}) to ({NUMBER})\)", cell)
    assert match is not None, cell
    middle, least, most = (float(text.replace(",", "")) for text in match.groups())
    return middle, least, most


# ---- JSON


def test_results_come_back_as_they_were(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_bytes(encode(results()))
    assert load(file) == results()


def test_the_report_is_drawn_again_from_the_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = results()
    file = tmp_path / "results.json"
    file.write_bytes(encode(made))
    assert command.redraw(file, tmp_path / "out") == 0
    assert sorted(os.listdir(tmp_path / "out")) == ["report.html", "report.md"]
    assert (tmp_path / "out/report.md").read_text() == markdown.report(made)
    assert (tmp_path / "out/report.html").read_text() == page.report(made)
    assert summary(made)[0] in capsys.readouterr().out


def test_what_are_no_results_draws_no_report(tmp_path: Path) -> None:
    with pytest.raises(PmblkError, match="cannot read"):
        command.redraw(tmp_path / "missing.json", tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_results_of_another_version_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_bytes(encode(msgspec.structs.replace(results(), version=2)))
    with pytest.raises(PmblkError, match="is of version 2, this program knows 1"):
        load(file)


@pytest.mark.parametrize("text", ["", "{}", '{"version": 1}', "[]"])
def test_what_is_no_result_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "results.json"
    file.write_text(text)
    with pytest.raises(PmblkError, match="holds no results"):
        load(file)


# ---- tables


rates = st.lists(st.integers(1, 10**6), min_size=1, max_size=5)


@settings(max_examples=25)
@given(st.lists(rates, min_size=9, max_size=9), st.sets(st.sampled_from(ROWS), min_size=1))
def test_every_sample_is_in_the_tables(per_contender: list[list[int]], rows: set[object]) -> None:
    chosen = [row for row in ROWS if row in rows]
    plain = results(rows=chosen)
    runs = [
        sample(row, one, number, ios=ios)
        for row in chosen
        for one, rounds in zip(plain.contenders, per_contender, strict=True)
        for number, ios in enumerate(rounds, 1)
    ]
    made = msgspec.structs.replace(plain, samples=runs)
    cells = {
        (table.title, load, line[0]): line[1]
        for table in tables(made)
        for load, lines in table.groups
        for line in lines
        if table.header[1] == figures.IOPS.heading
    }
    assert len(cells) == len(chosen) * len(plain.contenders)
    by_name = {row.name: row for row in chosen}
    for run in runs:
        row = by_name[run.row]
        (cell,) = [
            text
            for (title, load, name), text in cells.items()
            if name == run.contender and load == row.title and _is_of(title, row.path)
        ]
        _, least, most = numbers(cell)
        rate = figures.IOPS.of(run, row)
        assert least * 0.99 - 0.01 <= rate <= most * 1.01 + 0.01


def _is_of(title: str, path: str) -> bool:
    return title.startswith("NBD") == (path == "nbd")


def test_every_line_of_a_table_is_as_long_as_its_header() -> None:
    made = results()
    every = [*tables(made), *device_tables(made), glance(made), contender_table(made)]
    for table in every:
        for _, lines in table.groups:
            assert lines
            assert {len(line) for line in lines} == {len(table.header)}


def test_the_share_of_a_page_table_is_one_in_64() -> None:
    table = next(iter(device_tables(results())))
    shares = {line[0]: (line[2], line[3]) for line in table.groups[0][1]}
    assert shares["struct-page"] == ("1/64 (1.56 %)", "DRAM")
    assert shares["struct-page memmap=device"] == ("1/64 (1.56 %)", "the device")


def test_a_representation_that_was_not_to_be_had_is_named_with_the_reason() -> None:
    one = results().contenders[0]
    known = large_file(one, 8 << 30)
    gone = msgspec.structs.replace(
        known, contender="struct-page init=eager", skipped="too little memory", ios=[]
    )
    made = results(large_files=[known, gone])
    table = next(iter(device_tables(made)))
    assert "struct-page init=eager was left out: too little memory." in table.note
    assert {len(line) for line in table.groups[0][1]} == {len(table.header)}


# ---- sentences


def said(made: Results) -> str:
    return "\n".join(summary(made))


def test_who_copies_is_said_and_who_does_not() -> None:
    assert "page-cache copied 1 for each byte read and 1 for each byte written" in said(results())
    assert "; struct-page, struct-page memmap=device" in said(results())
    assert "extent and extent fragments=1024 copied none." in said(results())


def test_nobody_is_faster_where_the_rounds_overlap() -> None:
    rows = ROWS[:2]
    made = results(rows=rows, variants=False)
    same = [msgspec.structs.replace(one, ios=10_000) for one in made.samples]
    text = said(msgspec.structs.replace(made, samples=same))
    assert "faster than all others in every round was nobody; slower than all others in" in text
    assert "1.00 to 1.00 times the worst" in text


def test_who_is_faster_in_every_round_is_named() -> None:
    text = said(results(rows=ROWS[:2], variants=False))
    assert "faster than all others in every round was extent in 2 loads" in text
    assert "slower than all others in every round was page-cache in 2 loads" in text


def test_one_round_says_nothing_about_who_is_faster() -> None:
    assert "nothing is said about who is faster" in said(results(rounds=1))


def test_a_missed_limit_is_said() -> None:
    made = results()
    extent = next(one for one in made.contenders if one.name == "extent")
    missed = results(large_files=[large_file(extent, 400 << 30, open_seconds=0.5)])
    assert "Missed at 400 GiB" in said(missed)
    assert "extent opened in 500 ms" in said(missed)
    assert "Missed" not in said(made)


def test_a_machine_that_was_not_quiet_is_said() -> None:
    made = results()
    noisy = [msgspec.structs.replace(one, others_share=0.8) for one in made.samples]
    assert "not quiet" in said(msgspec.structs.replace(made, samples=noisy))
    assert "not quiet" not in said(made)


# ---- Markdown and the page


def test_both_reports_have_every_cell_of_every_table() -> None:
    made = results()
    text = markdown.report(made).replace("\\", "")
    shown = Page(page.report(made)).cells
    for table in (*tables(made), *device_tables(made), glance(made), contender_table(made)):
        for _, lines in table.groups:
            for line in lines:
                assert set(line) <= set(shown)
                assert " | ".join(line) + " |" in text


def test_markdown_tables_have_as_many_cells_in_every_line() -> None:
    lines = markdown.report(results()).splitlines()
    for before, after in pairwise(lines):
        if before.startswith("|") and after.startswith("|"):
            assert before.count(" | ") == after.count(" | ")


def test_the_page_is_well_formed_and_needs_nothing_else() -> None:
    text = page.report(results())
    shown = Page(text)
    assert not {"script", "link", "img", "iframe"} & {name for name, _ in shown.elements}
    assert "url(" not in text
    assert "http" not in text
    assert len(set(shown.ids())) == len(shown.ids())


def test_every_drawing_has_a_title_and_a_description() -> None:
    shown = Page(page.report(results()))
    # A bar chart for each load; two charts of dots for each path and way; two of lines.
    assert shown.count("svg") == len(ROWS) + 2 * 4 + 2
    assert shown.count("desc") == shown.count("svg")
    ids = set(shown.ids())
    for name, attributes in shown.elements:
        if name == "svg":
            assert set(str(attributes["aria-labelledby"]).split()) <= ids


@pytest.mark.parametrize(
    "evil", ["<script>alert(1)</script>", '"><img src=x>', "a & b < c", "`x` | y"]
)
def test_words_from_outside_are_only_words(evil: str) -> None:
    made = results(command=evil, machine=evil, durability_reason=evil, loop_refusal=evil)
    shown = Page(page.report(made))
    assert not {"script", "img"} & {name for name, _ in shown.elements}
    assert shown.words.count(evil) >= 3
    assert "a & b \\< c" in markdown.report(made) or evil not in markdown.report(made)


@pytest.mark.parametrize("paths", [("nbd",), ("loop",), ("nbd", "loop")])
@pytest.mark.parametrize("variants", [False, True])
def test_a_report_of_a_part_is_a_report(paths: tuple[str, ...], variants: bool) -> None:
    rows = [row for row in ROWS if row.path in paths][:3]
    made = results(rows=rows, variants=variants, large_files=[], rounds=1)
    Page(page.report(made))
    assert markdown.report(made).startswith("# ")


@pytest.mark.parametrize("kind", KINDS)
def test_a_report_of_one_representation_is_a_report(kind: str) -> None:
    made = results(only=[kind], variants=False)
    Page(page.report(made))
    assert markdown.report(made).startswith("# ")


def test_figures_of_nothing_are_no_error() -> None:
    made = results()
    idle = [
        msgspec.structs.replace(
            one, server_seconds=0.0, transferred_bytes=0, latency_us_p99=0.0, descriptors=0
        )
        for one in made.samples
    ]
    Page(page.report(msgspec.structs.replace(made, samples=idle)))


@pytest.mark.parametrize(
    ("durability", "said"),
    [("memory", "a cost with no gain"), ("file", "a cost with no gain"), ("pmem", "save it at")],
)
def test_what_dirty_marks_are_good_for_depends_on_the_media(durability: str, said: str) -> None:
    text = markdown.report(results(durability=durability))
    assert said in text
    assert "Since Linux 5.1" in text
