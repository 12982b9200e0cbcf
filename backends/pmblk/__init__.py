"""The engine of pmblk: namespaces in persistent memory, and how their memory is described.

A library. It knows no socket, no FUSE, no config file and no command line; the daemon
(`pmblkd`) imports it, and it never imports the daemon. A namespace takes a batch of NVMe-like
commands, answers at once what memory can answer, and names what has to wait.
"""

from pmblk.block_device import BlockDevice
from pmblk.errors import MediaError, PmblkError
from pmblk.namespace import Namespace
from pmblk.nvme.command import Command, Opcode
from pmblk.nvme.status import Status

__all__ = ["BlockDevice", "Command", "MediaError", "Namespace", "Opcode", "PmblkError", "Status"]
