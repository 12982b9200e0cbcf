"""What is said of arrays, on the control socket and by `--json`; `pmblkd.reports` has the rest.

Sizes are bytes. What an array tells about itself is `pmblk.raid.status`.
"""

from uuid import UUID

from pmblk.raid.status import ArrayStatus
from pmblkd.reports import Report


class RaidReport(Report, frozen=True):
    """An array in service, by the name of its namespace; its own name is in its status."""

    name: str
    status: ArrayStatus


class StoppedReport(Report, frozen=True):
    """An array takes no new users; it is gone, or goes when the last of its `users` has left."""

    name: str
    users: int


class DeviceReport(Report, frozen=True):
    """What one device says of itself: the role that it has by its own superblock, or a `problem`.

    `slot` is None for a spare, and where there is no role.
    """

    place: str
    problem: str = ""
    name: str = ""
    array: UUID | None = None
    slot: int | None = None
    state: str = ""
    events: int = 0


class AssemblyReport(Report, frozen=True):
    """The array that some devices make up. `slots` are places, or None where nobody is found.

    It can start when nothing is in `obstacles`.
    """

    name: str
    array: UUID
    level: int
    layout: str
    chunk_bytes: int
    size_bytes: int
    slots: list[str | None]
    spares: list[str]
    clean: bool
    obstacles: list[str]
    notes: list[str]


class ExamineReport(Report, frozen=True):
    """`assembly` is None where there is no telling which array; then `reason` says why."""

    devices: list[DeviceReport]
    assembly: AssemblyReport | None
    reason: str = ""

    @property
    def can_start(self) -> bool:
        return self.assembly is not None and not self.assembly.obstacles


class CreatedReport(Report, frozen=True):
    """A new array is on its members; `files` were made for it."""

    name: str
    array: UUID
    level: int
    layout: str
    chunk_bytes: int
    size_bytes: int
    clean: bool
    members: list[str]
    spares: list[str]
    files: list[str]
