import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmblk.units import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (4096, 4096),
        ("4096", 4096),
        ("512B", 512),
        ("64KiB", 65536),
        ("64k", 65536),
        ("1.5GiB", 3 << 29),
        (" 2 TiB ", 2 << 40),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "1GB", "MiB", "-1", "1.0001KiB", "0x10", "1 2", -5, True])
def test_what_is_no_size_is_refused(text: str | int) -> None:
    with pytest.raises(ValueError, match=r"size|whole number"):
        parse_size(text)


@given(st.integers(0, 1 << 60))
def test_every_whole_size_survives_as_bytes(size: int) -> None:
    assert parse_size(str(size)) == size


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (4096, "4 KiB"), (3 << 29, "1.5 GiB"), (1 << 50, "1 PiB")]
)
def test_sizes_are_shown_in_the_largest_unit(size: int, text: str) -> None:
    assert format_size(size) == text
