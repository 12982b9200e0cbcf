"""The command `pmblk`. Exit status: 0 done, 1 failed at work, 2 wrong use, config or world."""

import faulthandler
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import cyclopts
import msgspec
import trio
from cyclopts import Parameter

from pmblk import PmblkError
from pmblk.representations import KINDS
from pmblkd import (
    __version__,
    control,
    log,
    preflight,
    raid_commands,
    views,
)
from pmblkd import (
    attach as attaching,
)
from pmblkd import (
    config as configuration,
)
from pmblkd import (
    detach as detaching,
)
from pmblkd.command_line import (
    CHANGE_SECONDS,
    DEFAULT_SOCKET,
    AsJson,
    Name,
    Socket,
    columns,
    print_answer,
    see,
    size_of,
)
from pmblkd.errors import WorkFailed, did_you_mean, only_ours
from pmblkd.reports import (
    AttachReport,
    DescriptionReport,
    DetachReport,
    NamespaceReport,
    PoisonReport,
    ReloadReport,
    SaveReport,
    StatsReport,
    SwitchReport,
)
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
        help="A value to use in place of the file's: nbd.max_connections=8,"
        " namespace.ns1.size=2GiB; may be repeated.",
    ),
]
Kind = Annotated[str, Parameter(help=f"How to describe the memory of an I/O: {', '.join(KINDS)}.")]
Offset = Annotated[
    str, Parameter(help="Where the range begins: a number of bytes, or of KiB, MiB, GiB, TiB.")
]
Length = Annotated[
    str, Parameter(help="How long the range is: a number of bytes, or of KiB, MiB, GiB, TiB.")
]
SAVE_SECONDS = 24 * 3600


@app.command
def serve(config: ConfigFile, /, *, overrides: Overrides = None) -> None:
    """Serve the namespaces of a config file, in the foreground, until SIGTERM or SIGINT."""
    loaded = configuration.load(config, overrides or ())
    log.configure(loaded.daemon.log_level)
    faulthandler.enable()  # a crash has a last word; before the engine's own handler (SIGBUS)
    trio.run(Service(config, loaded, overrides or ()).serve)


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
    namespaces = control.ask(socket, "list", list[NamespaceReport])
    print_answer(namespaces, views.namespaces(namespaces, columns=columns()), json=json)


@app.command
def stats(name: Name, /, *, socket: Socket = DEFAULT_SOCKET, json: AsJson = False) -> None:
    """Show what a namespace did since it was opened, and what its representation cost."""
    report = control.ask(socket, "stats", StatsReport, name=name)
    print_answer(report, views.stats(report), json=json)


@app.command
def switch(
    name: Name,
    kind: Kind,
    /,
    *,
    option: Annotated[
        list[str] | None,
        Parameter(
            negative="", help="An option of KIND, as key=value: arena=128MiB; may be repeated."
        ),
    ] = None,
    socket: Socket = DEFAULT_SOCKET,
    json: AsJson = False,
) -> None:
    """Describe the memory of a namespace another way from now on; clients see a pause, no error.

    The config file is not changed: `pmblk reload` and a restart bring its representation back.
    """
    report = control.ask(
        socket,
        "switch",
        SwitchReport,
        seconds=CHANGE_SECONDS,
        name=name,
        kind=kind,
        options=_options(option or ()),
    )
    print_answer(report, views.switched(report), json=json)


@app.command
def reload(*, socket: Socket = DEFAULT_SOCKET, json: AsJson = False) -> None:
    """Let the daemon read its config file again and serve what that says now.

    A file that is wrong changes nothing. Exit status 1 when a change was refused: it is named, with
    the reason, and what was served before still is.
    """
    report = control.ask(socket, "reload", ReloadReport, seconds=CHANGE_SECONDS)
    print_answer(report, views.reloaded(report), json=json)
    if report.refused:
        sys.exit(1)


@app.command
def describe(
    name: Name,
    /,
    *,
    offset: Offset = "0",
    length: Length = "4KiB",
    socket: Socket = DEFAULT_SOCKET,
    json: AsJson = False,
) -> None:
    """Show how an I/O would be described: memory, PRP entries, SGL descriptors, as bytes."""
    where = {"offset": size_of("--offset", offset), "length": _length(length)}
    report = control.ask(socket, "describe", DescriptionReport, name=name, **where)
    print_answer(report, views.description(report), json=json)


