"""What opening a large device may cost a representation that keeps nothing for a page at rest.

Pure. A representation whose selling point is that it needs no table must not take one in secret.
"""

from pmblkd.compare import figures
from pmblkd.compare.results import LargeFileFacts

LIMITED_FILE_BYTES = 400 << 30
LIMITED_KINDS = ("extent", "pfn", "transient-page")
OPEN_SECONDS_MAX = 0.1
RESIDENT_BYTES_MAX = 50 << 20


def has_limits(facts: LargeFileFacts) -> bool:
    """Whether the limits are for it, and it was measured."""
    of_kind = facts.kind in LIMITED_KINDS and facts.file_bytes == LIMITED_FILE_BYTES
    return of_kind and not facts.skipped


def misses(facts: LargeFileFacts) -> list[str]:
    """What is over its limit, in words; nothing where there are no limits."""
    if not has_limits(facts):
        return []
    found = []
    if facts.open_seconds >= OPEN_SECONDS_MAX:
        found.append(f"{facts.contender} opened in {figures.seconds_text(facts.open_seconds)}")
    if facts.resident_bytes >= RESIDENT_BYTES_MAX:
        found.append(f"{facts.contender} took {figures.exact_size(facts.resident_bytes)}")
    return found
