"""The ways of a file's bytes that a config can choose: a FUSE engine and `dax`, by one word."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Way(NamedTuple):
    engine: str
    dax: str

    @property
    def passes(self) -> bool:
        """Whether read(2) and write(2) meet the daemon."""
        return self.dax != "fast"

    @property
    def maps(self) -> bool:
        """Whether a mapping is one of the media."""
        return self.dax != "off"

    @property
    def discards(self) -> bool:
        return self.engine == "kernel"


WAYS: Mapping[str, Way] = MappingProxyType(
    {
        "pyfuse3": Way("pyfuse3", "off"),
        "off": Way("kernel", "off"),
        "auto": Way("kernel", "auto"),
        "fast": Way("kernel", "fast"),
    }
)
