"""What a representation says of one I/O: its own descriptors, and the NVMe data pointers for them.

Addresses are those of the daemon's address space, as a controller behind an IOMMU would get them
with IOVA = VA. Lists and segments are given the made-up address `LIST_ADDRESS`, since nobody
fetches them.
"""

import msgspec
import numpy as np

from pmblk.errors import PmblkError
from pmblk.namespace import Namespace
from pmblk.nvme.data_pointer import PrpList, Run, Sgl, build_prps, build_sgl, merge, use_sgl
from pmblk.ranges import merge_extents
from pmblk.representations import Lease, Representation

LIST_ADDRESS = 0x1_0000_0000


class Description(msgspec.Struct, frozen=True, kw_only=True):
    """One I/O of `length` bytes at `offset`; `hole_bytes` of them have no memory to describe.

    `descriptors` and `descriptor_bytes` are what the representation built for it. `prps` is None
    where PRPs cannot express it; `prp_refusal` says why.
    """

    offset: int
    length: int
    hole_bytes: int
    descriptors: int
    descriptor_bytes: int
    runs: list[Run]
    prps: PrpList | None
    prp_refusal: str
    sgl: Sgl | None
    linux_uses_sgl: bool


def describe(namespace: Namespace, offset: int, length: int) -> Description:
    """Hold the range as a read would, look at what that yields, and let go.

    Raises PmblkError for a range that cannot be held: outside, poisoned, too much at once, or on
    its way out.
    """
    namespace.check_accessible(offset, length)
    representation = namespace.representation
    count, size = representation.built()
    leases: list[Lease] = []
    try:
        extents = list(merge_extents(namespace.media.allocation.extents(offset, length)))
        for extent in extents:
            if not extent.hole:
                leases.append(_held(representation, extent.offset, extent.length))
        runs = [_run(view) for lease in leases for view in lease.views]
    finally:
        representation.release(leases)
    count_after, size_after = representation.built()
    prps, refusal = _prps(runs)
    merged = merge(runs)
    return Description(
        offset=offset,
        length=length,
        hole_bytes=sum(extent.length for extent in extents if extent.hole),
        descriptors=count_after - count,
        descriptor_bytes=size_after - size,
        runs=runs,
        prps=prps,
        prp_refusal=refusal,
        sgl=build_sgl(runs, segment_address=LIST_ADDRESS) if runs else None,
        linux_uses_sgl=use_sgl(sum(run.length for run in merged), len(merged)),
    )


def _held(representation: Representation, offset: int, length: int) -> Lease:
    try:
        lease = representation.hold(offset, length)
    except OSError as error:
        raise PmblkError(str(error.strerror), hint="write, zero or discard its pages") from error
    if lease is None:
        raise PmblkError(
            f"{representation.kind} cannot hold {length} bytes now",
            hint="ask for less, or when less is in flight",
        )
    return lease


def _run(view: memoryview) -> Run:
    return Run(address=address_of(view), length=len(view))


def _prps(runs: list[Run]) -> tuple[PrpList | None, str]:
    if not runs:
        return None, "the range has no memory: it is a hole"
    try:
        return build_prps(runs, list_address=LIST_ADDRESS), ""
    except ValueError as error:
        return None, str(error)


def address_of(view: memoryview) -> int:
    """Where the bytes of the view are; it may be a read-only one."""
    address: int = np.frombuffer(view, np.uint8).ctypes.data
    return address
