"""The command `pmblk`. Exit status: 0 done, 1 failed at work, 2 wrong use, config or world."""

import os
import shutil
import sys
import textwrap
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
        _print_list(namespaces)


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


def _print_list(namespaces: list[dict[str, Any]]) -> None:
    """For people: a paragraph a namespace, as wide as the terminal, with no word cut."""
    columns = shutil.get_terminal_size().columns
    for namespace in namespaces:
        facts = [
            format_size(namespace["size"]),
            f"{format_size(namespace['allocated'])} used",
            f"LBA {namespace['lba_size']}",
            namespace["representation"],
            *(["read-only"] if namespace["read_only"] else []),
        ]
        print(namespace["name"])
        lines = [", ".join(facts), f"{namespace['durability']}: {namespace['durability_reason']}"]
        lines += namespace["nbd"]
        if namespace["fuse"]:
            lines += [namespace["fuse"]["path"], f"(FUSE engine: {namespace['fuse']['engine']})"]
        for line in lines:
            wrapped = textwrap.wrap(
                line, columns - 4, break_long_words=False, break_on_hyphens=False
            )
            print(textwrap.indent("\n".join(wrapped), "    "))


def main() -> None:
    """The entry point: every error of ours is one line on standard error."""
    try:
        app(exit_on_error=False, print_error=False)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has had enough. The interpreter must not flush again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.filename is not None:
            raise
        _fail(f"cannot write the answer: {error.strerror}", 1)
    except cyclopts.CycloptsError as error:
        _fail(f"{str(error).rstrip().rstrip('.')}; see pmblk --help", 2)
    except (PmblkError, BaseExceptionGroup) as error:
        reason = only_ours(error)
        if reason is None:
            raise
        _fail(str(reason), 1 if isinstance(reason, WorkFailed) else 2)


def _fail(message: str, status: int) -> None:
    print(f"pmblk: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)
