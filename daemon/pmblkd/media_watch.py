"""The watch over the media: it notices a file that was truncated, and says what has failed.

An I/O that meets failed media gets an error at once (`pmblk.media.faults`); the log has one line a
namespace, written here, whoever noticed it. Looking costs one lseek a namespace, so that a file
which nobody uses is looked at too: the sooner it is known, the less is written beside it.
"""

import structlog
import trio

from pmblkd.registry import Registry

PERIOD_SECONDS = 1.0

_log = structlog.get_logger(__name__)


async def run(registry: Registry) -> None:
    """Until it is cancelled. Each failure is logged once."""
    told: set[int] = set()
    while True:
        for served in registry:
            if served.number not in told and served.namespace.examine():
                told.add(served.number)
                _log.error(
                    "media failed",
                    name=served.name,
                    reason=served.namespace.failure(),
                    now="every read, write and flush of this namespace is an error",
                    mend=served.namespace.remedy,
                )
        await trio.sleep(PERIOD_SECONDS)
