"""The report's charts. Pure: results in, SVG out.

One representation has one colour everywhere, a variant has it paler; every mark is labelled where
it is, so that no chart needs its colours to be told apart. Bars start at 0; where an axis is
logarithmic there are dots.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from pmblk.units import format_size
from pmblkd.compare import figures, svg
from pmblkd.compare.contenders import Contender
from pmblkd.compare.figures import Figure
from pmblkd.compare.matrix import BLOCKS_BYTES, PATH_TITLES, Row, block_text
from pmblkd.compare.results import Results
from pmblkd.compare.spread import Spread

LANE, BAR = 19.0, 11.0
BARS_WIDTH, DOTS_WIDTH, LINES_WIDTH = 340.0, 460.0, 560.0
VALUE_WIDTH = 50.0
AXIS_HEIGHT = 34.0
DOT_LANE, GROUP_HEIGHT = 14.0, 22.0
LABEL_GAP = 15.0


def style_of(name: str) -> str:
    """The classes that give a mark its contender's colour."""
    kind, _, variant = name.partition(" ")
    return f"c-{kind} variant" if variant else f"c-{kind}"


Measured = Sequence[tuple[Contender, Spread]]


def measured(results: Results, row: Row, figure: Figure) -> Measured:
    return [
        (one, figure.spread(samples, row))
        for one in results.contenders
        if (samples := results.of(row, one))
    ]


def _said(values: Measured, unit: str) -> str:
    """The data in words."""
    return "; ".join(f"{one.name} {figures.with_range(found)} {unit}" for one, found in values)


# ---- bars: one load


def bars(results: Results, row: Row, figure: Figure) -> str:
    """A bar for each contender, its median, with whiskers from least to most."""
    values = measured(results, row, figure)
    left = svg.label_width(one.name for one, _ in values) + 8
    width = max(BARS_WIDTH, left + 190)
    ticks = svg.nice_ticks(max(found.most for _, found in values), about=3)
    span = width - left - VALUE_WIDTH
    scale = span / ticks[-1]
    bottom = len(values) * LANE + 4
    parts = [
        svg.line(left + tick * scale, 0, left + tick * scale, bottom, "grid") for tick in ticks
    ]
    for index, (one, found) in enumerate(values):
        parts += _bar(one.name, found, left, index * LANE + LANE / 2 + 2, scale)
    parts.append(svg.line(left, 0, left, bottom, "axis"))
    parts += [
        svg.text(left + tick * scale, bottom + 13, _short(tick), "muted", anchor="middle")
        for tick in ticks
    ]
    parts.append(svg.text(left + span, bottom + 27, figure.unit, "muted", anchor="end"))
    return svg.drawing(
        f"{row.name}-{figure.title.lower()}",
        width,
        bottom + AXIS_HEIGHT,
        parts,
        title=f"{figure.title}: {PATH_TITLES[row.path]}, {row.title}",
        description=_said(values, figure.unit),
    )


def _short(tick: float) -> str:
    """For an axis where little fits: 20k."""
    return f"{tick / 1000:g}k" if tick >= 10_000 else figures.digits(tick)


def _bar(name: str, found: Spread, left: float, middle: float, scale: float) -> list[str]:
    least, most = left + found.least * scale, left + found.most * scale
    return [
        svg.text(left - 6, middle + 4, name, "label", anchor="end"),
        svg.rectangle(left, middle - BAR / 2, found.middle * scale, BAR, f"bar {style_of(name)}"),
        svg.line(least, middle, most, middle, "whisker"),
        *(svg.line(end, middle - 3, end, middle + 3, "whisker") for end in (least, most)),
        svg.text(most + 6, middle + 4, figures.fixed(found.middle), "value"),
    ]


# ---- dots: all loads of a path and a direction, on one logarithmic axis


