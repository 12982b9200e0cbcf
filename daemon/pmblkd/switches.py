"""A switch of a namespace in service, whoever asked for it: nobody may map what is copied.

How the representation is exchanged is `pmblk.switching`, who is kept out `pmblkd.fuse.mappings`.
"""

from pmblk import switching
from pmblk.namespace import memory_of
from pmblk.representations import Representation
from pmblkd import report_of
from pmblkd.fuse import mappings
from pmblkd.registry import Served
from pmblkd.reports import SwitchReport


async def switch(served: Served, kind: str, options: Representation.Options) -> SwitchReport:
    """Raises PmblkError, and then what served before serves on."""
    namespace = memory_of(served.namespace, "representation to switch")
    before = report_of.representation(namespace.representation)
    async with mappings.kept_out(served, kind):
        switched = await switching.switch(namespace, kind, options)
    return report_of.switch(namespace, before, switched)
