"""What a FUSE engine is to the daemon, and which one a config gets."""

from pathlib import Path
from typing import Protocol

import structlog

from pmblk import PmblkError
from pmblkd.config import FuseConfig
from pmblkd.fuse.dax import Way
from pmblkd.fuse.files import Files
from pmblkd.fuse.kernel_engine import KernelEngine
from pmblkd.fuse.pyfuse3_engine import Pyfuse3Engine
from pmblkd.registry import Served
from pmblkd.spin import Spinner

_log = structlog.get_logger(__name__)


class Engine(Protocol):
    """Mount with `mount`, serve with `run` until `stop`, and always `unmount`.

    `discards`: whether it delivers holes that are punched. What is forgotten may be asked for anew
    at once, rather than when the kernel's copy of it is stale.
    """

    @property
    def name(self) -> str: ...
    @property
    def discards(self) -> bool: ...

    def mount(self) -> None:
        """Raises PmblkError; then nothing is mounted."""

    async def run(self) -> None:
        """Until `stop`, or until somebody unmounts."""

    def stop(self) -> None: ...
    def unmount(self) -> None: ...
    def forget_name(self, name: str) -> None: ...
    def forget_size(self, inode: int) -> None: ...

    def dax(self, served: Served) -> tuple[Way, str]:
        """How the bytes of its file go, and why not another way."""


def mounted(fuse: FuseConfig, files: Files, spinner: Spinner) -> Engine:
    """The engine of the config, with its mount. Raises PmblkError."""
    if fuse.engine == "pyfuse3":
        return _pyfuse3_mounted(fuse, files)
    try:
        return _kernel_mounted(fuse, files, spinner)
    except PmblkError as error:
        if fuse.engine == "kernel":
            raise
        refusal = error
    try:
        pyfuse3 = _pyfuse3_mounted(fuse, files)
    except PmblkError:
        raise refusal from None  # it says more
    _log.warning("no kernel engine: pyfuse3 serves the files", reason=str(refusal))
    return pyfuse3


def _kernel_mounted(fuse: FuseConfig, files: Files, spinner: Spinner) -> KernelEngine:
    kernel = KernelEngine(
        files,
        Path(fuse.mountpoint),
        allow_other=fuse.allow_other,
        options=fuse.options,
        request_timeout_seconds=fuse.request_timeout_seconds,
        spinner=spinner,
    )
    kernel.mount()
    return kernel


def _pyfuse3_mounted(fuse: FuseConfig, files: Files) -> Pyfuse3Engine:
    pyfuse3 = Pyfuse3Engine(
        files, Path(fuse.mountpoint), allow_other=fuse.allow_other, options=fuse.options
    )
    pyfuse3.mount()
    return pyfuse3