@app.command
def poison(
    name: Name,
    /,
    *,
    offset: Offset,
    length: Length = "4KiB",
    socket: Socket = DEFAULT_SOCKET,
    json: AsJson = False,
) -> None:
    """Make memory of a namespace fail with EIO, as after an uncorrectable media error.

    Whole pages of 4 KiB go bad. Each is bad until it is written, zeroed or discarded as a whole.
    """
    where = {"offset": size_of("--offset", offset), "length": _length(length)}
    report = control.ask(socket, "poison", PoisonReport, name=name, **where)
    print_answer(report, views.poisoned(report), json=json)


@app.command
def save(
    name: Name,
    target: Annotated[Path, Parameter(help="A block device, or a file to make or empty.")],
    /,
    *,
    socket: Socket = DEFAULT_SOCKET,
    json: AsJson = False,
) -> None:
    """Copy a namespace to a file or block device, straight from its memory (O_DIRECT).

    Clients go on meanwhile: stop writers first, or freeze the file system, to get one moment.
    """
    report = control.ask(
        socket, "save", SaveReport, seconds=SAVE_SECONDS, name=name, target=str(target.absolute())
    )
    print_answer(report, views.saved(report), json=json)


@app.command
def attach(
    name: Name,
    /,
    *,
    via: Annotated[
        attaching.Via | None,
        Parameter(
            help="The kernel's driver to use. Without it: loop where there is a FUSE file, else"
            " nbd."
        ),
    ] = None,
    socket: Socket = DEFAULT_SOCKET,
    json: AsJson = False,
) -> None:
    """Make a namespace a block device of this machine; print the device."""
    device = attaching.attach(_find(name, socket), via=via)
    report = AttachReport(name=name, device=str(device))
    print_answer(report, report.device, json=json)


@app.command(
    usage="Usage: pmblk detach [OPTIONS] NAME\n"
    "       pmblk detach --all [OPTIONS]\n"
    "       pmblk detach --all --config FILE [OPTIONS]"
)
def detach(
    name: Annotated[str | None, Parameter(help="The namespace, by its name.")] = None,
    /,
    *,
    all_: Annotated[
        bool,
        Parameter(
            name="--all",
            negative="",
            show_default=False,
            help="Those of every namespace, and a mount that has lost its daemon.",
        ),
    ] = False,
    config: Annotated[
        Path | None,
        Parameter(
            help="With --all: ask no daemon, it is dead or hangs; this is its config file (TOML)."
        ),
    ] = None,
    overrides: Overrides = None,
    force: Annotated[
        bool,
        Parameter(
            negative="",
            show_default=False,
            help="With --all --config: end the mount of a daemon that does not answer, so that"
            " everybody who waits for it gets an error.",
        ),
    ] = False,
    socket: Socket = DEFAULT_SOCKET,
    json: AsJson = False,
) -> None:
    """Take the block device of a namespace away, or --all of them.

    A device that is in use is refused, with what to do; the exit status is 1 then.
    """
    if all_:
        if name is not None or ((force or overrides) and config is None):
            problem = "--all takes no NAME; --force and --set take --config"
            raise PmblkError(problem, hint=see("detach"))
        if config is None:
            place = detaching.place_of_daemon(socket)
        else:
            place = detaching.place_of_config(configuration.load(config, overrides or ()))
        everything = detaching.detach_all(place, force=force)
        print_answer(everything, views.all_detached(everything), json=json)
        sys.exit(1 if everything.refused else 0)
    if name is None or config or overrides or force:
        raise PmblkError("detach takes a NAME, or --all and its options", hint=see("detach"))
    devices = detaching.detach(_find(name, socket))
    report = DetachReport(name=name, devices=[str(device) for device in devices])
    print_answer(report, views.detached(report), json=json)


