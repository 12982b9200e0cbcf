"""What tests of the mounted files share: the ways of their bytes, and clients of them."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec
import nbd
import pytest

from tests.harness.daemon import Daemon

# ---- a FUSE engine and `dax`, as a config can choose them, by one word


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


# ---- clients


@contextlib.contextmanager
def opened(path: Path, flags: int = os.O_RDWR) -> Iterator[int]:
    """Its descriptor."""
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def refused(*codes: int) -> Iterator[None]:
    """An OSError with one of these errnos."""
    with pytest.raises(OSError) as caught:  # noqa: PT011  # the errno is checked below
        yield
    assert caught.value.errno in codes, caught.value


@contextlib.contextmanager
def client(daemon: Daemon, name: str) -> Iterator[Any]:
    """Of the same namespace over NBD: an `nbd.NBD` that is connected."""
    handle = nbd.NBD()
    handle.connect_uri(daemon.uri(name))
    try:
        yield handle
    finally:
        handle.shutdown()


def counters_of(daemon: Daemon, name: str) -> dict[str, int]:
    """The namespace's, by name."""
    return dict(msgspec.to_builtins(daemon.stats(name).namespace_counters))
