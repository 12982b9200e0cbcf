"""The few SVG elements that the charts are made of, as text. Pure.

Colours and fonts are the page's, by class: a drawing follows light, dark and print like its text.
"""

import math
from collections.abc import Iterable, Sequence
from html import escape

CHARACTER_WIDTH = 6.5  # of the labels' 11 px sans, on average and a little more


def number(value: float) -> str:
    """A coordinate: a tenth of a pixel is as fine as anybody sees."""
    return f"{value:.1f}".removesuffix(".0")


def line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    ends = f'x1="{number(x1)}" y1="{number(y1)}" x2="{number(x2)}" y2="{number(y2)}"'
    return f'<line {ends} class="{style}"/>'


def rectangle(x: float, y: float, width: float, height: float, style: str) -> str:
    """With its right corners rounded: the end of a bar, not its base."""
    radius = min(3.0, width, height / 2)
    straight = width - radius
    path = (
        f"M{number(x)} {number(y)}h{number(straight)}q{number(radius)} 0 {number(radius)}"
        f" {number(radius)}v{number(height - 2 * radius)}q0 {number(radius)} {number(-radius)}"
        f" {number(radius)}h{number(-straight)}z"
    )
    return f'<path d="{path}" class="{style}"/>'


def circle(x: float, y: float, radius: float, style: str) -> str:
    return f'<circle cx="{number(x)}" cy="{number(y)}" r="{number(radius)}" class="{style}"/>'


def polyline(points: Iterable[tuple[float, float]], style: str) -> str:
    text = " ".join(f"{number(x)},{number(y)}" for x, y in points)
    return f'<polyline points="{text}" class="{style}"/>'


def text(x: float, y: float, words: str, style: str = "", *, anchor: str = "start") -> str:
    """`anchor`: which end of the words is at x: start, middle or end."""
    return (
        f'<text x="{number(x)}" y="{number(y)}" text-anchor="{anchor}" class="{style}">'
        f"{escape(words)}</text>"
    )


def drawing(
    name: str, width: float, height: float, parts: Iterable[str], *, title: str, description: str
) -> str:
    """A whole SVG; `name` is unique on its page. Title and description are its text for readers."""
    return (
        f'<svg viewBox="0 0 {number(width)} {number(height)}" role="img"'
        f' aria-labelledby="{name}-t {name}-d">'
        f'<title id="{name}-t">{escape(title)}</title>'
        f'<desc id="{name}-d">{escape(description)}</desc>'
        f"{''.join(parts)}</svg>"
    )


def label_width(labels: Iterable[str]) -> float:
    return max((len(label) for label in labels), default=0) * CHARACTER_WIDTH


# ---- scales


def nice_ticks(most: float, *, about: int = 4) -> list[float]:
    """From 0 to at least `most`, in steps of 1, 2 or 5 times a power of ten."""
    if most <= 0:
        return [0.0, 1.0]
    rough = most / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    return [index * step for index in range(math.ceil(most / step * 0.999) + 1)]


def log_ticks(least: float, most: float) -> list[float]:
    """1, 2 and 5 times powers of ten around the values, for a logarithmic axis; two at least."""
    low, high = math.floor(math.log10(least)), math.ceil(math.log10(most))
    steps = [factor * 10.0**power for power in range(low, high + 1) for factor in (1, 2, 5)]
    first = max(step for step in steps if step <= least * 1.001)
    last = min(step for step in steps if step >= most * 0.999 and step > first)
    return [step for step in steps if first <= step <= last]


def log_place(value: float, *, least: float, most: float) -> float:
    """Where on a logarithmic axis, from 0 to 1."""
    return math.log(value / least) / math.log(most / least)


def spaced(wanted: Sequence[float], gap: float) -> list[float]:
    """Places near those wanted (in any order), at least `gap` apart: for labels beside lines.

    Places that crowd become a pile around their middle, and piles that meet become one.
    """
    piles: list[list[int]] = []
    for index in sorted(range(len(wanted)), key=lambda each: wanted[each]):
        piles.append([index])
        while len(piles) > 1 and _top(piles[-1], wanted, gap) < _bottom(piles[-2], wanted, gap):
            last = piles.pop()
            piles[-1] += last
    places = [0.0] * len(wanted)
    for pile in piles:
        for order, index in enumerate(pile):
            places[index] = _top(pile, wanted, gap) + gap / 2 + order * gap
    return places


def _top(pile: Sequence[int], wanted: Sequence[float], gap: float) -> float:
    return sum(wanted[index] for index in pile) / len(pile) - len(pile) * gap / 2


def _bottom(pile: Sequence[int], wanted: Sequence[float], gap: float) -> float:
    return _top(pile, wanted, gap) + len(pile) * gap