@app.command(
    usage="Usage: pmblk compare [OPTIONS] CONFIG\n"
    "       pmblk compare --from RESULTS [--output PATH]"
)
def compare(
    config: ConfigFile | None = None,
    /,
    *,
    from_: Annotated[
        Path | None,
        Parameter(
            name="--from",
            help="Measure nothing: draw the report again from this results.json of an earlier"
            " comparison. Takes no CONFIG, and of the options --output alone.",
        ),
    ] = None,
    namespace: Annotated[
        str | None,
        Parameter(
            help="The namespace whose directory, size and block size are taken. Without it: the"
            " first of the config."
        ),
    ] = None,
    size: Annotated[
        str | None,
        Parameter(help="The most that is worked on, of a larger namespace. Without it: 1GiB."),
    ] = None,
    seconds: Annotated[float, Parameter(help="How long each run of fio lasts.")] = 1.0,
    rounds: Annotated[int, Parameter(help="How often each run is made.")] = 3,
    rows: Annotated[
        str,
        Parameter(
            show_default=False,
            help="A regular expression: only loads whose name it is found in, such as nbd-4k or"
            " 'loop-.*-qd1$'.",
        ),
    ] = "",
    only: Annotated[
        list[str] | None,
        Parameter(
            negative="", help="A representation to compare; may be repeated. Without it: all."
        ),
    ] = None,
    variants: Annotated[
        bool,
        Parameter(
            negative="",
            show_default=False,
            help="Compare representations also with options that change what they cost.",
        ),
    ] = False,
    output: Annotated[Path, Parameter(help="The directory that the report is written to.")] = Path(
        "pmblk-compare"
    ),
    overrides: Overrides = None,
) -> None:
    """Measure every representation here, on a scratch file beside a namespace's; write a report."""
    from pmblkd.compare import command  # only now: the other commands need none of it

    wishes = command.Wishes(
        namespace=namespace,
        size=size,
        seconds=seconds,
        rounds=rounds,
        rows=rows,
        only=only or (),
        variants=variants,
        output=output,
    )
    if from_ is not None:
        others = msgspec.structs.replace(wishes, output=command.Wishes().output)
        if config is not None or overrides or others != command.Wishes():
            raise PmblkError(
                "--from measures nothing", hint="leave out CONFIG and every option but --output"
            )
        sys.exit(command.redraw(from_, output))
    if config is None:
        raise PmblkError("compare: no config to take a namespace from", hint=see("compare"))
    sys.exit(command.compare(configuration.load(config, overrides or ()), wishes))


app.command(raid_commands.app)


@app.command
def completion(shell: Annotated[str, Parameter(help="bash, zsh or fish.")], /) -> None:
    """Print the completion script for a shell: `pmblk completion bash > FILE`."""
    if shell not in ("bash", "zsh", "fish"):
        raise PmblkError(f"no completion for {shell}", hint="choose bash, zsh or fish")
    print(app.generate_completion(shell=shell))  # type: ignore[arg-type]


def _find(name: str, socket: Path) -> NamespaceReport:
    namespaces = control.ask(socket, "list", list[NamespaceReport])
    for namespace in namespaces:
        if namespace.name == name:
            return namespace
    names = [namespace.name for namespace in namespaces]
    raise PmblkError(f"no namespace {name}", hint=did_you_mean(name, names))


def _options(pairs: Sequence[str]) -> dict[str, str]:
    """`key=value`, each; the value stays text."""
    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise PmblkError(f"--option {pair}: no value", hint="write --option key=value")
        options[key] = value
    return options


def _length(text: str) -> int:
    length = size_of("--length", text)
    if not length:
        raise PmblkError("--length: 0 bytes are no range", hint="at least 1")
    return length


def _commands(chain: Sequence[str]) -> list[str]:
    """Those of the command that `chain` leads to."""
    group = app
    for name in chain:
        group = group[name]
    return [name for name in group if not name.startswith("-")]


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
    except cyclopts.UnknownCommandError as error:
        word, *_ = error.unused_tokens or [""]
        known = _commands(error.command_chain or ())
        _fail(f"no command {word}; {did_you_mean(word, known)}", 2)
    except cyclopts.CycloptsError as error:
        _fail(f"{str(error).rstrip().rstrip('.')}; {see(*error.command_chain or ())}", 2)
    except (PmblkError, BaseExceptionGroup) as error:
        reason = only_ours(error)
        if reason is None:
            raise
        _fail(str(reason), 1 if isinstance(reason, WorkFailed) else 2)


def _fail(message: str, status: int) -> None:
    print(f"pmblk: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)
