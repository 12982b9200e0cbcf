"""The arrays of descriptors that page forms build for an I/O: bio_vecs and PFNs.

Plain Python for few pages, numpy for many, as in `page_table`. Source: include/linux/bvec.h.
"""

from typing import Any

import numpy as np

from pmblk import pages
from pmblk.page_runs import SCALAR_PAGES
from pmblk.pages import PAGE_BYTES

BVEC = np.dtype([("page", "<u8"), ("length", "<u4"), ("offset", "<u4")])
BVEC_BYTES = BVEC.itemsize
PFN_BYTES = 8
assert BVEC_BYTES == 16


def bvecs(offset: int, length: int, structs: Any) -> Any:
    """One (struct address, length, offset in the page) a page that the range touches.

    `structs` are the addresses of their page structs, in order: a range, a list or an array.
    """
    count = len(structs)
    if count == 1:
        return [(structs[0], length, offset % PAGE_BYTES)]
    if count <= SCALAR_PAGES:
        return [
            (struct, piece, position % PAGE_BYTES)
            for struct, (position, piece) in zip(structs, pages.pieces(offset, length), strict=True)
        ]
    vector = np.empty(count, dtype=BVEC)
    if isinstance(structs, range):
        vector["page"] = np.arange(structs.start, structs.stop, structs.step, dtype=np.uint64)
    else:
        vector["page"] = structs
    vector["length"] = PAGE_BYTES
    vector["offset"] = 0
    head = offset % PAGE_BYTES
    vector[0] = (vector[0]["page"], PAGE_BYTES - head, head)
    vector[-1]["length"] = (offset + length - 1) % PAGE_BYTES + 1
    return vector


def pfns(first: int, count: int) -> Any:
    """The page frame numbers themselves."""
    if count <= 2 * SCALAR_PAGES:
        return list(range(first, first + count))
    return np.arange(first, first + count, dtype=np.uint64)
