"""The daemon's log: one structured line an event (logfmt) on standard error; none a request."""

import os
import sys

import structlog


def configure(level: str) -> None:
    """`level` is debug, info, warning or error. Under systemd the journal adds the time."""
    processors: list[structlog.types.Processor] = [structlog.processors.add_log_level]
    if "JOURNAL_STREAM" not in os.environ:
        processors.append(structlog.processors.TimeStamper(fmt="iso", utc=True))
    processors += [
        structlog.processors.format_exc_info,
        structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"]),
    ]
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
    )
