import errno
import fcntl
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pmblk import MediaError
from pmblk.media import Media, create, libpmem, open_media, syscalls
from pmblk.media.allocation import AllocationMap
from pmblk.media.durability import PageCached, PersistentMemory, map_and_detect

PAGE = 4096
MakeMedia = Callable[..., Media]


def test_created_media_are_sparse_and_as_long_as_asked(directory: Path) -> None:
    create(directory / "a", 1 << 30)
    status = (directory / "a").stat()
    assert (status.st_size, status.st_blocks) == (1 << 30, 0)
    assert status.st_mode & 0o777 == 0o600


def test_creating_over_a_file_is_refused_and_leaves_it(directory: Path) -> None:
    (directory / "a").write_bytes(b"precious")
    with pytest.raises(MediaError, match="cannot create"):
        create(directory / "a", PAGE)
    assert (directory / "a").read_bytes() == b"precious"


def test_a_file_that_cannot_be_made_so_long_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="smaller size"):
        create(tmp_path / "a", 1 << 62)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("content", "size", "match"),
    [(b"", None, "empty"), (b"x" * PAGE, 2 * PAGE, "4096 bytes long, not 8192")],
)
def test_media_of_a_wrong_length_are_refused(
    directory: Path, content: bytes, size: int | None, match: str
) -> None:
    (directory / "a").write_bytes(content)
    with pytest.raises(MediaError, match=match):
        open_media(directory / "a", size=size)
    assert (directory / "a").read_bytes() == content


def test_what_is_no_regular_file_is_refused(directory: Path) -> None:
    os.mkfifo(directory / "pipe")
    with pytest.raises(MediaError, match="not a regular file"):
        open_media(directory / "pipe")


def test_a_second_owner_is_told_who_the_first_is(make_media: MakeMedia, directory: Path) -> None:
    make_media()
    with pytest.raises(MediaError, match=f"in use by process {os.getpid()}"):
        open_media(directory / "media.img")


def test_readers_share_media_and_keep_writers_out(make_media: MakeMedia, directory: Path) -> None:
    create(directory / "media.img", PAGE)
    make_media(read_only=True)
    make_media(read_only=True)
    with pytest.raises(MediaError, match="in use"):
        open_media(directory / "media.img")


def test_a_file_system_that_cannot_reserve_is_refused(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "no")

    create(directory / "a", PAGE)
    monkeypatch.setattr(syscalls, "fallocate", refuse)
    with pytest.raises(MediaError, match="cannot reserve space"):
        open_media(directory / "a")


def test_media_in_a_page_cache_are_stored_to_with_a_system_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store through the mapping faults a folio in, and a full file system makes that SIGBUS."""
    create(tmp_path / "a", 16 * PAGE)
    media = open_media(tmp_path / "a")
    written: list[int] = []
    pwrite = os.pwrite

    def short(fd: int, data: memoryview, offset: int) -> int:
        written.append(offset)
        return pwrite(fd, data[:1000], offset)

    monkeypatch.setattr(os, "pwrite", short)
    try:
        assert not media.stores_to_view
        media.reserve(0, PAGE)
        media.store(100, b"x" * 2500)
        assert written == [100, 1100, 2100]
        assert bytes(media.view[99:2601]) == b"\0" + b"x" * 2500 + b"\0"
    finally:
        media.close()


def test_tmpfs_is_found_to_be_memory(make_media: MakeMedia) -> None:
    durability = make_media().durability
    assert (durability.level, durability.sync_blocks) == ("memory", False)
    assert "tmpfs" in durability.reason


def test_a_disk_file_system_is_found_to_need_fdatasync(tmp_path: Path) -> None:
    create(tmp_path / "a", PAGE)
    media = open_media(tmp_path / "a")
    try:
        assert isinstance(media.durability, PageCached)
        assert "MAP_SYNC" in media.durability.reason
    finally:
        media.close()


def test_a_mapping_that_takes_map_sync_is_persistent_memory(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No DAX on this machine: the file system's name and the flag are stood in for, nothing else.

    libpmem's flush and drain work on any memory, so the real ones run here.
    """
    create(directory / "a", PAGE)
    monkeypatch.setattr(syscalls, "file_system", lambda _fd: "ext4")
    monkeypatch.setattr("pmblk.media.durability.MAP_SYNC", 0)
    monkeypatch.setattr("pmblk.media.durability.MAP_SHARED_VALIDATE", 1)
    media = open_media(directory / "a")
    try:
        assert isinstance(media.durability, PersistentMemory)
        flushed: list[tuple[int, int]] = []
        library = media.durability._library
        monkeypatch.setattr(library, "flush", lambda *range_: flushed.append(range_))
        media.store(100, b"x" * 50)
        address = media.durability._address
        assert flushed == [(address + 100, 50)]
        media.durability.sync()  # the page that was reserved
        assert not media.durability.sync_blocks
        media.durability.fence()
        media.punch(0, PAGE)
        assert media.durability.sync_blocks, "a punched hole is metadata: fdatasync"
        media.durability.sync()
        assert not media.durability.sync_blocks
    finally:
        media.close()


