"""`extent`: one {address, length} for each contiguous run, whatever its size.

A namespace that is mapped whole is one run, so any I/O is one descriptor and no byte is copied: a
lease is a slice of the mapping, and a write is a store to it. There is nothing to remember: what
is stored is on the media.
"""

from pmblk.media import Media
from pmblk.representations.base import Lease, Representation


class ExtentRepresentation(Representation):
    kind = "extent"

    def __init__(self, media: Media, options: Representation.Options) -> None:
        super().__init__(media, options)
        self._view = media.view
        self._store = media.store
        self.has_windows = media.stores_to_view

    def hold(self, offset: int, length: int) -> Lease:
        self.leases += 1
        return [self._view[offset : offset + length]]

    def window(self, offset: int, length: int) -> memoryview | None:
        if not self.has_windows:
            return None
        return self._view[offset : offset + length]

    def write(self, offset: int, payload: "memoryview | bytes") -> bool:
        self._store(offset, payload)
        return True
