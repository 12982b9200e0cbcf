"""Arrays of the config: their members opened and assembled, and put in service."""

from functools import partial

import trio

from pmblk.array_face import Running
from pmblk.raid.assembling import assemble
from pmblk.raid.events import Tell
from pmblk.raid.opening import open_member
from pmblk.raid.sweep import Pace
from pmblk.volume import Volume
from pmblkd import array_log
from pmblkd.config import NamespaceConfig, RaidConfig
from pmblkd.registry import Served, open_served


async def open_namespace(
    config: NamespaceConfig, *, degraded: bool = False, force: bool = False
) -> Served:
    """An array, or a namespace in memory. Raises PmblkError, and then nothing is left behind.

    `degraded` and `force` are allowed an array for this once, whatever its config says.
    """
    raid = config.raid
    if raid is None:  # in a thread: a page table takes its time, and a file may lie anywhere
        return await trio.to_thread.run_sync(open_served, config)
    running = await open_array(
        raid,
        degraded=degraded or raid.degraded,
        force=force or raid.force,
        tell=partial(array_log.tell, config.name),
    )
    volume = Volume(config.name, running, lba_bytes=config.lba_size, read_only=config.read_only)
    return Served(config, volume, created=False)


async def open_array(raid: RaidConfig, *, degraded: bool, force: bool, tell: Tell) -> Running:
    """Raises PmblkError with a line for each reason why it cannot start."""
    return await assemble(
        raid.members,
        open_member=partial(open_member, timeout_seconds=raid.member_timeout_seconds),
        array=raid.uuid,
        degraded=degraded,
        force=force,
        pace=Pace(
            bytes_per_second_max=raid.sweep_max_bytes,
            bytes_per_second_min=raid.sweep_min_bytes,
        ),
        tell=tell,
    )