def test_a_layout_change_counts_as_durable_only_after_the_sync_that_covers_it(
    make_media: MakeMedia, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = libpmem.load()
    assert library is not None
    media = make_media()
    durability = PersistentMemory("", fd=media._fd, address=0, library=library)
    durability.layout_changed()

    def slow_sync(_fd: int) -> None:
        assert durability.sync_blocks, "a flush that comes now must wait too"
        durability.layout_changed()

    monkeypatch.setattr(os, "fdatasync", slow_sync)
    durability.sync()
    assert durability.sync_blocks, "the change during the sync is not covered by it"


def test_real_libpmem_is_installed_and_flushes_ordinary_memory(make_media: MakeMedia) -> None:
    library = libpmem.load()
    assert library is not None
    media = make_media()
    import ctypes

    address = ctypes.addressof(ctypes.c_char.from_buffer(media.view))
    library.flush(address, PAGE)
    library.drain()


def test_without_libpmem_a_dax_mapping_falls_back_and_says_so(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create(directory / "a", PAGE)
    monkeypatch.setattr(syscalls, "file_system", lambda _fd: "ext4")
    monkeypatch.setattr("pmblk.media.durability.MAP_SYNC", 0)
    monkeypatch.setattr(libpmem, "load", lambda: None)
    fd = os.open(directory / "a", os.O_RDWR)
    mapping, durability = map_and_detect(fd, PAGE, read_only=False)
    mapping.close()
    os.close(fd)
    assert durability.level == "file"
    assert "libpmem1" in durability.reason


def test_reading_what_was_never_written_allocates_nothing(make_media: MakeMedia) -> None:
    media = make_media(16 << 20)
    before = media.allocated_bytes()
    assert all(extent.hole for extent in media.allocation.extents(PAGE, (16 << 20) - PAGE))
    assert media.allocated_bytes() == before


def test_reserving_allocates_and_keeps_what_is_there(make_media: MakeMedia) -> None:
    media = make_media()
    media.reserve(8192, PAGE)
    media.store(8192, b"kept")
    media.reserve(0, 1 << 20)
    assert bytes(media.view[8192:8196]) == b"kept"
    assert media.allocated_bytes() == 1 << 20
    assert media.allocation.covers(0, 1 << 20)


def test_whole_pages_are_reserved_and_none_is_known_before_all_of_it_is(
    make_media: MakeMedia, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store faults a page in and needs all its blocks, also where blocks are 1 KiB."""
    media = make_media()
    reserved: list[tuple[int, int]] = []
    real = syscalls.reserve

    def second_fails(fd: int, offset: int, length: int) -> None:
        reserved.append((offset, length))
        if len(reserved) == 2:
            raise OSError(errno.ENOSPC, "full")
        real(fd, offset, length)

    monkeypatch.setattr(syscalls, "reserve", second_fails)
    media.reserve(3 * PAGE + 100, 1)
    assert reserved == [(3 * PAGE, PAGE)]
    with pytest.raises(OSError, match="full"):
        media.reserve(2 * PAGE + 100, PAGE)
    assert reserved[1] == (2 * PAGE, PAGE), "the other one is known"
    assert not media.allocation.covers(2 * PAGE, 1)


def test_writing_a_preallocated_file_asks_lseek_nothing(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On tmpfs lseek takes a reserved page for a hole, and walks over all that follow."""
    create(directory / "a", 1 << 20)
    with (directory / "a").open("r+b") as file:
        syscalls.fallocate(file.fileno(), 0, 0, 1 << 20)
    media = open_media(directory / "a")

    def refuse(*_: int) -> int:
        raise AssertionError("lseek")

    monkeypatch.setattr(os, "lseek", refuse)
    try:
        media.reserve(100, 1 << 19)
        assert media.allocation.covers(0, 1 << 19)
    finally:
        media.close()


def written_by_others(directory: Path, *, pages: int) -> Media:
    """Media with data that did not come through them, and a hole behind."""
    (directory / "a").write_bytes(b"x" * pages * PAGE)
    os.truncate(directory / "a", 2 * pages * PAGE)
    return open_media(directory / "a")


def count_seeks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    real, seeks = os.lseek, []

    def counting(fd: int, position: int, whence: int) -> int:
        seeks.append(position)
        return real(fd, position, whence)

    monkeypatch.setattr(os, "lseek", counting)
    return seeks


@pytest.mark.parametrize("place", [0, 100])
def test_a_run_that_others_wrote_is_looked_for_once(
    directory: Path, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    """On tmpfs each look walks over the whole run: looking at every read would be quadratic."""
    media = written_by_others(directory, pages=64)
    seeks = count_seeks(monkeypatch)
    try:
        for page in range(64):
            offset = page * PAGE + place
            assert [one.hole for one in media.allocation.extents(offset, 50)] == [False]
        assert len(seeks) <= 4
        assert media.allocation.covers(0, 64 * PAGE)
        assert not any(media.allocation.known[64:128])
    finally:
        media.close()


def test_what_lies_around_is_not_learned_while_something_is_punched(directory: Path) -> None:
    """The punch has forgotten its pages already, and takes them away a moment later."""
    media = written_by_others(directory, pages=8)
    allocation = media.allocation
    try:
        with allocation.punched(4 * PAGE, PAGE):
            assert not next(iter(allocation.extents(0, PAGE))).hole
            assert allocation.covers(0, PAGE)
            assert not any(allocation.known[1:])
    finally:
        media.close()


def test_nor_when_something_was_punched_amid_the_look(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    media = written_by_others(directory, pages=8)
    allocation, real = media.allocation, os.lseek

    def punching(fd: int, position: int, whence: int) -> int:
        found = real(fd, position, whence)
        if whence == os.SEEK_HOLE:
            monkeypatch.setattr(os, "lseek", real)
            media.punch(4 * PAGE, PAGE)  # as a thread would
        return found

    monkeypatch.setattr(os, "lseek", punching)
    try:
        assert not next(iter(allocation.extents(0, PAGE))).hole
        assert not allocation.covers(4 * PAGE, PAGE), "it is a hole"
        assert allocation.covers(0, PAGE)
    finally:
        media.close()


def test_blocks_past_the_end_do_not_make_a_file_full(directory: Path) -> None:
    create(directory / "a", 1 << 20)
    with (directory / "a").open("r+b") as file:
        syscalls.fallocate(file.fileno(), syscalls.FALLOC_FL_KEEP_SIZE, 1 << 20, 1 << 20)
    media = open_media(directory / "a")
    try:
        assert media.allocated_bytes() >= 1 << 20
        assert not media.allocation.covers(PAGE, PAGE)
    finally:
        media.close()


def test_hugetlbfs_is_never_punched(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create(directory / "a", PAGE)
    monkeypatch.setattr(syscalls, "file_system", lambda _fd: "hugetlbfs")
    media = open_media(directory / "a")
    assert not media.punches
    media.close()


def test_a_punch_counts_as_a_change_only_when_it_is_done(
    make_media: MakeMedia, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sync that runs meanwhile must not cover a hole that is not there yet."""
    media = make_media()
    order: list[str] = []
    monkeypatch.setattr(media.durability, "layout_changed", lambda: order.append("changed"))
    monkeypatch.setattr(syscalls, "punch_hole", lambda *_: order.append("punched"))
    media.punch(0, PAGE)
    assert order == ["punched", "changed"]


def test_a_punched_range_is_zeroes_and_gives_its_pages_back(make_media: MakeMedia) -> None:
    media = make_media()
    media.reserve(0, 1 << 20)
    media.store(0, b"\xff" * (1 << 20))
    media.punch(100, 3 * PAGE)
    assert bytes(media.view[:100]) == b"\xff" * 100
    assert media.allocated_bytes() == (1 << 20) - 2 * PAGE
    assert not media.allocation.covers(PAGE, PAGE)
    assert media.allocation.covers(4 * PAGE, PAGE)


def test_a_failed_punch_leaves_no_page_counted_as_memory(
    make_media: MakeMedia, monkeypatch: pytest.MonkeyPatch
) -> None:
    media = make_media()
    media.reserve(0, 1 << 20)

    def fail(*_: int) -> None:
        raise OSError(errno.EIO, "half way")

    monkeypatch.setattr(syscalls, "punch_hole", fail)
    with pytest.raises(OSError, match="half way"):
        media.punch(0, PAGE)
    assert not media.allocation.covers(0, PAGE)


operations = st.lists(
    st.tuples(st.sampled_from(["reserve", "punch", "outside write"]), st.integers(0, 40),
              st.integers(1, 12)),
    max_size=12,
)  # fmt: skip


@settings(max_examples=60)
@given(operations, st.integers(0, 40 * PAGE), st.integers(1, 12 * PAGE))
def test_extents_tell_the_truth_after_any_history(
    history: list[tuple[str, int, int]], offset: int, length: int
) -> None:
    """Against the file itself: a page is data when lseek says so."""
    size = 64 * PAGE
    path = Path(f"/dev/shm/pmblk-extents-{os.getpid()}")
    create(path, size)
    media = open_media(path)
    try:
        for name, page, pages in history:
            if name == "reserve":
                media.reserve(page * PAGE, pages * PAGE)
                media.store(page * PAGE, b"\1" * (pages * PAGE))
            elif name == "punch":
                media.punch(page * PAGE, pages * PAGE)
            else:
                with path.open("r+b") as file:
                    file.seek(page * PAGE)
                    file.write(b"\2" * (pages * PAGE))
        truth = AllocationMap(media._fd, size)  # knows nothing: asks lseek for everything
        for _ in range(2):  # the second time from what the first remembered
            extents = list(media.allocation.extents(offset, length))
            assert extents[0].offset == offset
            assert sum(extent.length for extent in extents) == length
            expected = [e.hole for e in truth.extents(offset, length) for _ in range(e.length)]
            found = [e.hole for e in extents for _ in range(e.length)]
            assert found == expected
    finally:
        media.close()
        path.unlink()


def test_opening_400_gib_is_quick_and_small(directory: Path) -> None:
    """The map of known pages is lazy: no byte of it is touched for pages nobody used."""
    create(directory / "a", 400 << 30)

    def resident_kib() -> int:
        fields = Path("/proc/self/status").read_text().split()
        return int(fields[fields.index("RssAnon:") + 1])

    before = resident_kib()
    media = open_media(directory / "a")
    try:
        assert not media.allocation.covers(399 << 30, PAGE)
        assert resident_kib() - before < 1024
    finally:
        media.close()


def _resident_bytes() -> int:
    """Of this process, shared memory too; the page of zeroes that reading maps does not count."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def test_to_forget_what_is_unknown_takes_no_memory(make_media: MakeMedia) -> None:
    """A discard of 400 GiB would give the map of its pages 100 MiB."""
    media = make_media(400 << 30)
    known = media.allocation.known
    media.allocation.mark(300 << 30, 3 * PAGE)
    assert syscalls.resident_bytes(known) == PAGE
    before = _resident_bytes()
    media.allocation.forget(PAGE, (400 << 30) - PAGE)
    assert _resident_bytes() - before < 10 << 20
    assert not media.allocation.covers(300 << 30, PAGE)
    assert list(media.allocation.unknown(0, 400 << 30)) == [(0, 400 << 30)]


@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(0, 200_000), st.integers(1, 200_000)), max_size=10
    )
)
def test_what_is_marked_is_known_until_it_is_forgotten(
    history: list[tuple[bool, int, int]],
) -> None:
    pages = 200_000
    allocation = AllocationMap(-1, pages * PAGE)
    model = bytearray(pages)
    for mark, first, count in history:
        count = min(count, pages - first)
        if not count:
            continue
        (allocation.mark if mark else allocation.forget)(first * PAGE, count * PAGE)
        model[first : first + count] = bytes([mark]) * count
    assert allocation.known[:pages] == model


def test_closed_media_are_unlocked_though_a_view_is_still_out(
    make_media: MakeMedia, directory: Path
) -> None:
    """A mapping keeps a duplicate of the descriptor, and with it the lock."""
    create(directory / "a", PAGE)
    media = open_media(directory / "a")
    view = media.view[:10]
    media.close()
    open_media(directory / "a").close()
    assert bytes(view) == bytes(10)


# ---- others


def test_others_are_known_by_any_name_and_after_their_close(
    make_media: MakeMedia, directory: Path
) -> None:
    media = make_media()
    assert not media.is_open_elsewhere()
    link = directory / "link"
    os.link(media.path, link)
    fd = os.open(link, os.O_RDWR)
    assert media.is_open_elsewhere()
    with mmap.mmap(fd, 4096):
        os.close(fd)
        link.unlink()
        assert media.is_open_elsewhere()
    assert not media.is_open_elsewhere()


def test_a_descriptor_for_the_kernel_counts_until_it_is_closed(make_media: MakeMedia) -> None:
    media = make_media()
    fd = media.open_again()
    assert media.is_open_elsewhere()
    os.close(fd)
    assert not media.is_open_elsewhere()


def test_where_there_are_no_leases_nobody_is_said_to_be_there(
    make_media: MakeMedia, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_fd: int, command: int, _argument: int) -> int:
        if command == fcntl.F_SETLEASE:
            raise OSError(errno.EINVAL, "no leases here")
        return 0

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    assert not make_media().is_open_elsewhere()
