"""Reports as a daemon would send them, for the tests of their readers."""

from typing import Any

from pmblkd.reports import NamespaceReport, RepresentationReport


def namespace_report(**changes: Any) -> NamespaceReport:
    """A plain namespace `ns1`, exported nowhere, with some fields changed."""
    fields: dict[str, Any] = {
        "name": "ns1",
        "path": "/dev/shm/ns1.img",
        "size_bytes": 1 << 30,
        "allocated_bytes": 4096,
        "lba_bytes": 4096,
        "read_only": False,
        "reserve_bytes": 0,
        "representation": RepresentationReport(kind="extent", options={"fragments": 1}),
        "durability": "memory",
        "durability_reason": "tmpfs keeps files in DRAM",
        "punches_holes": True,
        "nbd": [],
        "fuse": None,
        "users": 0,
        "draining": False,
        "failure": None,
    }
    return NamespaceReport(**{**fields, **changes})
