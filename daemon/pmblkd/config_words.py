"""What msgspec says of a config that it cannot take, in our words: the key, and a hint. Pure.

The type that is wrong knows what it takes, so hints name the keys and the choices that there are.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias, get_args, get_type_hints

import msgspec

from pmblk.representations import KINDS
from pmblkd.errors import ConfigError, RepresentationError, did_you_mean

Tables: TypeAlias = Mapping[str, type[msgspec.Struct]]  # by key; "" is the file itself

_UNKNOWN = re.compile(r"Object contains unknown field `(.+?)`(?: - at `\$(.*?)`)?")
_MISSING = re.compile(r"Object missing required field `(.+?)`(?: - at `\$(.*?)`)?")
_WRONG = re.compile(r"(.+?) - at `\$(.*?)`")


def explain(file: Path, raw: dict[str, Any], tables: Tables, text: str) -> ConfigError:
    """`text` is what msgspec says of `raw`, the file as it was read."""
    if match := _UNKNOWN.fullmatch(text):
        field, place = match[1], (match[2] or "").lstrip(".")
        hint = _suggest(tables, place, field)
        return ConfigError(file, _join(place, field), "unknown key", hint=hint)
    if match := _MISSING.fullmatch(text):
        field, place = match[1], (match[2] or "").lstrip(".")
        return ConfigError(file, _join(place, field), "missing", hint=f"add {field} = ...")
    if match := _WRONG.fullmatch(text):
        message = match[1].replace("`", "").replace("Expected", "expected")
        message = message.replace("array", "list").replace("object", "table")
        place = match[2].lstrip(".")
        hint = _words(tables, place) or _found(raw, match[2])
        return ConfigError(file, place, message, hint=hint)
    return ConfigError(file, "", text)


def _join(place: str, field: str) -> str:
    return f"{place}.{field}" if place else field


def _suggest(tables: Tables, place: str, field: str) -> str:
    table = _table(tables, place)
    return did_you_mean(field, table.__struct_fields__ if table else ())


def _words(tables: Tables, place: str) -> str:
    """What the key may be, where that is one of a few words."""
    table, _, key = place.rpartition(".")
    found = _table(tables, table)
    return "" if found is None else _choices(found, key)


def _table(tables: Tables, place: str) -> type[msgspec.Struct] | None:
    """The table at msgspec's path, without the dot that it begins with."""
    return tables.get(re.sub(r"\[.*?\]", "", place))


def _found(raw: Any, path: str) -> str:
    """The value at msgspec's path, to show what was written there."""
    for name, index in re.findall(r"\.(\w+)|\[(\d+)\]", path):
        try:
            raw = raw[name] if name else raw[int(index)]
        except (KeyError, IndexError, TypeError):
            return ""
    return f"found {raw!r}"


def explain_options(kind: str, options: Mapping[str, Any], text: str) -> RepresentationError:
    """`text` is what msgspec, or a rule of the options themselves, says of `options`."""
    if match := _UNKNOWN.fullmatch(text):
        known = KINDS[kind].Options.__struct_fields__
        hint = did_you_mean(match[1], known) or f"{kind} has no options"
        return RepresentationError(match[1], "unknown key", hint=hint)
    if match := _WRONG.fullmatch(text):
        option = match[2].lstrip(".")
        found = options.get(option)
        if choices := _choices(KINDS[kind].Options, option):
            return RepresentationError(option, f"{found!r} is not known", hint=choices)
        message = match[1].replace("`", "").replace("Expected", "expected")
        return RepresentationError(option, message, hint=f"found {found!r}")
    # A ValueError of the options themselves begins with the option's name, where it is theirs.
    known = KINDS[kind].Options.__struct_fields__
    option, _, message = text.partition(" ")
    if option in known:
        return RepresentationError(option, message)
    return RepresentationError(known[0] if len(known) == 1 else "", text.replace("`", ""))


def _choices(table: type[msgspec.Struct], key: str) -> str:
    """What the key of a table may be, where that is one of a few words."""
    choices = get_args(get_type_hints(table).get(key))
    if not choices or not all(isinstance(choice, str) for choice in choices):
        return ""
    return "choose " + " or ".join(f'"{choice}"' for choice in choices)
