"""Memory that is used again: never while anybody can still see it."""

import os
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pmblk.raid import buffers
from pmblk.raid.buffers import buffer, numbers, scratch
from pmblk.raid.member import MEMORY_ALIGNMENT


def address(view: memoryview) -> int:
    return int(numbers(view).ctypes.data)


@pytest.fixture(autouse=True)
def pool(monkeypatch: pytest.MonkeyPatch) -> buffers._Pool:
    """One of our own."""
    pool = buffers._Pool()
    monkeypatch.setattr(buffers, "_pool", pool)
    return pool


def test_memory_is_aligned_and_as_long_as_asked_for() -> None:
    for length in (1, 512, 4096, 5000, 65536, 1 << 20, 3 << 20):
        for view in (buffer(length), scratch(length)):
            assert len(view) == length
            assert not view.readonly
            assert address(view) % MEMORY_ALIGNMENT == 0


def test_memory_is_used_again_once_nobody_sees_it() -> None:
    view = scratch(65536)
    first = address(view)
    del view
    assert address(scratch(65536)) == first
    assert address(scratch(40000)) == first, "of one size, which are powers of two"


@pytest.mark.parametrize(
    "hold",
    [
        lambda view: view[100:200],
        lambda view: numbers(view),
        lambda view: numbers(view[4096:])[:10].reshape(2, 5),
        lambda view: memoryview(view[1:2]).cast("c"),
        lambda view: np.frombuffer(view, dtype=np.uint64),
        lambda view: lambda: view,
    ],
)
def test_whoever_holds_any_part_of_it_keeps_all_of_it(hold: Callable[[memoryview], Any]) -> None:
    view = scratch(65536)
    first, held = address(view), hold(view)
    del view
    others = [scratch(65536) for _ in range(4)]
    assert first not in {address(other) for other in others}
    del others, held
    assert first in {address(view) for view in [scratch(65536) for _ in range(5)]}


def test_a_thread_that_is_not_back_keeps_what_it_reads_into() -> None:
    go_on = threading.Event()
    zero = os.open("/dev/zero", os.O_RDONLY)

    def read(view: memoryview) -> None:
        assert go_on.wait(10)
        os.preadv(zero, [view], 0)

    view = scratch(4096)
    first = address(view)
    thread = threading.Thread(target=read, args=(view,))
    thread.start()
    del view
    other = scratch(4096)
    assert address(other) != first
    other[:] = b"x" * 4096
    go_on.set()
    thread.join()
    assert other == b"x" * 4096
    os.close(zero)
    del thread
    assert address(scratch(4096)) == first


def test_zeroed_memory_is_zero_whatever_was_there_before() -> None:
    scratch(4096)[:] = b"x" * 4096
    assert not bytes(buffer(4096)).strip(b"\0")


def test_what_is_kept_is_bounded(pool: buffers._Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "FREE_BYTES_MAX", 1 << 20)
    views = [scratch(1 << 18) for _ in range(20)]
    del views
    assert {size: len(free) for size, free in pool._free.items()} == {1 << 18: 4}
    assert not pool._loans
    scratch(buffers.SCRATCH_BYTES_MAX + 1)
    assert len(pool._free) == 1


def test_threads_may_let_go_at_any_time(pool: buffers._Pool) -> None:
    def work(byte: int) -> None:
        for _ in range(2000):
            view = scratch(4096)
            view[:] = bytes([byte]) * 4096
            wrong.extend(set(view.tobytes()) - {byte})

    wrong: list[int] = []
    threads = [threading.Thread(target=work, args=(byte,)) for byte in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not pool._loans
