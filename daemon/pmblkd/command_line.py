"""What the commands share: parameters that mean the same everywhere, and how answers print."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import Parameter

from pmblk import PmblkError
from pmblk.units import parse_size
from pmblkd.config import ControlConfig

Socket = Annotated[Path, Parameter(help="The daemon's control socket.", env_var="PMBLK_SOCKET")]
AsJson = Annotated[
    bool,
    Parameter(
        name="--json", negative="", show_default=False, help="Print JSON, which programs can read."
    ),
]
Name = Annotated[str, Parameter(help="The namespace, by its name in the config.")]
DEFAULT_SOCKET = Path(ControlConfig().socket)
CHANGE_SECONDS = 300  # a large page table takes its time, and so does a device


def size_of(option: str, text: str) -> int:
    """Raises PmblkError."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise PmblkError(f"{option}: {error}") from None


def print_answer(
    answer: msgspec.Struct | Sequence[msgspec.Struct], view: str, *, json: bool
) -> None:
    if json:
        view = msgspec.json.format(msgspec.json.encode(answer)).decode()
    print(view)


def see(*command: str) -> str:
    return f"see {' '.join(['pmblk', *command])} --help"


def columns() -> int:
    return shutil.get_terminal_size().columns