def dots(results: Results, rows: Sequence[Row], figure: Figure) -> str:
    """A dot for each contender and load, its median, with a line from least to most."""
    groups = [(row, measured(results, row, figure)) for row in rows]
    flat = [found for _, values in groups for _, found in values]
    positive = [max(found.least, 0.01) for found in flat]
    axis = _LogAxis.over(
        positive, flat, left=svg.label_width(one.name for one in results.contenders) + 10
    )
    parts, top = [], 4.0
    for row, values in groups:
        parts.append(svg.text(0, top + 13, row.title, "group"))
        top += GROUP_HEIGHT
        for one, found in values:
            parts += _dot(one.name, found, axis, top + DOT_LANE / 2)
            top += DOT_LANE
        top += 6
    return svg.drawing(
        f"{rows[0].path}-{rows[0].way}-{figure.title.lower().replace(' ', '-')}",
        DOTS_WIDTH,
        top + AXIS_HEIGHT,
        [*axis.grid(top), *parts, *axis.labels(top, figure.unit)],
        title=f"{figure.title}: {PATH_TITLES[rows[0].path]}, {rows[0].way}",
        description=" ".join(
            f"{row.title}: {_said(values, figure.unit)}." for row, values in groups
        ),
    )


@dataclass(frozen=True)
class _LogAxis:
    ticks: Sequence[float]
    left: float
    right: float

    @classmethod
    def over(cls, least: Sequence[float], flat: Sequence[Spread], *, left: float) -> "_LogAxis":
        ticks = svg.log_ticks(min(least), max(0.01, *(found.most for found in flat)))
        return cls(ticks, left, DOTS_WIDTH - VALUE_WIDTH - 8)

    def at(self, value: float) -> float:
        place = svg.log_place(max(value, self.ticks[0]), least=self.ticks[0], most=self.ticks[-1])
        return self.left + place * (self.right - self.left)

    def _labelled(self) -> list[float]:
        """All ticks where they are few, else the powers of ten."""
        if len(self.ticks) <= 5:
            return list(self.ticks)
        return [tick for tick in self.ticks if math.log10(tick).is_integer()]

    def grid(self, bottom: float) -> list[str]:
        places = [self.at(tick) for tick in self._labelled()]
        return [svg.line(place, 22, place, bottom, "grid") for place in places]

    def labels(self, bottom: float, unit: str) -> list[str]:
        return [
            *(
                svg.text(self.at(tick), bottom + 13, f"{tick:,.10g}", "muted", anchor="middle")
                for tick in self._labelled()
            ),
            svg.text(self.right, bottom + 28, f"{unit}, logarithmic", "muted", anchor="end"),
        ]


def _dot(name: str, found: Spread, axis: _LogAxis, middle: float) -> list[str]:
    least, most = axis.at(found.least), axis.at(found.most)
    return [
        svg.text(axis.left - 8, middle + 4, name, "label small", anchor="end"),
        svg.line(least, middle, most, middle, f"range {style_of(name)}"),
        svg.circle(axis.at(found.middle), middle, 4, f"dot {style_of(name)}"),
        svg.text(DOTS_WIDTH, middle + 4, figures.fixed(found.middle), "value small", anchor="end"),
    ]


# ---- lines: how something grows


@dataclass(frozen=True)
class Series:
    """A contender's values, one for each place on the horizontal axis."""

    name: str
    values: Sequence[float]


def descriptor_lines(results: Results) -> str:
    """Descriptor bytes of one read against its size, from the smallest of the files."""
    smallest = min((one.file_bytes for one in results.large_files), default=0)
    series = [
        Series(one.contender, [one.io(block).descriptor_bytes for block in BLOCKS_BYTES])
        for one in results.large_files
        if one.file_bytes == smallest and one.ios and "eager" not in one.contender
    ]
    return _lines(
        "descriptor-bytes",
        _distinct(series),
        places=BLOCKS_BYTES,
        place_labels=[block_text(block) for block in BLOCKS_BYTES],
        ticks=[4**power for power in range(1, 9)],
        title="Descriptor bytes of one read, by its size",
        axis="size of the read, both axes logarithmic",
    )


def _distinct(series: Sequence[Series]) -> list[Series]:
    """Without the variants that are no different from their kind."""
    plain = {one.name: list(one.values) for one in series}
    return [
        one
        for one in series
        if " " not in one.name or list(one.values) != plain.get(one.name.partition(" ")[0])
    ]


def metadata_lines(results: Results) -> str:
    """Metadata against the size of the device."""
    sizes = sorted({one.file_bytes for one in results.large_files})
    by_name: dict[str, dict[int, int]] = {}
    for one in results.large_files:
        if not one.skipped and "eager" not in one.contender:
            by_name.setdefault(one.contender, {})[one.file_bytes] = one.metadata_bytes
    return _lines(
        "metadata",
        [
            Series(name, [known[size] for size in sizes])
            for name, known in by_name.items()
            if len(known) == len(sizes)
        ],
        places=sizes,
        place_labels=[format_size(size) for size in sizes],
        ticks=[1 << power for power in range(4, 41, 6)],
        title="Metadata, by the size of the device",
        axis="size of the device, both axes logarithmic",
    )


