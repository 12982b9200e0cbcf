"""The report as one HTML page that needs nothing else: no script, no network. Pure.

Everything that came from outside (names, commands, the machine's words) is escaped here.
"""

from collections.abc import Iterator, Sequence
from html import escape
from importlib.resources import files

from pmblkd.compare import charts, figures, words
from pmblkd.compare.figures import Figure
from pmblkd.compare.matrix import PATH_TITLES, Row
from pmblkd.compare.results import Results
from pmblkd.compare.summary import glance, summary
from pmblkd.compare.tables import Table, contender_table, device_tables, tables


def report(results: Results) -> str:
    style = files(__package__).joinpath("page.css").read_text()
    body = "\n".join(_body(results))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(words.TITLE)}</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _body(results: Results) -> Iterator[str]:
    yield f"<header>\n<h1>{escape(words.TITLE)}</h1>\n{_lead(results)}\n</header>"
    yield _table(glance(results), level=2)
    yield f"<h2>What the figures say</h2>\n{_list(summary(results))}"
    yield from _charts(results)
    yield f"<h2>{escape(words.DEVICES_TITLE)}</h2>\n<p>{escape(words.DEVICES_TEXT)}</p>"
    yield from _device_charts(results)
    yield from (_table(table) for table in device_tables(results))
    yield "<h2>All figures</h2>"
    yield from (_table(table) for table in tables(results))
    yield f"<h2>How to read this</h2>\n{_list(words.how_to_read(results))}"
    yield _table(contender_table(results))
    yield f"<h2>Where it was made</h2>\n{_list(words.origin(results))}"


def _lead(results: Results) -> str:
    setup = results.setup
    compared = ", ".join(dict.fromkeys(one.kind for one in results.contenders))
    said = f"{compared}, compared on one device. {setup.machine}. {setup.date[:10]}."
    return f'<p class="lead">{escape(said)}</p>'


def _list(items: Sequence[str]) -> str:
    return "<ul>\n" + "\n".join(f"<li>{escape(item)}</li>" for item in items) + "\n</ul>"


# ---- charts


def _charts(results: Results) -> Iterator[str]:
    for path, title in PATH_TITLES.items():
        rows = results.of_path(path)
        if rows:
            yield f"<h2>{escape(title)}</h2>"
            yield _bars(results, rows)
            yield _dots(results, rows, figures.CPU, "Lower is better.")
            yield _dots(results, rows, figures.P99, "As the client sees it; lower is better.")


def _bars(results: Results, rows: Sequence[Row]) -> str:
    # Three abreast on a wide screen: a line for each direction and depth, a column for each size.
    ordered = sorted(rows, key=lambda row: (row.way, row.queue_depth, row.block_bytes))
    drawn = [
        f"<figure><figcaption>{escape(row.title)}</figcaption>"
        f"{charts.bars(results, row, figures.IOPS)}</figure>"
        for row in ordered
    ]
    rounds = results.setup.rounds
    note = f"Median of {rounds} rounds; the whiskers reach from the least to the most."
    return _gallery("IOPS by representation", note if rounds > 1 else "One round.", drawn, "small")


def _dots(results: Results, rows: Sequence[Row], figure: Figure, note: str) -> str:
    drawn = []
    for way in ("read", "write"):
        these = [row for row in rows if row.way == way]
        if these:
            chart = charts.dots(results, these, figure)
            drawn.append(f"<figure><figcaption>{way}</figcaption>{chart}</figure>")
    title = "Latency, p99" if figure is figures.P99 else figure.title
    return _gallery(title, note, drawn, "wide")


def _device_charts(results: Results) -> Iterator[str]:
    drawn = [
        f"<figure><figcaption>{caption}</figcaption>{chart}</figure>"
        for caption, chart in (
            ("Metadata against the size of the device", charts.metadata_lines(results)),
            ("Descriptor bytes of one read against its size", charts.descriptor_lines(results)),
        )
        if chart
    ]
    if drawn:
        note = "Lines that coincide are one, dashed in the colours of all."
        yield _gallery("How they grow", note, drawn, "wide")


def _gallery(title: str, note: str, drawn: Sequence[str], size: str) -> str:
    return (
        f'<section>\n<h3>{escape(title)}</h3>\n<p class="note">{escape(note)}</p>\n'
        f'<div class="gallery {size}">\n' + "\n".join(drawn) + "\n</div>\n</section>"
    )


# ---- tables


def _table(table: Table, *, level: int = 3) -> str:
    """A table that scrolls by itself where the screen is too narrow for it."""
    title = escape(table.title)
    note = f'\n<p class="note">{escape(table.note)}</p>' if table.note else ""
    header = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.header)
    groups = "\n".join(_group(table, *group) for group in table.groups)
    kind = ' class="words"' if table.words else ""
    return (
        f"<section>\n<h{level}>{title}</h{level}>{note}\n"
        f'<div class="scroll" role="region" aria-label="{title}" tabindex="0">\n'
        f"<table{kind}>\n<thead><tr>{header}</tr></thead>\n{groups}\n</table>\n</div>\n</section>"
    )


def _group(table: Table, title: str, lines: Sequence[Sequence[str]]) -> str:
    head = ""
    if title:
        columns = len(table.header)
        head = (
            f'<tr class="group"><th colspan="{columns}" scope="rowgroup">'
            f"<span>{escape(title)}</span></th></tr>\n"
        )
    return f"<tbody>\n{head}" + "\n".join(_line(cells) for cells in lines) + "\n</tbody>"


def _line(cells: Sequence[str]) -> str:
    name, *values = cells
    swatch = f'<i class="swatch {charts.style_of(escape(name, quote=True))}"></i>'
    data = "".join(f"<td>{escape(value)}</td>" for value in values)
    return f'<tr><th scope="row">{swatch}{escape(name)}</th>{data}</tr>'
