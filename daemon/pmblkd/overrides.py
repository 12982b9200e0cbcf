"""`--set key=value`: a value in place of what the config file says, before anything is checked.

The key is dotted; of a list of tables, a table is meant by its name or its index
(`namespace.ns1.size=2GiB`). The value is TOML, or else a bare word. Pure.
"""

import tomllib
from typing import Any

from pmblkd.errors import ConfigError


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Change `raw` as `override` says. Raises ConfigError."""
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError("--set", override, "no value", hint="write --set key=value")
    if not all(key.split(".")):
        raise ConfigError("--set", override, "no key", hint="write --set key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word: --set fuse.mountpoint=/mnt/x
    *parents, last = key.split(".")
    table: Any = raw
    for parent in parents:
        table = _child(table, parent, key)
    if not isinstance(table, dict):
        raise ConfigError("--set", key, "is no key", hint="e.g. namespace.NAME.size=1GiB")
    table[last] = value


def _child(table: Any, name: str, key: str) -> Any:
    """The table below; of a list of tables, by name or index."""
    if isinstance(table, list):
        for index, item in enumerate(table):
            if name == str(index) or (isinstance(item, dict) and item.get("name") == name):
                return item
        raise ConfigError("--set", key, f"there is no namespace {name}")
    if not isinstance(table, dict):
        raise ConfigError("--set", key, f"nothing is below {name}")
    return table.setdefault(name, {})
