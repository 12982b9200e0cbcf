"""Sizes in bytes, as people write them. Binary units only, as everywhere in storage."""

import re
from fractions import Fraction

_SUFFIXES = {
    "": 1,
    "b": 1,
    **{
        spelling: 1 << (10 * power)
        for power, letter in enumerate("kmgtp", start=1)
        for spelling in (letter, letter + "ib")
    },
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)", re.IGNORECASE)
_NAMES = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def parse_size(text: str | int) -> int:
    """The bytes that `text` names: 4096, "4096", "64KiB", "1.5GiB", "2g".

    Raises ValueError for anything else, for decimal units ("1GB": is that 10^9 or 2^30?) and for
    a fraction that is no whole number of bytes.
    """
    if isinstance(text, int):
        if isinstance(text, bool) or text < 0:
            raise ValueError(f"{text!r} is not a size")
        return text
    match = _SIZE.fullmatch(text.strip())
    if match is None or match[2].lower() not in _SUFFIXES:
        raise ValueError(f'{text!r} is not a size: write bytes, or KiB, MiB, GiB, TiB ("64MiB")')
    size = Fraction(match[1]) * _SUFFIXES[match[2].lower()]
    if size.denominator != 1:
        raise ValueError(f"{text!r} is no whole number of bytes")
    return int(size)


def format_size(size_bytes: int) -> str:
    """`size_bytes` in the largest unit that leaves it whole or readable: 4096 -> "4 KiB"."""
    value, power = float(size_bytes), 0
    while value >= 1024 and power < len(_NAMES) - 1:
        value /= 1024
        power += 1
    text = f"{value:.0f}" if value == int(value) else f"{value:.1f}"
    return f"{text} {_NAMES[power]}"
