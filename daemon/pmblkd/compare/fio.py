"""fio with a time limit, and its figures as a value. One job a run.

Not here: what to run and what the figures mean. The report goes to a file, because banners on
standard output precede the JSON. The benchmarks and the demo use it too.
"""

import json
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pmblkd.compare.children import output_of

PERCENTILES = "50:99:99.9"
ALWAYS = (
    *("--name=job", "--thread", "--output-format=json"),
    *("--lat_percentiles=1", f"--percentile_list={PERCENTILES}"),
)


class FioError(Exception):
    """fio failed, found data that is not what it wrote, or did not end in time."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """What a job read, or wrote. Latency is from submission to completion, the client's view."""

    ios: int
    seconds: float
    iops: float
    bytes_per_second: float
    latency_us_mean: float
    latency_us_p50: float
    latency_us_p99: float
    latency_us_p999: float


@dataclass(frozen=True, kw_only=True)
class Result:
    """`read` of a verifying write job is the reading back."""

    read: Side
    write: Side


def run(
    arguments: Sequence[str], *, seconds: float, check: Callable[[], None] = lambda: None
) -> Result:
    """`fio ARGUMENTS`, killed after `seconds`. Raises FioError; no process is left in any case.

    `check` is called ten times a second meanwhile, and may raise to stop it all.
    """
    with tempfile.TemporaryDirectory(prefix="pmblk-fio-") as directory:
        output = Path(directory) / "fio.json"
        command = ["fio", *ALWAYS, f"--output={output}", *arguments]
        # A session of its own: ^C is for the caller to act on.
        process = subprocess.Popen(
            command,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            said = output_of(process, seconds=seconds, check=check)
        except subprocess.TimeoutExpired:
            raise FioError(f"fio did not end in {seconds:g} s") from None
        return _result(process.returncode, said.decode(errors="replace"), output)


def _result(status: int, said: str, output: Path) -> Result:
    text = output.read_text() if output.exists() else ""
    if status != 0 or "{" not in text:
        words = f"{said.strip()} {text.partition('{')[0].strip()}"
        raise FioError(f"fio failed with exit status {status}: {words.strip()}")
    (job,) = json.loads(text[text.index("{") :])["jobs"]
    if job["error"] or not job["read"]["total_ios"] + job["write"]["total_ios"]:
        raise FioError(f"fio: error {job['error']}, or no I/O at all: {said.strip()}")
    return Result(read=_side(job["read"]), write=_side(job["write"]))


def _side(side: Mapping[str, Any]) -> Side:
    latency_ns = side["lat_ns"]
    percentiles = latency_ns.get("percentile", {})
    return Side(
        ios=int(side["total_ios"]),
        seconds=side["runtime"] / 1000,
        iops=float(side["iops"]),
        bytes_per_second=float(side["bw_bytes"]),
        latency_us_mean=latency_ns["mean"] / 1000,
        latency_us_p50=percentiles.get("50.000000", 0) / 1000,
        latency_us_p99=percentiles.get("99.000000", 0) / 1000,
        latency_us_p999=percentiles.get("99.900000", 0) / 1000,
    )
