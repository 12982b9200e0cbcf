"""What a changed config means for a running daemon: a plan, made without touching anything. Pure.

`old` is what is served now, not what the file once said: after `pmblk switch` the two differ, and
the config wins. What cannot change while it is served is refused by its key and stays as it is, so
the next reload names it again.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import msgspec

from pmblk.representations import needs_reserve
from pmblkd.config import (
    Config,
    DaemonConfig,
    NamespaceConfig,
    keys_of_places,
    representation_options,
)
from pmblkd.reports import Refusal

RESTART = "needs a restart"


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Steps that do not depend on each other.

    `add`, `switch` and `grow` hold the new form, `remove` names; `changed` are the keys of plain
    settings that take their new value, `listen` one of them.
    """

    add: list[NamespaceConfig]
    remove: list[str]
    switch: list[NamespaceConfig]
    grow: list[NamespaceConfig]
    changed: list[str]
    refused: list[Refusal]


def plan(old: Config, new: Config, *, draining: Sequence[NamespaceConfig] = ()) -> Plan:
    """`draining` are namespaces that left the config earlier and still have users."""
    served = {namespace.name: namespace for namespace in old.namespace}
    wanted = {namespace.name: namespace for namespace in new.namespace}
    remove = [name for name in served if name not in wanted]
    leaving = {one.name: one for one in (*draining, *(served[name] for name in remove))}
    add, refused = _new_ones(wanted, served, leaving)
    kept = [(served[name], wanted[name]) for name in served if name in wanted]
    for pair in kept:
        refused += _fixed(*pair)
    refused += _fixed_tables(old, new)
    return Plan(
        add=add,
        remove=remove,
        switch=[after for before, after in kept if _switches(before, after)],
        grow=[after for before, after in kept if _grows(before, after)],
        changed=[
            *_changed_nbd(old, new),
            *_changed_daemon(old.daemon, new.daemon),
            *(f"namespace.{old.name}.dax" for old, new in kept if old.dax != new.dax),
        ],
        refused=refused,
    )


# ---- namespaces


def _new_ones(
    wanted: Mapping[str, NamespaceConfig],
    served: Mapping[str, NamespaceConfig],
    leaving: Mapping[str, NamespaceConfig],
) -> tuple[list[NamespaceConfig], list[Refusal]]:
    """What can be added, and what cannot because the one before has not gone yet."""
    add: list[NamespaceConfig] = []
    refused: list[Refusal] = []
    owners = {place: name for name, one in leaving.items() for place in one.places}
    for name, namespace in wanted.items():
        if name in served:
            continue
        held = [(key, place) for key, place in keys_of_places("", namespace) if place in owners]
        if name in leaving:
            reason = "it is still draining; reload again when its last user has left"
            refused.append(Refusal(key=f"namespace.{name}", reason=reason))
        elif held:
            key, place = held[0]
            what = "the file" if namespace.raid is None else place
            reason = f"{owners[place]} still has {what}; reload again when it is gone"
            refused.append(Refusal(key=f"namespace.{name}{key}", reason=reason))
        else:
            add.append(namespace)
    return add, refused


def _fixed(before: NamespaceConfig, after: NamespaceConfig) -> Iterator[Refusal]:
    """What differs between the two and cannot change while it is served."""

    def refusal(key: str, reason: str = RESTART) -> Refusal:
        return Refusal(key=f"namespace.{before.name}.{key}", reason=reason)

    for key in ("path", "lba_size", "read_only"):
        if getattr(before, key) != getattr(after, key):
            yield refusal(key)
    if before.raid is None or after.raid is None:
        if before.raid != after.raid:
            yield refusal("raid")
    else:
        for key in _different(before.raid, after.raid):
            yield refusal(f"raid.{key}")
    if before.places != after.places:
        return  # size and reserve are another file's
    if (after.reserve and not before.reserve) or (before.reserve and not after.with_reserve):
        yield refusal("reserve")
    if needs_reserve(representation_options(after)) and not before.reserve:
        yield refusal("representation", f'memmap = "device" without a reserve {RESTART}')
    if _bytes(after, before) < _bytes(before, before):
        yield refusal("size", "a namespace that is served can grow, not shrink")


def _switches(before: NamespaceConfig, after: NamespaceConfig) -> bool:
    options = representation_options(after)
    if needs_reserve(options) and not before.reserve:
        return False
    same_kind = before.representation_kind == after.representation_kind
    return not same_kind or options != representation_options(before)


def _grows(before: NamespaceConfig, after: NamespaceConfig) -> bool:
    return before.places == after.places and _bytes(after, before) > _bytes(before, before)


def _bytes(namespace: NamespaceConfig, served: NamespaceConfig) -> int:
    """Its size; one that says none takes the file as it is."""
    size = namespace.size_bytes
    if size is None:
        size = served.size_bytes
    return size or 0


# ---- tables and plain settings


def _fixed_tables(old: Config, new: Config) -> Iterator[Refusal]:
    if (old.nbd is None) != (new.nbd is None):
        yield Refusal(key="nbd", reason=RESTART)
    if (old.fuse is None) != (new.fuse is None):
        yield Refusal(key="fuse", reason=RESTART)
    elif old.fuse is not None and new.fuse is not None:
        for key in _different(old.fuse, new.fuse):
            yield Refusal(key=f"fuse.{key}", reason=RESTART)
    for key in _different(old.control, new.control):
        yield Refusal(key=f"control.{key}", reason=RESTART)


def _changed_nbd(old: Config, new: Config) -> Iterator[str]:
    if old.nbd is None or new.nbd is None:
        return
    if set(old.nbd.addresses) != set(new.nbd.addresses):
        yield "nbd.listen"
    if old.default_export != new.default_export:
        yield "nbd.default"
    if old.nbd.max_connections != new.nbd.max_connections:
        yield "nbd.max_connections"


def _changed_daemon(old: DaemonConfig, new: DaemonConfig) -> Iterable[str]:
    return (f"daemon.{key}" for key in _different(old, new))


def _different(old: msgspec.Struct, new: msgspec.Struct) -> list[str]:
    fields = old.__struct_fields__
    return [field for field in fields if getattr(old, field) != getattr(new, field)]
