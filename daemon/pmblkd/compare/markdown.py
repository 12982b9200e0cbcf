"""The report as Markdown: the same words and tables as the page, without the charts. Pure."""

from collections.abc import Iterator, Sequence

from pmblkd.compare import words
from pmblkd.compare.results import Results
from pmblkd.compare.summary import glance, summary
from pmblkd.compare.tables import Table, contender_table, device_tables, tables


def report(results: Results) -> str:
    return "\n\n".join(_parts(results)) + "\n"


def _parts(results: Results) -> Iterator[str]:
    yield f"# {words.TITLE}"
    yield _list(words.origin(results))
    yield "## At a glance"
    yield _table(glance(results))
    yield "## What the figures say"
    yield _list(summary(results))
    yield "## How to read them"
    yield _list(words.how_to_read(results))
    yield _section(contender_table(results))
    for table in tables(results):
        yield _section(table)
    yield f"## {words.DEVICES_TITLE}"
    yield words.DEVICES_TEXT
    for table in device_tables(results):
        yield _section(table)


def _section(table: Table) -> str:
    parts = [f"### {table.title}", *([_plain(table.note)] if table.note else []), _table(table)]
    return "\n\n".join(parts)


def _table(table: Table) -> str:
    """Each line begins with the title of its group, if it has one."""
    grouped = bool(table.group_heading)
    header = [table.group_heading, *table.header] if grouped else table.header
    lines = [
        [title, *cells] if grouped else cells for title, group in table.groups for cells in group
    ]
    return "\n".join(_line(cells) for cells in [header, _ruler(header, table), *lines])


def _ruler(header: Sequence[str], table: Table) -> list[str]:
    names = 2 if table.group_heading else 1
    return ["---" if table.words or index < names else "---:" for index in range(len(header))]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_plain(cell) for cell in cells) + " |"


def _list(items: Sequence[str]) -> str:
    return "\n".join(f"- {_plain(item)}" for item in items)


def _plain(text: str) -> str:
    """Nothing that Markdown takes for its own; a cell is one line."""
    for character in "\\`*_|<>[]":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())
