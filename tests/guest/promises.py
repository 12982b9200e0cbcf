"""A program that writes over NBD and says what it was promised; and the check that it was kept.

    python3 promises.py URI SEED

It writes until the connection or the machine ends. A line on standard output is a number of a slot
and the numbers of a write, the latest last:

    issued SLOT VERSION     from here on the slot may hold this version
    kept SLOT VERSION       ... and from here on no older one: FUA or a flush was acknowledged

A version fills its slot. Needs python3-libnbd and nothing of this project.
"""

import os
import random
import struct
import sys
from collections.abc import Iterable

SLOTS = 256
SLOT_BYTES = 5000  # not a page, and not at its start: neighbours share pages
STRIDE_BYTES = 6008
BATCH = 8  # writes in flight
SIZE = SLOTS * STRIDE_BYTES


def content(version: int) -> bytearray:
    return bytearray(struct.pack("=Q", version) * (SLOT_BYTES // 8))


# ---- writing


def write(uri: str, seed: int) -> None:
    import nbd

    handle = nbd.NBD()
    handle.connect_uri(uri)
    chosen = random.Random(seed)
    version = 0
    while True:
        batch = {}
        for slot in chosen.sample(range(SLOTS), BATCH):
            version += 1
            batch[slot] = version
        _say("issued", batch)
        for slot, written in batch.items():
            _write(handle, slot, written, fua=chosen.random() < 0.3)
        while handle.aio_in_flight():
            handle.poll(-1)
        if chosen.random() < 0.7:
            handle.flush()
            _say("kept", batch)


def _write(handle, slot: int, version: int, *, fua: bool) -> None:  # type: ignore[no-untyped-def]
    import nbd

    def completed(error: int) -> int:
        assert not error  # an int, boxed
        if fua:
            _say("kept", {slot: version})
        return 1

    buffer = nbd.Buffer.from_bytearray(content(version))
    flags = nbd.CMD_FLAG_FUA if fua else 0
    handle.aio_pwrite(buffer, slot * STRIDE_BYTES, completed, flags)


def _say(verb: str, batch: dict[int, int]) -> None:
    """In one write, so that a power cut leaves whole lines and what follows has not begun."""
    lines = "".join(f"{verb} {slot} {version}\n" for slot, version in batch.items())
    os.write(sys.stdout.fileno(), lines.encode())


# ---- checking


def lost(image: bytes | bytearray, lines: Iterable[str]) -> list[str]:
    """What the lines promise and the device does not hold."""
    kept = dict.fromkeys(range(SLOTS), 0)
    issued: dict[int, set[int]] = {slot: set() for slot in range(SLOTS)}
    for line in lines:
        verb, slot, version = line.split()
        if verb == "issued":
            issued[int(slot)].add(int(version))
        else:
            kept[int(slot)] = max(kept[int(slot)], int(version))
    found = [_lost_in(image, slot, kept[slot], issued[slot]) for slot in range(SLOTS)]
    return [words for words in found if words]


def _lost_in(image: bytes | bytearray, slot: int, kept: int, issued: set[int]) -> str:
    start = slot * STRIDE_BYTES
    words = {word for (word,) in struct.iter_unpack("=Q", image[start : start + SLOT_BYTES])}
    allowed = {kept, *(version for version in issued if version > kept)}
    return "" if words <= allowed else f"slot {slot} holds {words}, and not only {allowed}"


if __name__ == "__main__":
    write(sys.argv[1], int(sys.argv[2]))
