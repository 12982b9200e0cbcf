"""The command `pmblk`. Exit status: 0 done, 1 failed at work, 2 wrong use, config or world."""

import sys
from pathlib import Path
from typing import Annotated, Any

import cyclopts
import msgspec
import trio
from cyclopts import Parameter

from pmblk import PmblkError
from pmblk.units import format_size
from pmblkd import (
    __version__,
    control,
    log,
    preflight,
)
from pmblkd import (
    attach as attaching,
)
from pmblkd import (
    config as configuration,
)
from pmblkd.errors import WorkFailed, only_ours
from pmblkd.service import Service

app = cyclopts.App(
    name="pmblk",
    help="Block devices in persistent memory, over NBD and FUSE.",
    version=__version__,
    version_flags=["--version"],
)

ConfigFile = Annotated[Path, Parameter(help="The config file (TOML).")]
Overrides = Annotated[
    list[str] | None,
    Parameter(
        name="--set",
        negative="",
        help="key=value in place of the file's: nbd.max_connections=8, namespace.ns1.size=2GiB.",
    ),
]
Socket = Annotated[Path, Parameter(help="The daemon's control socket.", env_var="PMBLK_SOCKET")]
AsJson = Annotated[bool, Parameter(name="--json", negative="", help="For machines.")]
DEFAULT_SOCKET = Path(configuration.ControlConfig().socket)


@app.command
def serve(config: ConfigFile, /, *, overrides: Overrides = None) -> None:
    """Serve the namespaces of a config file, in the foreground, until SIGTERM or SIGINT."""
    loaded = configuration.load(config, overrides or ())
    log.configure(loaded.daemon.log_level)
    trio.run(Service(config, loaded).serve)


@app.command
def check(config: ConfigFile, /, *, overrides: Overrides = None) -> None:
    """Say whether a config could be served here and now; change nothing."""
    loaded = configuration.load(config, overrides or ())
    preflight.check(config, loaded)
    names = ", ".join(namespace.name for namespace in loaded.namespace)
    print(f"{config}: good ({names})")


@app.command(name="list")
def list_(*, socket: Socket = DEFAULT_SOCKET, json: AsJson = False) -> None:
    """List the namespaces of the running daemon, how durable each is, and why."""
    namespaces = control.ask(socket, "list")
    if json:
        print(msgspec.json.format(msgspec.json.encode(namespaces)).decode())
    else:
        _print_table(namespaces)


@app.command
def attach(
    name: str,
    /,
    *,
    via: Annotated[
        attaching.Via | None,
        Parameter(help="The kernel driver; loop if there is a FUSE file, else nbd."),
    ] = None,
    socket: Socket = DEFAULT_SOCKET,
    json: AsJson = False,
) -> None:
    """Make a namespace a block device of this machine; print the device."""
    device = attaching.attach(_find(name, socket), via=via)
    print(msgspec.json.encode({"device": str(device)}).decode() if json else device)


@app.command
def detach(
    name: str,
    /,
    *,
    socket: Socket = DEFAULT_SOCKET,
    json: AsJson = False,
) -> None:
    """Take the block device of a namespace away."""
    devices = [str(device) for device in attaching.detach(_find(name, socket))]
    if json:
        print(msgspec.json.encode({"devices": devices}).decode())
    else:
        print("\n".join(devices) or f"{name} is not attached")


@app.command
def completion(shell: Annotated[str, Parameter(help="bash, zsh or fish.")], /) -> None:
    """Print the completion script for a shell: `pmblk completion bash > FILE`."""
    if shell not in ("bash", "zsh", "fish"):
        raise PmblkError(f"no completion for {shell}", hint="choose bash, zsh or fish")
    print(app.generate_completion(shell=shell))  # type: ignore[arg-type]


def _find(name: str, socket: Path) -> dict[str, Any]:
    namespaces = control.ask(socket, "list")
    for namespace in namespaces:
        if namespace["name"] == name:
            return dict(namespace)
    names = [namespace["name"] for namespace in namespaces]
    raise PmblkError(f"no namespace {name}", hint=configuration.did_you_mean(name, names))


def _print_table(namespaces: list[dict[str, Any]]) -> None:
    """For people. rich is imported here: `serve` must not pay for it at its start."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("NAME", "SIZE", "USED", "LBA"):
        table.add_column(heading, justify="left" if heading == "NAME" else "right")
    table.add_column("MEMORY AS")
    table.add_column("DURABILITY AND EXPORTS", overflow="fold")
    for namespace in namespaces:
        lines = [f"{namespace['durability']}: {namespace['durability_reason']}"]
        if namespace["read_only"]:
            lines.append("read-only")
        lines += namespace["nbd"]
        if namespace["fuse"]:
            lines.append(f"{namespace['fuse']['path']} ({namespace['fuse']['engine']})")
        table.add_row(
            namespace["name"],
            format_size(namespace["size"]),
            format_size(namespace["allocated"]),
            str(namespace["lba_size"]),
            namespace["representation"],
            "\n".join(lines),
        )
    Console().print(table)


def main() -> None:
    """The entry point: every error of ours is one line on standard error."""
    try:
        app(exit_on_error=False, print_error=False)
    except cyclopts.CycloptsError as error:
        _fail(f"{error}; see pmblk --help", 2)
    except (PmblkError, BaseExceptionGroup) as error:
        reason = only_ours(error)
        if reason is None:
            raise
        _fail(str(reason), 1 if isinstance(reason, WorkFailed) else 2)


def _fail(message: str, status: int) -> None:
    print(f"pmblk: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)