@dataclass(frozen=True, kw_only=True)
class _Plot:
    """Two logarithmic axes, and where on the drawing a value lies on them."""

    places: Sequence[int]
    place_labels: Sequence[str]
    ticks: Sequence[int]
    right: float

    left: ClassVar[float] = 62.0
    height: ClassVar[float] = 300.0

    def across(self, place: int) -> float:
        first, last = self.places[0], self.places[-1]
        share = svg.log_place(place, least=first, most=last) if first != last else 0.5
        return self.left + 12 + share * (self.right - self.left - 24)

    def up(self, value: float) -> float:
        share = svg.log_place(value, least=self.ticks[0], most=self.ticks[-1])
        return self.height - share * (self.height - 12)

    def axes(self, words: str) -> Iterator[str]:
        for tick in self.ticks:
            height = self.up(tick)
            yield svg.line(self.left, height, self.right, height, "grid")
            yield svg.text(self.left - 6, height + 4, format_size(tick), "muted", anchor="end")
        for place, label in zip(self.places, self.place_labels, strict=True):
            across = self.across(place)
            yield svg.text(across, self.height + 16, label, "muted", anchor="middle")
        yield svg.text(self.right, self.height + 32, words, "muted", anchor="end")

    def series(self, one: Series, *, is_over: bool) -> Iterator[str]:
        """`is_over`: another line lies below, which shows through the gaps of this one."""
        pairs = zip(self.places, one.values, strict=True)
        points = [(self.across(place), self.up(value)) for place, value in pairs]
        yield svg.polyline(points, f"line {style_of(one.name)}{' over' if is_over else ''}")
        for x, y in points:
            yield svg.circle(x, y, 4, f"dot {style_of(one.name)}")

    def labels(self, labels: Sequence[tuple[str, float]]) -> Iterator[str]:
        """Beside the ends of the lines, apart from each other."""
        ends = [self.up(value) for _, value in labels]
        start = self.across(self.places[-1]) + 6
        places = svg.spaced(ends, LABEL_GAP)
        for (words, _), end, place in zip(labels, ends, places, strict=True):
            yield svg.line(start, end, self.right + 2, place, "leader")
            yield svg.text(self.right + 6, place + 4, words, "label")


def _lines(
    name: str,
    series: Sequence[Series],
    *,
    places: Sequence[int],
    place_labels: Sequence[str],
    ticks: Sequence[int],
    title: str,
    axis: str,
) -> str:
    """A line for each series; equal ones are one, dashed in each colour."""
    if not series:
        return ""
    labels = _merged(series)
    plot = _Plot(
        places=places,
        place_labels=place_labels,
        ticks=_around([value for one in series for value in one.values], ticks),
        right=LINES_WIDTH - svg.label_width(words for words, _ in labels) - 12,
    )
    parts = list(plot.axes(axis))
    seen: set[tuple[float, ...]] = set()
    for one in series:
        parts += plot.series(one, is_over=tuple(one.values) in seen)
        seen.add(tuple(one.values))
    parts += plot.labels(labels)
    return svg.drawing(
        name,
        LINES_WIDTH,
        plot.height + 40,
        parts,
        title=title,
        description="; ".join(_values_said(one, place_labels) for one in series),
    )


def _values_said(series: Series, place_labels: Sequence[str]) -> str:
    pairs = zip(series.values, place_labels, strict=True)
    return f"{series.name} " + ", ".join(f"{format_size(int(v))} at {p}" for v, p in pairs)


def _around(values: Sequence[float], ticks: Sequence[int]) -> list[int]:
    """Those of the ticks that it takes to have all values between the first and the last; two."""
    first = max(index for index, tick in enumerate(ticks) if tick <= min(values))
    last = min(index for index, tick in enumerate(ticks) if tick >= max(values))
    return list(ticks[first : max(last, first + 1) + 1])


def _merged(series: Sequence[Series]) -> list[tuple[str, float]]:
    """A label for each line that can be seen, and where it ends; equal lines share theirs."""
    names: dict[tuple[float, ...], list[str]] = {}
    for one in series:
        names.setdefault(tuple(one.values), []).append(one.name)
    return [(", ".join(found), values[-1]) for values, found in names.items()]
